"""The action of `safereg plan`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safereg_dist.errors import ConfigError
from safereg_dist.parallel.hardware import Gpu, find_gpu
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape, read_shape
from safereg_dist.storage.atomic import write_atomically


class Planned(NamedTuple):
    """A plan in the forms in which it is given out."""

    text: str
    numbers: dict[str, Any]
    draw: Callable[[], Any]


def run_plan(
    model_config: Path,
    gpu_name: str,
    values: Mapping[str, Any],
    *,
    json_path: Path | None = None,
    figure_path: Path | None = None,
) -> int:
    """Prints the plan; writes its numbers and curves if requested. Returns 0.

    `values` are what `Settings` takes; a Megatron layout's sizes that they leave out are proposed.

    Raises:
        ConfigError: an unknown GPU, a configuration that cannot be read, sizes that do not go
            together, or a file not written.
    """
    gpu, planned_by = find_gpu(gpu_name), _zero_plan
    if values.get("engine") == "megatron":
        planned_by = _layout_plan
    planned = planned_by(read_shape(model_config), values, gpu)
    print(planned.text, end="", flush=True)
    try:
        if json_path is not None:
            write_atomically(json_path, json.dumps(planned.numbers, indent=1) + "\n")
        if figure_path is not None:
            from safereg_dist.plan.figures import save

            save(planned.draw(), figure_path)
    except (OSError, ValueError) as err:
        raise ConfigError(f"the plan cannot be written: {err}") from err
    return 0


def _zero_plan(shape: ModelShape, values: Mapping[str, Any], gpu: Gpu) -> Planned:
    from safereg_dist.plan.figures import draw
    from safereg_dist.plan.plan import make_plan
    from safereg_dist.plan.report import text_of

    plan = make_plan(shape, Settings(**values), gpu)
    return Planned(text_of(plan), plan.to_json(), lambda: draw(plan, name=shape.model_type))


def _layout_plan(shape: ModelShape, values: Mapping[str, Any], gpu: Gpu) -> Planned:
    from safereg_dist.plan.megatron.figures import draw_layouts
    from safereg_dist.plan.megatron.plan import make_layout_plan
    from safereg_dist.plan.megatron.proposal import propose
    from safereg_dist.plan.megatron.report import text_of

    settings, reasons = propose(shape, values, gpu)
    plan = make_layout_plan(shape, settings, gpu, proposed=reasons)
    return Planned(
        text_of(plan), plan.to_json(), lambda: draw_layouts(plan, values, name=shape.model_type)
    )
