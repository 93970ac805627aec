"""The `safereg` command: each verb parses its arguments and calls one function."""

import argparse
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from safereg_dist import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; 0 on success, 2 where the user can mend the cause, 1 otherwise."""
    # Before torch is loaded: on CPUs that are shared with anything else, OpenMP threads that spin
    # while they wait slow training down many times over (see launch/setup_env.sh).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A model that does not fit is our own one-line error, not the library's report above it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = _arguments(argv)
    from safereg_dist import errors

    try:
        return arguments.run(arguments)
    except (errors.SafeRegError, errors.ShapeError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"safereg: {error}", file=sys.stderr, flush=True)
            if isinstance(error, errors.RemoteRankError):
                traceback.print_exc()
        return 2 if errors.is_user_error(error) else 1
    except KeyboardInterrupt:
        return 130


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; exits with status 2 where it does not parse."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse stops collecting key=value at the first option: `train C.yaml --dry-run key=value`.
    if "overrides" in arguments and not any(text.startswith("-") for text in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    parse.__name__ = "int"  # how argparse names the type of what is no number
    return parse


def entry(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `main` as a process of its own and ends it; the status is the process's.

    One of several ranks, or a process with threads of its own (a judge's), ends at once, without
    tearing the interpreter down: threads of gloo or torch that are still alive then have been seen
    to abort a process whose work was done (`terminate called without an active exception`, torch
    2.13), and the launcher to report the run as failed.
    """
    status = main(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or threading.active_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="safereg", description="Safety-regularised fine-tuning of language models."
    )
    # `deepspeed --module safereg_dist VERB ...` puts it before the verb.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"safereg {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_train(verbs)
    _add_probe(verbs)
    _add_anchor(verbs)
    _add_score(verbs)
    _add_audit(verbs)
    _add_reference(verbs)
    _add_eval(verbs)
    _add_report(verbs)
    _add_plan(verbs)
    _add_ledger(verbs)
    _add_config(verbs)
    return parser


def _add_train(verbs: argparse._SubParsersAction) -> None:
    train = verbs.add_parser("train", help="fine-tune with the configuration of a YAML file")
    train.add_argument("config", type=Path)
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100")
    train.add_argument("--dry-run", action="store_true", help="everything but the training")
    train.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from older launchers
    train.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from safereg_dist.launcher import run_training

    return run_training(arguments.config, arguments.overrides, dry_run=arguments.dry_run)


def _add_probe(verbs: argparse._SubParsersAction) -> None:
    probe = verbs.add_parser("probe", help="activation probes").add_subparsers(
        metavar="ACTION", required=True
    )
    fit = probe.add_parser("fit", help="fit a probe on labelled prompts")
    _add_lab_options(fit, kinds=None)
    fit.add_argument("--pooling", help="e.g. last_prompt_token (default) or mean_prompt")
    fit.add_argument(
        "--self-supervised", action="store_true", help="labels from the model's own refusals"
    )
    fit.set_defaults(run=_probe_fit)
    sweep = probe.add_parser("sweep", help="all layers, kinds and poolings; saves no probe")
    _add_lab_options(sweep, kinds="linear,mlp")
    sweep.set_defaults(run=_probe_sweep)
    evaluate = probe.add_parser("evaluate", help="a fitted probe on labelled data")
    evaluate.add_argument("--probe", type=Path, required=True)
    evaluate.add_argument("--model", type=Path, required=True)
    evaluate.add_argument("--data", type=Path, required=True)
    evaluate.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    evaluate.add_argument("--force", action="store_true", help="also a probe of another model")
    evaluate.add_argument("--batch-size", type=_at_least(1), default=32)
    evaluate.set_defaults(run=_probe_evaluate)


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
        "--background", type=_at_least(0), default=200, help="off-distribution negatives"
    )
    verb.add_argument("--background-file", type=Path, metavar="FILE", help="more benign rows")
    verb.add_argument("--work", type=Path, metavar="DIR", help="keep the hidden states here")
    verb.add_argument("--batch-size", type=_at_least(1), default=32)
    verb.add_argument("--seed", type=_at_least(0), default=0)
    verb.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from older launchers


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


def _probe_fit(arguments: argparse.Namespace) -> int:
    from safereg_dist.probe_lab.fit import fit_collected

    options = {"pooling": arguments.pooling, "self_supervised": arguments.self_supervised}
    for collected in _collected(arguments, **options):
        fit_collected(collected)
    return 0


def _probe_sweep(arguments: argparse.Namespace) -> int:
    from safereg_dist.probe_lab.sweep import sweep_collected

    for collected in _collected(arguments, every_pooling=True):
        sweep_collected(collected)
    return 0


