"""Runs a script of `launch/examples/megatron` on CPUs: `megatron_example.py SCRIPT ARGUMENTS`."""

import os
import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `support`

from support import megatron_on_cpu

if __name__ == "__main__":
    torch.set_num_threads(1)
    megatron_on_cpu.unpacked(os.environ.get("MEGATRON_CORE", ""))
    megatron_on_cpu.patch()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    torch.distributed.barrier()
    megatron_on_cpu.leave()
