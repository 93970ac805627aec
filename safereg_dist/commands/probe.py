"""`safereg probe fit | sweep | evaluate | seal`: the probe laboratory."""

import argparse
from pathlib import Path
from typing import Any

from safereg_dist.commands.options import add_local_rank, at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its actions and their options."""
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    fit = actions.add_parser("fit", help="fit a probe on labelled prompts")
    _add_lab_options(fit, kinds=None)
    fit.add_argument("--pooling", help="last_prompt_token (default), mean_prompt or both_prompt")
    fit.add_argument(
        "--self-supervised", action="store_true", help="labels from the model's own refusals"
    )
    sweep = actions.add_parser("sweep", help="all layers, kinds and poolings; saves no probe")
    _add_lab_options(sweep, kinds="linear,mlp")
    evaluate = actions.add_parser("evaluate", help="a fitted probe on labelled data")
    evaluate.add_argument("--probe", type=Path, required=True)
    evaluate.add_argument("--model", type=Path, required=True)
    evaluate.add_argument("--data", type=Path, required=True)
    evaluate.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    evaluate.add_argument("--force", action="store_true", help="also a probe of another model")
    evaluate.add_argument("--batch-size", type=at_least(1), default=32)
    seal = actions.add_parser("seal", help="accept a probe as it is: its files get a new seal")
    seal.add_argument("folder", type=Path)


def _add_lab_options(verb: argparse.ArgumentParser, *, kinds: str | None) -> None:
    verb.add_argument("--model", type=Path, required=True)
    verb.add_argument("--data", type=Path, required=True, help="JSONL with prompt and label")
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--layers", default="all", help="all, or numbers as 1,2,4")
    verb.add_argument("--kind", default=kinds, help="of linear, mlp, direction, e.g. linear,mlp")
    verb.add_argument("--recall", type=float, default=0.95)
    verb.add_argument("--calibration", choices=("temperature", "isotonic"), default="temperature")
    verb.add_argument("--position", choices=("prompt", "response", "both"), default="prompt")
    verb.add_argument(
        "--background", type=at_least(0), default=200, help="off-distribution negatives"
    )
    verb.add_argument("--background-file", type=Path, metavar="FILE", help="more benign rows")
    verb.add_argument("--work", type=Path, metavar="DIR", help="keep the hidden states here")
    verb.add_argument("--batch-size", type=at_least(1), default=32)
    verb.add_argument("--seed", type=at_least(0), default=0)
    add_local_rank(verb)


def run(arguments: argparse.Namespace) -> int:
    """Fits, sweeps, evaluates or seals; 0."""
    actions = {"fit": _fit, "sweep": _sweep, "evaluate": _evaluate, "seal": _seal}
    actions[arguments.action](arguments)
    return 0


def _fit(arguments: argparse.Namespace) -> None:
    from safereg_dist.probe_lab.fit import fit_collected

    options = {"pooling": arguments.pooling, "self_supervised": arguments.self_supervised}
    for collected in _collected(arguments, **options):
        fit_collected(collected)


def _sweep(arguments: argparse.Namespace) -> None:
    from safereg_dist.probe_lab.sweep import sweep_collected

    for collected in _collected(arguments, every_pooling=True):
        sweep_collected(collected)


def _evaluate(arguments: argparse.Namespace) -> None:
    from safereg_dist.probe_lab.evaluate import evaluate_probe

    evaluate_probe(
        arguments.probe,
        arguments.model,
        arguments.data,
        arguments.out,
        force=arguments.force,
        batch_size=arguments.batch_size,
    )


def _seal(arguments: argparse.Namespace) -> None:
    """Prints what each probe of the folder holds, which nothing else vouches for, and seals it."""
    from safereg_dist.risk.probe import Probe, probe_folders

    for folder in probe_folders(arguments.folder):
        probe = Probe.load(folder, unsealed=True)
        probe.save(folder)
        print(
            f"sealed {folder}: {probe.kind} on the {probe.position}, layer {probe.layer}, "
            f"{probe.pooling}, threshold {probe.threshold:.4g}, of model {probe.fingerprint[:12]}"
        )


def _collected(arguments: argparse.Namespace, **options: Any) -> list[Any]:
    """The states of each position, collected by all ranks; an empty list on all but the first."""
    from safereg_dist.errors import ConfigError
    from safereg_dist.parallel.distributed import distributed_ranks
    from safereg_dist.probe_lab.job import collect
    from safereg_dist.probe_lab.options import LabOptions

    layers = None
    if arguments.layers != "all":
        try:
            layers = [int(layer) for layer in arguments.layers.split(",")]
        except ValueError as err:
            raise ConfigError(
                f"--layers must be `all` or numbers as 1,2,4, got {arguments.layers!r}"
            ) from err
    both = ("prompt", "response")
    positions = both if arguments.position == "both" else (arguments.position,)
    same = ("recall", "calibration", "background", "background_file", "work", "batch_size", "seed")
    chosen = LabOptions(
        layers=layers,
        position=positions[0],
        kinds=None if arguments.kind is None else tuple(arguments.kind.split(",")),
        **{name: getattr(arguments, name) for name in same},
        **options,
    )
    with distributed_ranks() as ranks:
        return collect(
            arguments.model, arguments.data, arguments.out, positions, chosen, ranks=ranks
        )
