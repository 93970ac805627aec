"""One rank of the critic tests. Arguments: folder of the test, URL of the judge.

Each rank names itself as the judge's model, so that the server can be slow to one of them.
"""

import json
import os
import sys
from pathlib import Path

from step_worker import COLLECTIVES

from safereg_dist.config import load_config
from safereg_dist.errors import SafeRegError
from safereg_dist.factory import build_run, start_backend
from safereg_dist.trainer import train


def trained(folder, backend, url, name, *overrides) -> dict:
    """Trains a run of its own; the collectives in their order, or the error that ended it."""
    rank = backend.ranks.rank
    critic = [f"risk.critic.{key}={value}" for key, value in
              {"endpoint": url, "format": "llama_guard", "model": f"{name}-rank{rank}",
               "cache": "none", "timeout_s": 20}.items()]  # fmt: skip
    config = load_config(
        folder / "run.yaml",
        ["risk.estimator=critic", *critic, f"output_dir={folder / name}", *overrides],
    )
    run = build_run(config, backend)
    begin, error = len(COLLECTIVES), ""
    try:
        train(run, None)
    except SafeRegError as err:
        error = f"{type(err).__name__}: {err}"
    run.engine.engine.destroy()
    return {"collectives": COLLECTIVES[begin:], "error": error}


def main() -> None:
    """All parts, in the same order on every rank."""
    folder, url = Path(sys.argv[-2]), sys.argv[-1]
    backend = start_backend(load_config(folder / "run.yaml", ["risk.estimator=column"]))
    found = {
        "quick": trained(folder, backend, url, "quick"),
        "slow": trained(folder, backend, url, "slow"),
        "broken": trained(folder, backend, url, "broken", "risk.critic.fail=closed"),
        "stop": trained(
            folder, backend, url, "broken", "risk.critic.fail=stop", f"output_dir={folder / 'stop'}"
        ),
    }
    (folder / f"found.rank{backend.ranks.rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # as `safereg_dist.cli.entry` does


if __name__ == "__main__":
    main()
