"""Claimed: what is launched compiles for Ampere, Hopper and Blackwell, and is as lean as it says.

Exact, of the machine code: no stack frame and no spilled register; loads of 128 bits in the loop
over columns, with whole vectors and with vocabularies that are no multiple of 16; on Hopper at most
30 instructions a column (one policy and one reference logit), 64 registers and no barrier in the
statistics kernel's loop. With the installed Triton, and with 3.6, which comes with torch 2.11.

For Hopper every kernel of every direction is compiled, with soft caps and scales too, with each
dtype and with whole vectors or not; for the other architectures, and by Triton 3.6, those of two
directions without caps. SAFEREG_TESTS=full compiles for Hopper every pair of a dtype and whole
vectors, and all directions for the others.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
OTHER = "3.6.0"
FULL = os.environ.get("SAFEREG_TESTS") == "full"
EXTENT = ["--common"] if FULL else ["--few"]


def compile_all(capability: int, *options: str, triton_folder: Path | None = None) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton_folder is not None:
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{triton_folder}{os.pathsep + before if before else ''}"
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, script, str(capability), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_lean(kernel: dict[str, Any]) -> None:
    print(kernel)
    assert kernel["stack"] == 0, kernel
    if kernel["is_common"]:
        assert kernel["spills"] == 0, kernel
        assert kernel["wide_loads"] > 0, kernel


def assert_fast(kernel: dict[str, Any]) -> None:
    """What Hopper's figures rest on, for the statistics kernel without soft caps."""
    assert kernel["loop_loads"] == kernel["loop_wide_loads"] > 0, kernel
    assert kernel["loop_barriers"] == 0, kernel
    assert kernel["registers"] <= 64, kernel
    assert kernel["loop_instructions_per_column"] <= 30, kernel


def plain_statistics(kernels: list[dict]) -> list[dict]:
    return [
        kernel
        for kernel in kernels
        if kernel["kernel"] == "statistics_kernel" and kernel["is_common"]
    ]


@pytest.mark.slow
def test_every_variant_for_hopper() -> None:
    kernels = compile_all(90, "--all", *([] if FULL else ["--pairs"]))
    for kernel in kernels:
        assert_lean(kernel)
    plain = plain_statistics(kernels)
    # Directions, dtypes of logits, whole vectors or not.
    assert len(plain) == 4 * 2 * (2 if FULL else 1)
    for kernel in plain:
        assert_fast(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100])
def test_other_architectures(capability: int) -> None:
    for kernel in compile_all(capability, *EXTENT):
        assert_lean(kernel)


@pytest.mark.slow
def test_the_oldest_triton() -> None:
    folder = other_triton()
    kernels = compile_all(90, *EXTENT, triton_folder=folder)
    assert {kernel["triton"] for kernel in kernels} == {OTHER}
    for kernel in kernels:
        assert_lean(kernel)
    plain = plain_statistics(kernels)
    assert len(plain) == (4 * 2 if FULL else 2) * 2  # directions, dtypes, whole vectors or not
    for kernel in plain:
        assert_fast(kernel)


def other_triton() -> Path:
    """A folder with the other Triton, beside the environment's packages; made once."""
    folder = Path(sys.prefix) / f"triton-{OTHER}"
    if not (folder / "triton").is_dir():
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", partial,
             f"triton=={OTHER}"],
            capture_output=True,
            text=True,
        )  # fmt: skip
        if done.returncode != 0:
            pytest.skip(f"triton {OTHER} cannot be installed: {done.stderr.strip()[-200:]}")
        partial.rename(folder)
    return folder
