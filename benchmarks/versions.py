"""Prints what a run of `gpu_check.sh` runs on: versions.py cuda|cpu."""

import sys
import time
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    *("torch", "triton", "transformers", "deepspeed", "datasets", "numpy", "matplotlib"),
    *("liger-kernel", "cut-cross-entropy", "quack-kernels"),
)


def main() -> None:
    """Versions from the metadata; then torch is imported, which warms the disk's cache."""
    print("python", sys.version.split()[0])
    for name in PACKAGES:
        try:
            print(name, version(name))
        except PackageNotFoundError:
            print(name, "not installed")
    started = time.perf_counter()
    import torch

    print(f"torch imported in {time.perf_counter() - started:.1f} s", flush=True)
    if sys.argv[1] == "cuda":
        print(torch.cuda.get_device_name(), torch.version.cuda, torch.cuda.get_device_properties(0))


if __name__ == "__main__":
    main()
