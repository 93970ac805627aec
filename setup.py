"""Packaging of safereg_dist; `kernels/` is a package of its own (see CONTRIBUTING.md)."""

from setuptools import find_packages, setup

setup(
    name="safereg_dist",
    version="0.1.0",
    description="Risk-adaptive safety regularisation for fine-tuning language models at scale",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["safereg_dist*"]),
    package_data={"safereg_dist.demo.real": ["prompts/*"]},
    install_requires=[
        "safereg-kernels>=0.2",  # ./kernels
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
        "pydantic>=2.7",  # the sentence under a field is its description
        "pyyaml",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "ninja",
    ],
    extras_require={
        "trl": ["trl>=1.9"],
        "lora": ["peft>=0.17"],
        "megatron": ["megatron-core>=0.16"],
        "sign": ["cryptography>=42"],
        "gguf": ["gguf>=0.10"],
        "real": ["gguf>=0.10"],  # `python -m safereg_dist.demo --real`
        "eval": ["rouge-score>=0.1.2"],
        "lm-eval": ["lm-eval>=0.4.9"],
        "dev": [
            "gguf>=0.10",
            "rouge-score>=0.1.2",
            "torchmetrics",  # SQuAD's scores are held against its
            "trl>=1.9",
            "peft>=0.17",
            "bitsandbytes",
            "megatron-core>=0.16",
            "wandb",
            "mlflow-skinny",
            "cryptography>=42",
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis",
            "ruff",
            "pyright",
            "jaxtyping",
            "beartype",
        ],
    },
    entry_points={"console_scripts": ["safereg=safereg_dist.cli:entry"]},
)
