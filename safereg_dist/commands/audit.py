"""`safereg audit`: what a run would hold back, and why, before any training."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safereg_dist.commands.options import add_config, add_json, add_quiet, example
from safereg_dist.commands.outcome import Outcome, command, training_verb
from safereg_dist.config import load_config
from safereg_dist.errors import ConfigError
from safereg_dist.screen.progress import say

if TYPE_CHECKING:
    from safereg_dist.factory import RiskContext
    from safereg_dist.run.gate import RowRisk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.epilog = example("safereg audit run.yaml data.declared_poison=0.05 --show-text")
    add_config(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of the report (default: OUTPUT_DIR.audit)"
    )
    parser.add_argument("--show-text", action="store_true", help="print prompts of listed rows")
    add_json(parser)
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Computes the risk of the training rows as the configuration says, and reports it."""
    config = load_config(arguments.config, arguments.overrides)
    folder = Path(f"{config.output_dir}.audit") if arguments.out is None else arguments.out
    if not config.needs_risk:
        raise ConfigError(
            f"regularizer.objective={config.regularizer.objective} asks for no risk: there is "
            "nothing to audit; use convex or additive"
        )
    say("audit: loads the libraries")  # the configuration, above, is read without them
    from safereg_dist.evaluate.audit import AuditFacts, print_audit, write_audit, write_part
    from safereg_dist.factory import build_risk_context, start_backend
    from safereg_dist.parallel.distributed import leave_group, share_cores

    share_cores()
    backend = start_backend(config)
    ranks, outcome = backend.ranks, Outcome()
    try:
        say("audit: reads the rows, and the model where the risk needs it")
        context = build_risk_context(config, backend)
        say(f"audit: computes the risk of {context.sources.stream.most_rows} rows")
        rows = _own_risks(context)
        with ranks.together():
            write_part(folder, ranks.rank, rows, context.threshold)
        with ranks.together():
            if ranks.is_main:
                assert context.sources.train is not None  # rows are not streamed here
                facts = AuditFacts(
                    config=config,
                    threshold=context.threshold,
                    prompts=context.sources.train.prompts(),
                    benign_share=context.risk.benign_share(context.threshold),
                    positions=context.risk.positions,
                    probed_share=context.probed_share,
                    reads_answers=context.reads_answers,
                    ceilings=context.ceilings,
                )
                report = write_audit(folder, ranks.world_size, facts)
                print_audit(report, facts, folder, show_text=arguments.show_text)
                verb = training_verb(config.engine.name)
                outcome = Outcome(figures=report, now=_next(arguments, report, verb))
    finally:
        leave_group()
    return outcome


def _next(arguments: argparse.Namespace, report: dict[str, Any], verb: str) -> str:
    """The training `verb`; where it would refuse to start, the rows to look at, with their text.

    Settings of a Trainer, which name neither model nor rows, are trained by a script of its own.
    """
    same = (arguments.config, *arguments.overrides)
    if not report["training_would_start"]:
        return "" if arguments.show_text else command("audit", *same, "--show-text")
    named = {override.partition("=")[0] for override in arguments.overrides}
    return "" if named >= {"model", "data.train"} else command(verb, *same)


def _own_risks(context: "RiskContext") -> "list[RowRisk]":
    """The risk of all of this rank's rows; a collective, so it is done before anything can fail."""
    from safereg_dist.run.gate import row_risks

    stream = context.sources.stream
    count = stream.most_rows
    context.risk.prefetch(row for row in stream.first_rows(count) if row is not None)
    found = row_risks(
        stream,
        context.risk,
        count=count,
        micro_batch_size=context.config.train.micro_batch_size,
        filler=context.sources.filler,
        ranks=context.ranks,
    )
    return list(found)