def _probe_evaluate(arguments: argparse.Namespace) -> int:
    from safereg_dist.probe_lab.evaluate import evaluate_probe

    evaluate_probe(
        arguments.probe,
        arguments.model,
        arguments.data,
        arguments.out,
        force=arguments.force,
        batch_size=arguments.batch_size,
    )
    return 0


def _add_anchor(verbs: argparse._SubParsersAction) -> None:
    anchor = verbs.add_parser("anchor", help="anchor rows").add_subparsers(
        metavar="ACTION", required=True
    )
    build = anchor.add_parser("build", help="greedy answers of the reference to prompts")
    build.add_argument("--model", type=Path, required=True)
    build.add_argument("--prompts", type=Path, nargs="+", required=True)
    build.add_argument("--out", type=Path, required=True)
    build.add_argument("--max-new-tokens", type=_at_least(1), default=128)
    build.add_argument("--batch-size", type=_at_least(1), default=32)
    build.set_defaults(run=_anchor_build)


def _anchor_build(arguments: argparse.Namespace) -> int:
    from safereg_dist.launcher import run_anchor_build

    return run_anchor_build(
        arguments.model,
        arguments.prompts,
        arguments.out,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )


def _add_score(verbs: argparse._SubParsersAction) -> None:
    score = verbs.add_parser("score", help="the risk of every row of a data set, ahead of time")
    judge = score.add_mutually_exclusive_group(required=True)
    judge.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible server")
    judge.add_argument("--local", metavar="MODEL", help="folder of a classifier or a guard")
    judge.add_argument("--probe", type=Path, metavar="DIR", help="written by `safereg probe fit`")
    score.add_argument("--model", metavar="NAME", help="the judge's name at the endpoint")
    score.add_argument("--format", help="how the judge is asked, e.g. llama_guard")
    score.add_argument("--model-path", type=Path, metavar="M", help="the model the probe reads")
    score.add_argument("--data", type=Path, required=True)
    score.add_argument("--out", type=Path, required=True)
    score.add_argument("--fail", choices=("closed", "open", "stop"), default="closed")
    score.add_argument("--concurrency", type=_at_least(1), default=16)
    score.add_argument("--timeout-s", type=float, default=30.0, help="of one judgement")
    score.add_argument("--cache", metavar="FILE", help="of known scores; `none` for no cache")
    score.set_defaults(run=_score)


def _score(arguments: argparse.Namespace) -> int:
    from safereg_dist.commands.score import score_with_critic, score_with_probe
    from safereg_dist.config import CriticConfig, section_from_dict
    from safereg_dist.errors import ConfigError

    if arguments.probe is not None:
        if arguments.model_path is None:
            raise ConfigError("--probe needs --model-path, the model whose states it reads")
        score_with_probe(arguments.probe, arguments.model_path, arguments.data, arguments.out)
        return 0
    same = "endpoint model format local fail concurrency timeout_s cache".split()
    given = {name: getattr(arguments, name) for name in same}
    settings = section_from_dict(CriticConfig, given, "risk.critic")
    score_with_critic(settings, arguments.data, arguments.out)
    return 0


