"""`safereg plan`: predicts memory, FLOPs, bytes and time of a run."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--model-config", type=Path, required=True, metavar="config.json")
    parser.add_argument("--world-size", type=int, required=True, help="number of GPUs")
    parser.add_argument("--gpu", default="H100-SXM", metavar="NAME", help="default: H100-SXM")
    for name, default in (
        *(("gpus-per-node", 8), ("seq-length", 1024), ("micro-batch", 4), ("grad-accum", 1)),
        *(("hpz-partition-size", 1), ("zero-stage", 3)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    for name in ("tensor-parallel", "pipeline-parallel"):
        parser.add_argument(f"--{name}", type=int, help="default: 1; with megatron proposed")
    parser.add_argument(
        "--rows-per-pass", type=int, help="of the reference; default: --micro-batch"
    )
    parser.add_argument("--head-bytes", type=int, help="of the head's logits; default: its own")
    parser.add_argument(
        "--chunk-tokens", type=int, help="of the head at a time; default: by memory"
    )
    for name, default, what in (
        ("response-share", 0.5, "of a row's tokens"),
        ("risky-fraction", 0.1, "of the rows, anchor rows among them"),
        ("probe-depth", 0.0, "k / L of a reference-side probe; 0 for a column or the policy's"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{what}: {default}")
    for name in ("offload-params", "offload-optimizer", "offload-reference"):
        parser.add_argument(f"--{name}", choices=("none", "cpu"), default="none")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--balance", choices=("none", "deal"), default="none")
    parser.add_argument("--stored-reference", action="store_true", help="`reference.cache`")
    _add_megatron(parser)
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="all numbers")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE.png", help="curves; .svg, .pdf as well"
    )


def _add_megatron(parser: argparse.ArgumentParser) -> None:
    """Options of a Megatron layout, whose pipeline runs --grad-accum micro-batches a step."""
    own = parser.add_argument_group("a Megatron layout (--engine megatron)")
    own.add_argument("--engine", choices=("deepspeed", "megatron"), default="deepspeed")
    own.add_argument("--context-parallel", type=int, help="default: proposed")
    own.add_argument("--virtual-pipeline", type=int, default=1, help="chunks a stage; default: 1")
    own.add_argument("--vocab-multiple", type=int, default=128, help="of the vocabulary: 128")
    for name in ("sequence-parallel", "distributed-optimizer"):
        own.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True)
    own.add_argument(
        "--ends-as-layers", action="store_true", help="embedding and loss count as a layer each"
    )
    own.add_argument(
        "--reference-in-bubble", action="store_true", help="reference forwards in idle slots"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan, and writes it if requested; returns 0."""
    from safereg_dist.plan.settings import Settings
    from safereg_dist.plan.verb import run_plan

    values = {
        name: value
        for name, value in vars(arguments).items()
        if name in Settings.__dataclass_fields__ and value is not None
    }
    values["hpz"] = arguments.hpz_partition_size
    values["arm"] = "stored" if arguments.stored_reference else "routed"
    return run_plan(
        arguments.model_config,
        arguments.gpu,
        values,
        json_path=arguments.json,
        figure_path=arguments.figure,
    )
