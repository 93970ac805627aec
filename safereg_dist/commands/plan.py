"""`safereg plan`: predicts memory, FLOPs, bytes and time of a run."""

import argparse
from pathlib import Path

from safereg_dist.commands.options import add_json, example
from safereg_dist.commands.outcome import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example(
        "safereg plan --model-config MODEL/config.json --world-size 16 --micro-batch 2"
    )
    parser.add_argument(
        "--model-config",
        type=Path,
        required=True,
        metavar="FILE",
        help="config.json of the model's folder; no weights are read",
    )
    parser.add_argument("--world-size", type=int, required=True, help="number of GPUs")
    parser.add_argument(
        "--gpu", default="H100-SXM", metavar="NAME", help="their model; a wrong one lists all"
    )
    for name, default, what in (
        ("gpus-per-node", 8, "GPUs of a host"),
        ("seq-length", 1024, "tokens of a row"),
        ("micro-batch", 4, "rows per GPU and forward"),
        ("grad-accum", 1, "micro-batches of a step"),
        ("hpz-partition-size", 1, "ranks among which ZeRO++ keeps a second copy of the shards"),
        ("zero-stage", 3, "DeepSpeed's; 3 in this version"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    for name, what in (("tensor", "a layer"), ("pipeline", "the layers")):
        parser.add_argument(
            f"--{name}-parallel",
            type=int,
            help=f"GPUs that share {what} (default: 1; with --engine megatron proposed)",
        )
    parser.add_argument(
        "--rows-per-pass", type=int, help="rows of a reference forward (default: --micro-batch)"
    )
    parser.add_argument(
        "--head-bytes",
        type=int,
        help="bytes of the head's logits held at a time (default: what training takes)",
    )
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        help="tokens whose logits are formed at a time (default: as memory allows)",
    )
    for name, default, what in (
        ("response-share", 0.5, "share of a row's tokens that is trained on, in [0, 1]"),
        (
            "risky-fraction",
            0.1,
            "share of rows that is risky, anchor rows among them, in [0, 1]",
        ),
        ("probe-depth", 0.0, "k / L of a probe on the reference, in [0, 1]; 0 for a column"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=what)
    for name, what in (
        ("params", "where parameters rest"),
        ("optimizer", "where the optimizer's states rest"),
        ("reference", "where the reference rests"),
    ):
        parser.add_argument(f"--offload-{name}", choices=("none", "cpu"), default="none", help=what)
    parser.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="recompute the layers in the backward pass",
    )
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="of parameters and products"
    )
    parser.add_argument(
        "--balance",
        choices=("none", "deal"),
        default="none",
        help="how risky rows fall on ranks: by chance, or dealt evenly",
    )
    parser.add_argument(
        "--stored-reference", action="store_true", help="states from `safereg reference build`"
    )
    _add_megatron(parser)
    add_json(parser)
    parser.add_argument(
        "--figure", type=Path, metavar="FILE.png", help="draw the curves; .svg, .pdf as well"
    )


def _add_megatron(parser: argparse.ArgumentParser) -> None:
    """Options of a Megatron layout, whose pipeline runs --grad-accum micro-batches a step."""
    own = parser.add_argument_group("a Megatron layout (--engine megatron)")
    own.add_argument(
        "--engine", choices=("deepspeed", "megatron"), default="deepspeed", help="what trains"
    )
    own.add_argument(
        "--context-parallel", type=int, help="GPUs that share a row (default: proposed)"
    )
    own.add_argument("--virtual-pipeline", type=int, default=1, help="chunks of layers a stage")
    own.add_argument(
        "--vocab-multiple", type=int, default=128, help="the vocabulary is padded to a multiple"
    )
    for name, what in (
        ("sequence-parallel", "share activations between tensor-parallel GPUs"),
        ("distributed-optimizer", "share the optimizer's states between data-parallel GPUs"),
    ):
        own.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=what
        )
    own.add_argument(
        "--ends-as-layers", action="store_true", help="embedding and loss count as a layer each"
    )
    own.add_argument(
        "--reference-in-bubble", action="store_true", help="reference forwards in idle slots"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Prints the plan, and draws it if requested."""
    from safereg_dist.plan.settings import Settings
    from safereg_dist.plan.verb import run_plan

    values = {
        name: value
        for name, value in vars(arguments).items()
        if name in Settings.__dataclass_fields__ and value is not None
    }
    values["hpz"] = arguments.hpz_partition_size
    values["arm"] = "stored" if arguments.stored_reference else "routed"
    numbers = run_plan(arguments.model_config, arguments.gpu, values, figure_path=arguments.figure)
    return Outcome(figures=numbers)
