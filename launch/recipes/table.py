"""The table of README.md, planned from the recipes and `hardware.yaml`; no GPU, no download.

python launch/recipes/table.py          rewrites the table
python launch/recipes/table.py --check  fails where it is not what the recipes give
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from safereg_dist.config import Config, load_config
from safereg_dist.models.adapters import adapter_parameters, add_adapters
from safereg_dist.parallel.hardware import find_gpu
from safereg_dist.plan.named_shapes import NAMED_SHAPES
from safereg_dist.plan.plan import Plan, make_plan
from safereg_dist.plan.settings import settings_of
from safereg_dist.plan.shape import read_shape

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- table.py: -->", "<!-- end -->"
GIB = 2**30
ASSUMED = {"risky_fraction": 0.1, "response_share": 0.5, "probe_depth": 0.5}
"""Of the data's rows that are held back; tokens trained on; layers under the probe."""


def main() -> int:
    """Writes or checks; 1 where the README is not current."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = HERE / "README.md"
    text = readme.read_text("utf-8")
    before, rest = text.split(BEGIN)
    current = f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}"
    if check and current != text:
        print(f"{readme} is not current: python launch/recipes/table.py", file=sys.stderr)
        return 1
    if not check:
        readme.write_text(current, "utf-8")
    return 0


def table() -> str:
    """The rows of all recipes, in Markdown."""
    columns = (
        *("recipe", "parameters", "hardware", "GiB a GPU", "of SFT", "GB moved a GPU and step"),
        *("FLOPs", "bytes", "time", "LoRA trains"),
    )
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, known in hardware().items():
        plan = plan_of(name, load_config(HERE / f"{name}.yaml"))
        over = plan.overhead("routed")
        cells = (
            f"`{name}`",
            f"{plan.shape.parameters / 1e9:.2f} B",
            f"{known['gpus']} x {plan.gpu.name}",
            f"{plan.chosen.memory.gpu / GIB:.0f}",
            f"{plan.arms['sft'].memory.gpu / GIB:.0f}",
            f"{plan.chosen.total_bytes / 1e9:.0f}",
            *(f"+{over[what]:.1%}" for what in ("flops", "bytes", "seconds")),
            f"{lora_parameters(name) / 1e6:.0f} M",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def hardware() -> dict[str, dict[str, Any]]:
    """Recipe -> GPU and their number."""
    return yaml.safe_load((HERE / "hardware.yaml").read_text("utf-8"))


def plan_of(name: str, config: Config) -> Plan:
    """What `safereg plan` says of a recipe on its hardware."""
    known = hardware()[name]
    settings = settings_of(config, world_size=known["gpus"], **ASSUMED)
    return make_plan(read_shape(name), settings, find_gpu(known["gpu"]))


def meta_model(name: str) -> Any:
    """The recipe's model without weights."""
    fields = dict(NAMED_SHAPES[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=False
        )


def lora_parameters(name: str) -> int:
    """Parameters that the recipe trains with `lora.txt`."""
    model = meta_model(name)
    with torch.device("meta"):
        add_adapters(model, with_overrides(name, "lora").lora)
    return sum(parameter.numel() for _, parameter in adapter_parameters(model))


def with_overrides(name: str, file: str) -> Config:
    """A recipe with the overrides of `lora.txt` or `paper.txt`."""
    words = (HERE / f"{file}.txt").read_text("utf-8").split()
    return load_config(HERE / f"{name}.yaml", words)


if __name__ == "__main__":
    sys.exit(main())
