"""Packaging of safereg-dist; `kernels/` is a package of its own (see CONTRIBUTING.md)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "safereg_dist/__init__.py").read_text(), re.M)
EXTRAS = {
    # `safereg train` and all that runs a model on rows.
    "train": [
        "deepspeed>=0.19",
        "accelerate>=1.1",  # transformers builds models under zero.Init only where it is installed
        "datasets>=4.0",
        "scikit-learn>=1.5",
        "scipy",
        "datasketch>=1.6",
        "tensorboard",
        "ninja",
    ],
    "trl": ["safereg-dist[train]", "trl>=1.9"],
    "peft": ["safereg-dist[train]", "peft>=0.17"],
    "megatron": ["safereg-dist[train]", "megatron-core>=0.16"],
    "wandb": ["wandb>=0.19.10"],
    "mlflow": ["mlflow-skinny>=3"],
    "sign": ["cryptography>=42"],
    "gguf": ["gguf>=0.10"],
    "real": ["safereg-dist[train]", "gguf>=0.10"],  # `python -m safereg_dist.demo --real`
    "eval": ["rouge-score>=0.1.2"],
    "lm-eval": ["safereg-dist[train]", "lm-eval>=0.4.9"],
    "completion": ["shtab>=1.7"],
    "docs": ["sphinx>=8", "myst-parser>=4", "furo"],
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
        "pypdf>=6",  # reads the printed report back
        "pytest>=8",
        "pytest-xdist>=3",
        "hypothesis",
        "ruff",
        "pyright",
        "jaxtyping",
        "beartype",
        "setuptools>=77",
        "shtab>=1.7",
        "kubeflow-trainer-api>=2.3",  # the Kubernetes objects are held against its types
        "sphinx>=8",
        "myst-parser>=4",
        "furo",
    ],
}

setup(
    name="safereg-dist",
    version=VERSION[1],
    description="Risk-adaptive safety regularisation for fine-tuning language models at scale",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=["Typing :: Typed"],
    python_requires=">=3.11",
    packages=find_packages(include=["safereg_dist*"]),
    package_data={
        "safereg_dist": ["py.typed"],
        "safereg_dist.demo": ["demo.yaml"],
        "safereg_dist.demo.real": ["real.yaml", "prompts/*"],
        "safereg_dist.evaluate.report": ["templates/*"],
    },
    # Planner, ledger, report, watch, score client, configuration, doctor. torch and transformers
    # are the planner's: it builds the model, without weights, to count it.
    install_requires=[
        "safereg-kernels>=0.2",  # ./kernels
        "torch>=2.11",
        "transformers>=5.17",
        "safetensors>=0.5",
        "numpy",
        "httpx>=0.27",
        "jinja2>=3.1",
        "pydantic>=2.7",  # the sentence under a field is its description
        "pyyaml",
        "tqdm",
        "rich>=13",
        "matplotlib",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["safereg=safereg_dist.cli:entry"]},
)
