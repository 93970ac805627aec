"""The action of `safereg plan`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safereg_dist.errors import ConfigError
from safereg_dist.parallel.hardware import Gpu, find_gpu
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape, read_shape


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
    figure_path: Path | None = None,
) -> dict[str, Any]:
    """Prints the plan, draws its curves if requested, and returns its numbers.

    `values` are what `Settings` takes; a Megatron layout's sizes that they leave out are proposed.

    Raises:
        ConfigError: an unknown GPU, a configuration that cannot be read, sizes that do not go
            together, or a figure not written.
    """
    gpu, planned_by = find_gpu(gpu_name), _zero_plan
    if values.get("engine") == "megatron":
        planned_by = _layout_plan
    planned = planned_by(read_shape(model_config), values, gpu)
    print(planned.text, end="", flush=True)
    if figure_path is not None:
        from safereg_dist.plan.figures import save

        try:
            save(planned.draw(), figure_path)
        except (OSError, ValueError) as err:
            raise ConfigError(f"the figure cannot be written: {err}") from err
    return planned.numbers


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
