"""`safereg probe fit | sweep | evaluate | seal`: the probe laboratory."""

import argparse
from pathlib import Path
from typing import Any

from safereg_dist.commands.options import (
    add_action,
    add_json,
    add_local_rank,
    add_quiet,
    at_least,
    example,
)
from safereg_dist.commands.outcome import Outcome, command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its actions and their options."""
    parser.epilog = example(
        "safereg probe fit --model MODEL --data labelled_prompts.jsonl --out runs/probe"
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    fit = add_action(
        actions,
        "fit",
        "fit a probe on labelled prompts, with its threshold",
        shows="safereg probe fit --model MODEL --data labelled_prompts.jsonl --out runs/probe",
    )
    _add_lab_options(fit, kinds=None)
    fit.add_argument(
        "--pooling",
        help="last_prompt_token, mean_prompt or both_prompt, of a response likewise (default: "
        "last_prompt_token, mean_response)",
    )
    fit.add_argument(
        "--self-supervised", action="store_true", help="labels from the model's own refusals"
    )
    sweep = add_action(
        actions,
        "sweep",
        "all layers, kinds and poolings side by side; saves no probe",
        shows="safereg probe sweep --model MODEL --data labelled_prompts.jsonl --out runs/sweep",
    )
    _add_lab_options(sweep, kinds="linear,mlp")
    evaluate = add_action(
        actions,
        "evaluate",
        "a fitted probe on labelled data that it has not seen",
        shows="safereg probe evaluate --probe runs/probe --model MODEL --data unseen.jsonl "
        "--out runs/probe/unseen.json",
    )
    evaluate.add_argument("--probe", type=Path, required=True, metavar="DIR", help="to evaluate")
    _add_inputs(evaluate)
    evaluate.add_argument(
        "--out", type=Path, required=True, metavar="FILE.json", help="figures; curves beside it"
    )
    evaluate.add_argument("--force", action="store_true", help="also a probe of another model")
    add_json(evaluate)
    add_quiet(evaluate)
    seal = add_action(
        actions,
        "seal",
        "accept a probe as it is: its files get a new seal",
        shows="safereg probe seal runs/probe",
    )
    seal.add_argument("folder", type=Path, metavar="DIR", help="the probe, or two of them")


def _add_inputs(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="folder of the model it reads"
    )
    verb.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL or CSV with `prompt` (or `messages`) and `label`: harmful or benign",
    )
    verb.add_argument("--batch-size", type=at_least(1), default=32, help="rows of one forward")


def _add_lab_options(verb: argparse.ArgumentParser, *, kinds: str | None) -> None:
    _add_inputs(verb)
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the results")
    verb.add_argument("--layers", default="all", help="to try: all, or numbers as 1,2,4")
    verb.add_argument(
        "--kind",
        default=kinds,
        help="to try, of linear, mlp, direction, e.g. linear,mlp"
        + ("" if kinds else " (default: linear; with --self-supervised direction)"),
    )
    verb.add_argument(
        "--recall",
        type=float,
        default=0.95,
        help="probability that a new harmful row is flagged, in (0, 1); it sets the threshold",
    )
    verb.add_argument(
        "--calibration",
        choices=("temperature", "isotonic"),
        default="temperature",
        help="how scores become probabilities",
    )
    verb.add_argument(
        "--position",
        choices=("prompt", "response", "both"),
        default="prompt",
        help="what the probe reads; both makes two probes",
    )
    verb.add_argument(
        "--background",
        type=at_least(0),
        default=200,
        help="number of built-in negatives that are no requests; 0 for none",
    )
    verb.add_argument("--background-file", type=Path, metavar="FILE", help="more benign rows")
    verb.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="keep the hidden states here (default: beside --out, removed at the end)",
    )
    verb.add_argument("--seed", type=at_least(0), default=0, help="of splits and fits")
    add_json(verb)
    add_quiet(verb)
    add_local_rank(verb)


def run(arguments: argparse.Namespace) -> Outcome:
    """Fits, sweeps, evaluates or seals."""
    actions = {"fit": _fit, "sweep": _sweep, "evaluate": _evaluate, "seal": _seal}
    return actions[arguments.action](arguments)


def _fit(arguments: argparse.Namespace) -> Outcome:
    from safereg_dist.probe_lab.fit import fit_collected

    options = {"pooling": arguments.pooling, "self_supervised": arguments.self_supervised}
    found = {}
    for collected in _collected(arguments, **options):
        probe = fit_collected(collected).probe
        names = ("position", "layer", "kind", "pooling", "threshold", "fingerprint")
        found[probe.position] = {name: getattr(probe, name) for name in names} | {
            "folder": collected.out,
            **probe.meta,
        }
    if not found:
        return Outcome()
    anchor = arguments.out.parent / f"anchor-{arguments.model.name}.jsonl"
    given = ("--model", arguments.model, "--prompts", arguments.data, "--out", anchor)
    return Outcome(figures={"probes": found}, now=command("anchor", "build", *given))


def _sweep(arguments: argparse.Namespace) -> Outcome:
    from safereg_dist.probe_lab.sweep import sweep_collected

    found = [sweep_collected(collected) for collected in _collected(arguments, every_pooling=True)]
    if not found:
        return Outcome()
    if len(found) > 1:  # each position has its own best
        return Outcome(figures={"sweeps": found})
    best = found[0]["chosen"]
    given = ("--model", arguments.model, "--data", arguments.data, "--layers", best["layer"])
    which = ("--position", arguments.position, "--kind", best["kind"], "--pooling", best["pooling"])
    folder = arguments.out.with_name(f"{arguments.out.name}-best")
    return Outcome(
        figures={"sweeps": found}, now=command("probe", "fit", *given, *which, "--out", folder)
    )


def _evaluate(arguments: argparse.Namespace) -> Outcome:
    from safereg_dist.probe_lab.evaluate import evaluate_probe

    found = evaluate_probe(
        arguments.probe,
        arguments.model,
        arguments.data,
        arguments.out,
        force=arguments.force,
        batch_size=arguments.batch_size,
    )
    return Outcome(figures=found)


def _seal(arguments: argparse.Namespace) -> Outcome:
    """Prints what each probe of the folder holds, which nothing else vouches for, and seals it."""
    from safereg_dist.risk.probe import Probe, probe_folders

    for folder in probe_folders(arguments.folder):
        probe = Probe.load(folder, unsealed=True)
        probe.save(folder)
        print(
            f"sealed {folder}: {probe.kind} on the {probe.position}, layer {probe.layer}, "
            f"{probe.pooling}, threshold {probe.threshold:.4g}, of model {probe.fingerprint[:12]}"
        )
    return Outcome()


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
