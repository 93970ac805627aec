"""The action of `safereg plan`."""

import json
from pathlib import Path

from safereg_dist.errors import ConfigError
from safereg_dist.parallel.hardware import find_gpu
from safereg_dist.plan.plan import make_plan
from safereg_dist.plan.report import text_of
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import read_shape
from safereg_dist.storage.atomic import write_atomically


def run_plan(
    model_config: Path,
    gpu_name: str,
    settings: Settings,
    *,
    json_path: Path | None = None,
    figure_path: Path | None = None,
) -> int:
    """Prints the plan; writes its numbers and curves if requested. Returns 0.

    Raises:
        ConfigError: an unknown GPU, a configuration that cannot be read, or a file not written.
    """
    gpu = find_gpu(gpu_name)
    plan = make_plan(read_shape(model_config), settings, gpu)
    print(text_of(plan), end="", flush=True)
    try:
        if json_path is not None:
            write_atomically(json_path, json.dumps(plan.to_json(), indent=1) + "\n")
        if figure_path is not None:
            from safereg_dist.plan.figures import draw, save

            save(draw(plan, name=plan.shape.model_type), figure_path)
    except (OSError, ValueError) as err:
        raise ConfigError(f"the plan cannot be written: {err}") from err
    return 0
