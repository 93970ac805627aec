"""Tasks of lm-evaluation-harness beside our own figures, where it is installed (`lm-eval`).

Its numbers are those of its own command with the same folder and batch size: nothing is set but
what is asked, so chat templates are as the tasks have them.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from safereg_dist.config.yaml_text import read_yaml
from safereg_dist.errors import ConfigError, reason_of
from safereg_dist.evaluate.generate import load_model
from safereg_dist.models.extras import install


class Harness:
    """Tasks by name, or as YAML files of their own, found and checked before anything is asked.

    A YAML file is read as data: one that names Python functions is refused.

    Raises:
        ConfigError: the harness is not installed, a task is not known, a file is no task.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        try:
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
        except ImportError as err:
            raise ConfigError(
                f"the tasks {', '.join(tasks)} need lm-evaluation-harness ({reason_of(err)}): "
                f"{install('lm_eval')}"
            ) from err
        self._manager = TaskManager()
        self._tasks = [_task(name) for name in tasks]
        known = set(self._manager.all_tasks)
        unknown = [name for name in self._tasks if isinstance(name, str) and name not in known]
        if unknown:
            raise ConfigError(
                f"lm-evaluation-harness has no task {', '.join(unknown)}: `lm-eval ls tasks` lists "
                "them; a task of your own is a file, TASK.yaml"
            )

    def figures(
        self,
        folder: Path | str,
        *,
        batch_size: int,
        limit: int | None = None,
        **load: Any,
    ) -> dict[str, Any]:
        """`version` of the harness, and of each task its metrics by its names, in `tasks`.

        A name is the metric and its filter, as `acc,none` and `acc_stderr,none`; `rows` of a task
        are the documents that were asked.

        Args:
            limit: documents of a task; None for all.
            load: as in `load_model`.
        Raises:
            ConfigError: the model cannot be loaded; a task cannot be run, such as one whose data
                cannot be fetched.
        """
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        model, tokenizer = load_model(folder, **load)
        try:
            found = simple_evaluate(
                # A model that is loaded already: by its name the harness would ask the launcher's
                # environment for ranks, and wait for them.
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=self._tasks,
                task_manager=self._manager,
                limit=limit,
                log_samples=False,
            )
        except Exception as err:  # tasks raise whatever their authors chose
            raise ConfigError(
                f"lm-evaluation-harness failed ({type(err).__name__}: {reason_of(err)}): try the "
                "task with its own command; a task fetches its data at its first use"
            ) from err
        rows = found["n-samples"]
        return {
            "version": version("lm-eval"),
            "tasks": {
                task: {
                    **({"rows": rows[task]["effective"]} if task in rows else {}),
                    # Without a filter behind the comma it is no metric.
                    **{k: v for k, v in values.items() if "," in k and not isinstance(v, str)},
                }
                for task, values in found["results"].items()
            },
        }


def _task(name: str) -> str | dict[str, Any]:
    """A task as the harness takes it: its name, or its settings."""
    if not name.endswith((".yaml", ".yml")):
        return name
    try:
        given = read_yaml(name)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ConfigError(
            f"cannot read the task {name} ({reason_of(err)}): give a task's YAML without code"
        ) from err
    if not isinstance(given, dict) or "task" not in given:
        raise ConfigError(f"expected a task with its name under `task` in {name}, got {given!r}")
    return given
