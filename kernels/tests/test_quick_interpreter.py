"""Claimed: what the tests leave out of Triton's interpreter changes no result, nor what a launch
leaves behind in `triton.language`.

Judge: the interpreter itself. Exact, to the bit.
"""

import os

import pytest
import torch
from cases import DIRECTIONS, grad_of, head_inputs

from safereg_kernels import linear_ce_kl


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@DIRECTIONS
def test_the_interpreter_gives_the_same_bits(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quick_interpreter
    import triton.language as tl
    from triton.runtime import interpreter

    from safereg_kernels import fused

    if not quick_interpreter.ORIGINALS:
        pytest.skip("this Triton's interpreter is left as it is")
    monkeypatch.setenv("SAFEREG_KERNELS", "triton")
    monkeypatch.setattr(fused, "BLOCK_COLUMNS", 256)
    quick = results(direction)
    left = dict(vars(tl)), dict(vars(tl.tensor))
    for name, original in quick_interpreter.ORIGINALS.items():
        if name == "launch":
            monkeypatch.setattr(interpreter.GridExecutor, "__call__", original)
        else:
            monkeypatch.setattr(interpreter, name, original)
    for got, want in zip(quick, results(direction), strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert left == (dict(vars(tl)), dict(vars(tl.tensor)))


def results(direction: str) -> list[torch.Tensor]:
    inputs = head_inputs(tokens=4)
    options = {"temperature": 0.7, "policy_softcap": 9.0, "z_loss": 0.01}
    outputs = linear_ce_kl(**inputs, direction=direction, **options)[:3]
    outputs[0].backward()
    grads = [grad_of(inputs[name]) for name in ("policy_hidden", "policy_head")]
    return [*(output.detach() for output in outputs), *grads]
