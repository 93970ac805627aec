"""Claimed: a patched model trains inside DDP, FSDP2 and ZeRO-3 as it does with its own loss.

Two ranks with different numbers of labels. Each engine runs the model as it is and patched: losses
and gradients of two steps agree to float32 rounding, tied and untied, with the head gathered alone
(FSDP2) or with the rest. Exact: ZeRO-3 leaves no parameter gathered.
"""

import json

import numpy as np
import pytest
from support.launching import ROOT

WORKER = ROOT / "tests" / "distributed" / "patch_worker.py"
CASES = [
    *("ddp/untied", "ddp/tied", "fsdp2/untied", "fsdp2/tied", "fsdp2-head/untied"),
    *("zero3/untied", "zero3/tied"),
]


@pytest.mark.slow
@pytest.mark.deepspeed
def test_patched_model_in_every_engine(launch, tmp_path):
    done = launch(WORKER, str(tmp_path), ranks=2)
    assert done.status == 0, done.output[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found.keys() == {f"{case}/{kind}" for case in CASES for kind in ("own", "patched")}
        for case in CASES:
            own, patched = found[f"{case}/own"], found[f"{case}/patched"]
            for what in ("losses", "grads"):
                np.testing.assert_allclose(
                    patched[what], own[what], rtol=1e-5, atol=1e-5, err_msg=f"{case}, {what}"
                )
            # The first step is that of DDP, so no engine skips a rank's share.
            ddp = found[f"ddp/{case.split('/')[1]}/own"]["grads"]
            first = len(ddp) // 2
            np.testing.assert_allclose(
                patched["grads"][:first], ddp[:first], rtol=1e-4, atol=1e-4, err_msg=case
            )
