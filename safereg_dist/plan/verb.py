"""The action of `safereg plan`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safereg_dist.config import Config
from safereg_dist.errors import ConfigError
from safereg_dist.parallel.hardware import Gpu
from safereg_dist.plan.named_shapes import shape_name
from safereg_dist.plan.settings import Settings, default_of, values_of, with_rows
from safereg_dist.plan.shape import ModelShape, read_fields, shape_of
from safereg_dist.screen.progress import say

if TYPE_CHECKING:
    from safereg_dist.plan.length import RowsOfRun
    from safereg_dist.plan.plan import Plan

UNFITTED_DEPTH = 0.5
"""Share of the layers that a probe is taken to read before it is fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a plan is asked for."""

    gpu: Gpu
    values: Mapping[str, Any]
    """What `Settings` takes, as far as it is given."""
    config: Config | None = None
    """The run to plan, whose keys stand where no value is given."""
    model: str | None = None
    """`config.json`, its folder, or a name; None = that of the configuration."""
    rows_per_step: int | None = None
    """Rows of a step on all GPUs, in place of `grad_accum`."""
    data_rows: int | None = None
    """Rows of the data set; None = those of the configuration's files, else 100,000."""
    figure: Path | None = None
    """Where the curves are drawn."""


class Planned(NamedTuple):
    """A plan in the forms in which it is given out."""

    text: str
    numbers: dict[str, Any]
    draw: Callable[[], Any]


def run_plan(asked: Asked) -> dict[str, Any]:
    """Prints the plan, draws its curves if requested, and returns its numbers.

    All that needs no model is checked before torch is loaded. Sizes of a Megatron layout that are
    not given are proposed.

    Raises:
        ConfigError: a configuration that cannot be read, sizes that do not go together, or a figure
            not written.
    """
    model = _model_of(asked)
    fields = read_fields(model)
    is_megatron = asked.values.get("engine") == "megatron"
    values = _values(asked)
    settings = values if is_megatron else with_rows(Settings(**values), asked.rows_per_step)
    say("plan: loads torch and transformers, to count the model's parameters")
    shape = shape_of(fields, where=model)
    say("plan: works out memory, FLOPs, bytes and time")
    if isinstance(settings, Settings):
        planned = _zero_plan(shape, settings, asked)
    else:
        planned = _layout_plan(shape, settings, asked)
    print(planned.text, end="", flush=True)
    if asked.figure is not None:
        from safereg_dist.plan.figures import save

        say(f"plan: draws {asked.figure}")
        try:
            save(planned.draw(), asked.figure)
        except (OSError, ValueError) as err:
            raise ConfigError(f"the figure cannot be written: {err}") from err
    return planned.numbers


def _model_of(asked: Asked) -> str:
    """The model's file, folder or name."""
    if asked.model is not None:
        return asked.model
    if asked.config is None:
        raise ConfigError(
            "expected a configuration or --model-config, got neither: safereg plan run.yaml "
            "--world-size N, or --model-config FILE or NAME"
        )
    model = asked.config.model
    if not Path(model).is_dir() and shape_name(model) is None:
        raise ConfigError(
            f"model={model} is no folder here, and its shape is not known by name: give its "
            "config.json as --model-config FILE"
        )
    return model


def _values(asked: Asked) -> dict[str, Any]:
    """What `Settings` takes, of the options and of the configuration."""
    values = dict(asked.values)
    if asked.rows_per_step is not None:
        if "grad_accum" in values:
            raise ConfigError("--rows-per-step gives --grad-accum: leave one of them out")
        values["grad_accum"] = 1
    if asked.config is not None:
        return values_of(asked.config, values)
    if values.get("engine") != "megatron":
        # As training: with a column it deals, with a probe the risk is not known beforehand.
        values.setdefault("balance", "none" if values.get("probe_depth") else "deal")
    return values


def _zero_plan(shape: ModelShape, settings: Settings, asked: Asked) -> Planned:
    from safereg_dist.plan.figures import draw
    from safereg_dist.plan.length import after_the_probe, run_length
    from safereg_dist.plan.plan import make_plan
    from safereg_dist.plan.report import text_of
    from safereg_dist.plan.stored import stored_price

    notes: list[str] = []
    rows = _rows_of(asked)
    if asked.config is not None:
        notes = _not_planned(asked.config, asked.values)
        if "probe_depth" not in asked.values:
            depth, more = _probe_depth(asked.config, shape.num_layers)
            settings, notes = replace(settings, probe_depth=depth), notes + more
    plan = make_plan(shape, settings, asked.gpu)
    price, first = stored_price(plan, rows.data_rows), plan.chosen.seconds
    is_stored = settings.arm == "stored"
    length = run_length(
        settings,
        rows,
        first=first,
        later=after_the_probe(plan).seconds if settings.arm == "routed" else first,
        before=price.seconds + price.probe_seconds if is_stored else 0.0,
    )
    return Planned(
        text_of(plan, price, length, notes, in_yaml=asked.config is not None),
        {
            **plan.to_json(),
            **_remedies(plan, in_yaml=asked.config is not None),
            "after_first_epoch": {"seconds": after_the_probe(plan).seconds},
            **{"stored": asdict(price), "run": asdict(length), "notes": notes},
        },
        lambda: draw(plan, name=shape.model_type),
    )


