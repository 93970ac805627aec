"""Verbs that run on one or many ranks: what a process does between its start and its exit."""

from collections.abc import Sequence
from pathlib import Path

from safereg_dist.config import load_config, replace
from safereg_dist.errors import ConfigError
from safereg_dist.factory import RiskContext, build_risk_context, build_run, start_backend
from safereg_dist.parallel.distributed import distributed_ranks, leave_group, share_cores
from safereg_dist.run.gate import RowRisk, refuse_too_many_held_back, row_risks
from safereg_dist.trainer import describe_run, is_complete, train


def run_training(config_file: Path, overrides: Sequence[str], *, dry_run: bool) -> int:
    """Trains as the configuration says, on the ranks of the launcher; the exit status.

    With `dry_run` everything is loaded and checked, but no step is made and nothing is written.
    """
    share_cores()
    config = load_config(config_file, overrides)
    backend = start_backend(config)
    ranks = backend.ranks
    try:
        if is_complete(config, ranks) and not dry_run:
            if ranks.is_main:
                print(f"{config.output_dir} is already complete: nothing to do")
            return 0
        run = build_run(config, backend)
        if ranks.is_main:
            _print_plan(run)
        if dry_run:
            refuse_too_many_held_back(run)
            return 0
        status = train(run)
        if ranks.is_main and status == 0:
            from safereg_dist.evaluate.report import write_report

            print(f"report: {write_report([Path(config.output_dir)])}")
        return status
    finally:
        leave_group()


def run_audit(
    config_file: Path, overrides: Sequence[str], *, out: Path | None, show_text: bool
) -> int:
    """Screens the training rows as the configuration says; 0. See `audit` for what it writes."""
    from safereg_dist.commands.audit import AuditFacts, print_audit, write_audit, write_part

    share_cores()
    config = load_config(config_file, overrides)
    folder = Path(f"{config.output_dir}.audit") if out is None else out
    if not config.needs_risk:
        raise ConfigError(
            f"regularizer.objective={config.regularizer.objective} asks for no risk: there is "
            "nothing to audit; use convex or additive"
        )
    backend = start_backend(config)
    ranks = backend.ranks
    try:
        screening = build_risk_context(config, backend)
        rows = _screened(screening)
        with ranks.together():
            write_part(folder, ranks.rank, rows, screening.threshold)
        with ranks.together():
            if ranks.is_main:
                facts = AuditFacts(
                    config=config,
                    threshold=screening.threshold,
                    prompts=screening.sources.train.prompts(),
                    probed_share=screening.probed_share,
                    ceilings=screening.ceilings,
                )
                report = write_audit(folder, ranks.world_size, facts)
                print_audit(report, facts, folder, show_text=show_text)
    finally:
        leave_group()
    return 0


def _screened(screening: RiskContext) -> list[RowRisk]:
    """The risk of all of this rank's rows; a collective, so it is done before anything can fail."""
    stream, risk, config = screening.sources.stream, screening.risk, screening.config
    count = stream.most_rows
    risk.prefetch(row for row in stream.first_rows(count) if row is not None)
    screened = row_risks(
        stream,
        risk,
        count=count,
        micro_batch_size=config.train.micro_batch_size,
        pad_id=screening.pad_id,
        ranks=screening.ranks,
    )
    return list(screened)


def run_anchor_build(
    model: Path, prompts: Sequence[Path], out: Path, *, max_new_tokens: int, batch_size: int
) -> int:
    """Greedy answers of the reference, sharded over the ranks of the launcher; the exit status."""
    from safereg_dist.commands.anchor import build_anchors, merge_anchor_parts

    with distributed_ranks() as ranks:
        with ranks.together():
            build_anchors(
                model,
                list(prompts),
                out,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                rank=ranks.rank,
                world_size=ranks.world_size,
                progress=ranks.is_main,
                device=ranks.device,
            )
        with ranks.together():
            if ranks.world_size > 1 and ranks.is_main:
                merge_anchor_parts(out, ranks.world_size)
    return 0


def run_reference_build(config_file: Path, overrides: Sequence[str], *, out: Path) -> int:
    """Writes the reference's states of the rows that a run will ask it for; 0.

    See `reference_build`.
    """
    from safereg_dist.commands.reference import build_store
    from safereg_dist.reference.store_writer import require_absent

    share_cores()
    config = load_config(config_file, overrides)
    if not config.needs_reference:
        raise ConfigError(
            f"regularizer.objective={config.regularizer.objective} runs no reference: there is "
            "nothing to store"
        )
    require_absent(out)
    # Whatever training does with the states, they come from the trunk here.
    plain = replace(config.reference, cache=None, balance="none")
    backend = start_backend(config)
    try:
        parts = build_risk_context(replace(config, reference=plain), backend, with_reference=True)
        build_store(parts, out)
    finally:
        leave_group()
    return 0


def _print_plan(run) -> None:
    facts = describe_run(run)
    rows = ", ".join(
        f"{name} {c['kept']} rows ({c['overlong']} overlong, {c['dropped']} dropped)"
        for name, c in facts["rows"].items()
    )
    print(
        f"{facts['engine']} on {facts['world_size']} ranks: {facts['total_steps']} steps of "
        f"{facts['rows_per_step']} rows; {rows}; risk from {run.step.risk.name}, threshold "
        f"{facts['threshold']:.3g}",
        flush=True,
    )
