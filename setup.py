"""Packaging of safereg_dist (see CONTRIBUTING.md for why `kernels/` is a source root)."""

from setuptools import find_packages, setup

setup(
    name="safereg_dist",
    version="0.1.0",
    description="Risk-adaptive safety regularisation for fine-tuning language models at scale",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["safereg_dist*"]), "safereg_kernels"],
    package_dir={"safereg_kernels": "kernels/safereg_kernels"},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "transformers>=5.17",
        "accelerate>=1.1",  # transformers builds models under zero.Init only where it is installed
        "datasets>=4.0",
        "safetensors>=0.5",
        "numpy",
        "scikit-learn>=1.5",
        "scipy",
        "datasketch>=1.6",
        "httpx>=0.27",
        "pyyaml",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "ninja",
        'triton>=3.6; platform_system == "Linux"',
    ],
    extras_require={
        "dev": ["pytest>=8", "hypothesis", "ruff", "pyright", "jaxtyping", "beartype"],
    },
    entry_points={"console_scripts": ["safereg=safereg_dist.cli:entry"]},
)
