"""What every test of the kernel package shares; needs torch, triton, numpy, pytest, hypothesis."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated
if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()


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
    return request.param
