"""What every test of the kernel package shares; needs torch, triton, numpy, pytest, hypothesis."""

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated
if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()


TRITON_EXAMPLES = 4
"""Random examples of a property under the interpreter, some twenty times as slow as `eager`.

SAFEREG_TESTS=full takes as many as for `eager`.
"""


def pytest_configure(config: pytest.Config) -> None:
    """The marks, known also where these tests run without the project around them."""
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


@pytest.fixture(params=["eager", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both paths of the kernels; blocks are small, so that a row spans several."""
    from safereg_kernels import fused

    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("CPU tensors need TRITON_INTERPRET=1")
    monkeypatch.setenv("SAFEREG_KERNELS", request.param)
    monkeypatch.setattr(fused, "BLOCK_COLUMNS", 256)
    if request.param == "triton" and os.environ.get("SAFEREG_TESTS") != "full":
        take_fewer_examples(request.function, monkeypatch)
    return request.param


def take_fewer_examples(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one run of a test of random examples; any other test stays as it is."""
    name = "_hypothesis_internal_use_settings"  # where hypothesis' own plugin changes them too
    given = getattr(function, name, None)
    if given is not None:
        fewer = min(given.max_examples, TRITON_EXAMPLES)
        monkeypatch.setattr(function, name, settings(given, max_examples=fewer))