def _rows_of(asked: Asked) -> "RowsOfRun":
    """Those asked for, else lines of the configuration's JSONL where it is here, else 100,000."""
    from safereg_dist.plan.length import RowsOfRun

    config, given = asked.config, asked.data_rows
    train = None if config is None or given is not None else config.data.train
    paths = [train] if isinstance(train, str) else [part.path for part in train or ()]
    count = 0
    if all(path.endswith(".jsonl") and Path(path).is_file() for path in paths):
        for path in paths:
            with open(path, "rb") as file:
                count += sum(1 for line in file if line.strip())
    if count:
        return RowsOfRun(count, "data.train", config)
    return RowsOfRun(given or 100_000, "--data-rows", config)


def _remedies(plan: "Plan", *, in_yaml: bool) -> dict[str, Any]:
    """What makes a plan fit that does not, as the text says it."""
    from safereg_dist.plan.remedies import remedies

    if plan.fits:
        return {"remedies": [], "together": None}
    alone, together = remedies(plan, as_options=not in_yaml)
    found = None if together is None else asdict(together)
    return {"remedies": [asdict(remedy) for remedy in alone], "together": found}


def _not_planned(config: Config, values: Mapping[str, Any]) -> list[str]:
    """What a configuration asks for and the plan leaves out."""
    found = []
    if "seq_length" not in values:
        length = config.data.max_length
        found.append(f"every row has data.max_length={length} tokens (--seq-length)")
    if config.data.anchor is not None and config.needs_reference:
        risky = values.get("risky_fraction", default_of("risky_fraction"))
        found.append(
            f"{config.data.anchor_fraction:.3g} of the rows are anchors (data.anchor_fraction), "
            f"of the others {risky:.3g} are risky (--risky-fraction)"
        )
    if values.get("engine") == "megatron":
        found.append(
            "of the configuration: its model, batch, length, precision, recomputation; adapters "
            "and a probe's passes are not planned for Megatron"
        )
        if config.reference.cache is not None:
            found.append("reference.cache is planned as if it held nothing yet")
        return found
    if config.engine.name != "deepspeed":
        found.append(f"engine.name={config.engine.name} is planned as deepspeed's ZeRO-3")
    if config.lora is not None:
        if config.lora.frozen:
            found.append("adapters of lora.frozen are not counted")
        if config.lora.quantize != "none":
            found.append(
                f"lora.quantize={config.lora.quantize} is planned as {config.train.precision}"
            )
    if config.reference.balance == "exchange" and "balance" not in values:
        found.append("reference.balance=exchange is planned as by chance, the most it can cost")
    return found


def _probe_depth(config: Config, num_layers: int) -> tuple[float, list[str]]:
    """k / L of the deepest probe on the reference, and what had to be assumed."""
    from safereg_dist.risk.probe import load_probes

    risk = config.risk
    if not config.needs_risk or (not risk.is_composite and risk.source == "policy"):
        return 0.0, []
    parts = risk.parts if risk.is_composite else (risk,)
    depths, notes = [0.0], []
    for part in parts:
        if part.estimator == "influence":
            depths.append(1.0)
        elif part.estimator == "probe":
            assert part.path is not None
            if Path(part.path).exists():
                depths += [probe.layer / num_layers for probe in load_probes(part.path)]
                continue
            depths.append(UNFITTED_DEPTH)
            notes.append(
                f"no probe in {part.path} yet, it reads {UNFITTED_DEPTH:.0%} of the layers "
                "(--probe-depth)"
            )
    return min(max(depths), 1.0), notes


def _layout_plan(shape: ModelShape, values: Mapping[str, Any], asked: Asked) -> Planned:
    from safereg_dist.plan.length import run_length
    from safereg_dist.plan.megatron.figures import draw_layouts
    from safereg_dist.plan.megatron.plan import make_layout_plan
    from safereg_dist.plan.megatron.proposal import propose, remedies
    from safereg_dist.plan.megatron.report import text_of

    notes = [] if asked.config is None else _not_planned(asked.config, asked.values)
    settings, reasons = propose(shape, values, asked.gpu, rows_per_step=asked.rows_per_step)
    drawn = {**values, "grad_accum": settings.grad_accum}
    plan = make_layout_plan(shape, settings, asked.gpu, proposed=reasons)
    left = [] if plan.fits else remedies(shape, values, settings, asked.gpu)
    step = plan.chosen.seconds
    length = run_length(settings, _rows_of(asked), first=step, later=step)
    return Planned(
        text_of(plan, length, notes, left),
        {
            **plan.to_json(),
            "remedies": [remedy._asdict() for remedy in left],
            **{"run": asdict(length), "notes": notes},
        },
        lambda: draw_layouts(plan, drawn, name=shape.model_type),
    )