def _add_audit(verbs: argparse._SubParsersAction) -> None:
    audit = verbs.add_parser("audit", help="what a run would hold back, before any training")
    audit.add_argument("config", type=Path)
    audit.add_argument("overrides", nargs="*", metavar="key=value")
    audit.add_argument("--out", type=Path, help="folder of the report; default: OUTPUT_DIR.audit")
    audit.add_argument("--show-text", action="store_true", help="print prompts of listed rows")
    audit.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    audit.set_defaults(run=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    from safereg_dist.launcher import run_audit

    return run_audit(
        arguments.config,
        arguments.overrides,
        out=arguments.out,
        show_text=arguments.show_text,
    )


def _add_reference(verbs: argparse._SubParsersAction) -> None:
    reference = verbs.add_parser("reference", help="stored states of the reference").add_subparsers(
        metavar="ACTION", required=True
    )
    build = reference.add_parser("build", help="run the reference once, on all rows that need it")
    build.add_argument("config", type=Path)
    build.add_argument("overrides", nargs="*", metavar="key=value")
    build.add_argument("--out", type=Path, required=True, metavar="DIR")
    build.set_defaults(run=_reference_build)


def _reference_build(arguments: argparse.Namespace) -> int:
    from safereg_dist.launcher import run_reference_build

    return run_reference_build(arguments.config, arguments.overrides, out=arguments.out)


def _add_eval(verbs: argparse._SubParsersAction) -> None:
    evaluate = verbs.add_parser("eval", help="attack success, over-refusal and task accuracy")
    evaluate.add_argument("--model", type=Path, required=True)
    evaluate.add_argument("--prompts", type=Path, nargs="+", required=True)
    evaluate.add_argument("--judge", default="keyword")
    evaluate.add_argument("--out", type=Path, required=True)
    evaluate.add_argument("--refusal", help="text whose first token P(refuse) is measured on")
    evaluate.add_argument("--max-new-tokens", type=_at_least(1), default=64)
    evaluate.add_argument("--batch-size", type=_at_least(1), default=32)
    evaluate.add_argument("--save-answers", action="store_true")
    evaluate.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from safereg_dist.evaluate.evaluate import evaluate_model

    evaluate_model(
        arguments.model,
        arguments.prompts,
        judge=arguments.judge,
        out=arguments.out,
        refusal=arguments.refusal,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        save_answers=arguments.save_answers,
    )
    return 0


def _add_report(verbs: argparse._SubParsersAction) -> None:
    report = verbs.add_parser("report", help="HTML and figures of one or several runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    report.add_argument("--out", type=Path, help="folder of the report; default: the first run")
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from safereg_dist.evaluate.report import write_report

    print(f"report: {write_report(arguments.runs, out=arguments.out)}")
    return 0


def _add_plan(verbs: argparse._SubParsersAction) -> None:
    plan = verbs.add_parser("plan", help="memory, FLOPs, bytes and time before you pay for them")
    plan.add_argument("--model-config", type=Path, required=True, metavar="config.json")
    plan.add_argument("--world-size", type=int, required=True, help="number of GPUs")
    plan.add_argument("--gpu", default="H100-SXM", metavar="NAME", help="default: H100-SXM")
    for name, default in (
        *(("gpus-per-node", 8), ("seq-length", 1024), ("micro-batch", 4), ("grad-accum", 1)),
        *(("hpz-partition-size", 1), ("tensor-parallel", 1), ("pipeline-parallel", 1)),
        ("zero-stage", 3),
    ):
        plan.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    plan.add_argument("--rows-per-pass", type=int, help="of the reference; default: --micro-batch")
    plan.add_argument("--head-bytes", type=int, help="of the head's logits; default: its own")
    plan.add_argument("--chunk-tokens", type=int, help="of the head at a time; default: by memory")
    for name, default, what in (
        ("response-share", 0.5, "of a row's tokens"),
        ("risky-fraction", 0.1, "of the rows, anchor rows among them"),
        ("probe-depth", 0.0, "k / L of a reference-side probe; 0 for a column or the policy's"),
    ):
        plan.add_argument(f"--{name}", type=float, default=default, help=f"{what}: {default}")
    for name in ("offload-params", "offload-optimizer", "offload-reference"):
        plan.add_argument(f"--{name}", choices=("none", "cpu"), default="none")
    plan.add_argument("--activation-checkpointing", action="store_true")
    plan.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    plan.add_argument("--balance", choices=("none", "deal"), default="none")
    plan.add_argument("--stored-reference", action="store_true", help="`reference.cache`")
    plan.add_argument("--json", type=Path, metavar="FILE.json", help="all numbers")
    plan.add_argument("--figure", type=Path, metavar="FILE.png", help="curves; .svg, .pdf as well")
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from safereg_dist.plan.settings import Settings
    from safereg_dist.plan.verb import run_plan

    same = {
        name: value
        for name, value in vars(arguments).items()
        if name in Settings.__dataclass_fields__
    }
    settings = Settings(
        hpz=arguments.hpz_partition_size,
        arm="stored" if arguments.stored_reference else "routed",
        **same,
    )
    return run_plan(
        arguments.model_config,
        arguments.gpu,
        settings,
        json_path=arguments.json,
        figure_path=arguments.figure,
    )


def _add_ledger(verbs: argparse._SubParsersAction) -> None:
    ledger = verbs.add_parser("ledger", help="the log of every row's risk").add_subparsers(
        metavar="ACTION", required=True
    )
    verify = ledger.add_parser("verify", help="recompute the chain of hashes")
    verify.add_argument("run_dir", type=Path)
    verify.set_defaults(run=_ledger_verify)


def _ledger_verify(arguments: argparse.Namespace) -> int:
    from safereg_dist.run.ledger import verify_ledger

    head = verify_ledger(arguments.run_dir)
    print(f"ledger holds: {head.rows} rows, head {head.head}")
    return 0


def _add_config(verbs: argparse._SubParsersAction) -> None:
    from safereg_dist.commands import config

    parser = verbs.add_parser("config", help="JSON schema, a starter file, one key explained")
    config.add_arguments(parser)
    parser.set_defaults(run=config.run)


if __name__ == "__main__":
    entry()
