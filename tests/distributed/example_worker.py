"""Runs a script of `launch/examples` and keeps what this rank holds of its trained weights.

example_worker.py OUT SCRIPT [arguments of the script]
"""

import os
import runpy
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

if "deepspeed" in sys.argv[2]:
    import deepspeed

    # It would compile an operator of its own for ranks on one host (minutes of a core).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
out, script = Path(sys.argv[1]), sys.argv[2]
sys.argv = sys.argv[2:]
known = runpy.run_path(script, run_name="__main__")


def local(parameter) -> Tensor:
    parameter = getattr(parameter, "ds_tensor", parameter)
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


held = known["trainer"].model if "trainer" in known else known["model"]
rank = os.environ.get("RANK", "0")
save_file(
    {name: local(p).detach().clone() for name, p in held.named_parameters()},
    out / f"held{rank}.safetensors",
)
