"""`safereg plan`: predicts memory, FLOPs, bytes and time of a run."""

import argparse
from dataclasses import replace
from pathlib import Path

from safereg_dist.commands.options import add_config, add_json, add_quiet, at_least, example
from safereg_dist.commands.outcome import Outcome
from safereg_dist.errors import ConfigError
from safereg_dist.parallel.hardware import MFU, Gpu, find_gpu
from safereg_dist.plan.settings import Settings, default_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example(
        "safereg plan run.yaml --world-size 16",
        "safereg plan --model-config llama-3.1-70b --world-size 16 --rows-per-step 64",
    )
    add_config(parser, required=False)
    parser.add_argument("--world-size", type=int, required=True, help="number of GPUs")
    parser.add_argument(
        "--model-config",
        metavar="FILE",
        help="config.json, or a name as llama-3.1-70b; no weights are read (default: that of the "
        "configuration's model)",
    )
    _add_hardware(parser)
    _add_batch(parser)
    _add_head(parser)
    _add_risk(parser)
    _add_memory(parser)
    _add_megatron(parser)
    add_json(parser)
    add_quiet(parser)
    parser.add_argument(
        "--figure", type=Path, metavar="FILE.png", help="draw the curves; .svg, .pdf as well"
    )


def _add_batch(parser: argparse.ArgumentParser) -> None:
    """Rows and tokens of a step, and how the ranks share model and rows."""
    for name, what in (
        ("seq-length", "tokens of a row"),
        ("micro-batch", "rows per GPU and forward"),
        ("grad-accum", "micro-batches of a step"),
        ("zero-stage", "DeepSpeed's; 3 in this version"),
    ):
        parser.add_argument(f"--{name}", type=int, help=_of_config(name, what))
    parser.add_argument(
        "--hpz-partition-size",
        dest="hpz",
        metavar="N",
        type=int,
        help=_of_config("hpz", "ranks among which ZeRO++ keeps a second copy of the shards"),
    )
    parser.add_argument(
        "--rows-per-step", type=int, help="rows of a step on all GPUs, in place of --grad-accum"
    )
    parser.add_argument(
        "--lora-rank",
        type=int,
        help="rank of adapters, the reference being the model with them off; 0 trains all weights "
        "(default: the configuration's, else 0)",
    )


def _add_head(parser: argparse.ArgumentParser) -> None:
    """How much of the reference and the head is computed at a time."""
    parser.add_argument(
        "--rows-per-pass",
        type=int,
        help="rows of a reference forward (default: the configuration's, else --micro-batch)",
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


def _add_risk(parser: argparse.ArgumentParser) -> None:
    """What of the rows is trained on and risky, and how risk and reference come about."""
    for name, default, what in (
        ("response-share", 0.5, "share of a row's tokens that is trained on, in [0, 1]"),
        (
            "risky-fraction",
            0.1,
            "share of the data's rows that is risky, in [0, 1]; the configuration's anchor rows "
            "come on top",
        ),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=what)
    parser.add_argument(
        "--probe-depth",
        type=float,
        help="share of the layers that a probe on the reference reads, in [0, 1]; 0 for a column "
        "(default: that of the configuration's probe, else 0)",
    )
    parser.add_argument(
        "--balance",
        choices=("none", "deal"),
        help="how risky rows fall on ranks: by chance, or dealt evenly (default: as training does: "
        "dealt with a risk column, which is assumed where --probe-depth is 0)",
    )
    parser.add_argument(
        "--stored-reference",
        action=argparse.BooleanOptionalAction,
        help="states from `safereg reference build`, and their price (default: the "
        "configuration's, else no)",
    )
    parser.add_argument(
        "--data-rows",
        type=at_least(1),
        help="rows of the data set, for a run's hours and a stored reference's price (default: "
        "those of the configuration's JSONL, else 100000)",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """Where states rest, and in which precision."""
    for name, what in (
        ("params", "where parameters rest"),
        ("optimizer", "where the optimizer's states rest"),
        ("reference", "where the reference rests"),
    ):
        parser.add_argument(
            f"--offload-{name}",
            choices=("none", "cpu"),
            help=_of_config(f"offload-{name}", what),
        )
    parser.add_argument(
        "--activation-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute the layers in the backward pass (default: the configuration's, else no)",
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help=_of_config("precision", "of parameters and products"),
    )


def _of_config(name: str, what: str) -> str:
    default = default_of(name.replace("-", "_"))
    return f"{what} (default: the configuration's, else {default})"


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", default="H100-SXM", metavar="NAME", help="their model; a wrong one lists all"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a host")
    for name, what in (
        ("link-gbps", "network of a host, all its ports together, Gbit/s"),
        ("nvlink-gbps", "a GPU's links to the others of its host, one direction, Gbit/s"),
    ):
        parser.add_argument(f"--{name}", type=float, help=f"{what} (default: usual for --gpu)")
    parser.add_argument(
        "--mfu",
        type=float,
        default=MFU,
        help="share of the GPU's peak that products reach, in (0, 1]",
    )


def _add_megatron(parser: argparse.ArgumentParser) -> None:
    """Options of a Megatron layout, whose pipeline runs --grad-accum micro-batches a step."""
    own = parser.add_argument_group("a Megatron layout (--engine megatron)")
    own.add_argument(
        "--engine", choices=("deepspeed", "megatron"), default="deepspeed", help="what trains"
    )
    for name, what in (("tensor", "a layer"), ("pipeline", "the layers"), ("context", "a row")):
        own.add_argument(
            f"--{name}-parallel", type=int, help=f"GPUs that share {what} (default: proposed)"
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
    from safereg_dist.config import load_config
    from safereg_dist.plan.verb import Asked, run_plan

    values = {
        name: value
        for name, value in vars(arguments).items()
        if name in Settings.__dataclass_fields__ and value is not None
    }
    if arguments.stored_reference is not None:
        values["arm"] = "stored" if arguments.stored_reference else "routed"
    path = arguments.config
    asked = Asked(
        gpu=_gpu(arguments),
        values=values,
        config=None if path is None else load_config(path, arguments.overrides),
        model=arguments.model_config,
        rows_per_step=arguments.rows_per_step,
        data_rows=arguments.data_rows,
        figure=arguments.figure,
    )
    return Outcome(figures=run_plan(asked))


def _gpu(arguments: argparse.Namespace) -> Gpu:
    """The GPU, with the rates of its links that are given."""
    links = {
        "network_bytes_per_s": ("--link-gbps", arguments.link_gbps, arguments.gpus_per_node),
        "node_bytes_per_s": ("--nvlink-gbps", arguments.nvlink_gbps, 1),
    }
    given = {}
    for name, (option, gbps, sharers) in links.items():
        if gbps is not None and gbps <= 0:
            raise ConfigError(f"{option} must be above 0 Gbit/s, got {gbps}")
        if gbps is not None:
            given[name] = gbps * 1.25e8 / max(sharers, 1)
    return replace(find_gpu(arguments.gpu), **given)
