"""What two runs of the same steps must have in common, to the bit."""

import json
from pathlib import Path
from typing import Any

TIMES = ("step_time_s", "tokens_per_s", "peak_memory_bytes", "save_blocked_s")
"""Keys of a row of `metrics.jsonl` that hang on the machine."""


def result(out: Path) -> dict[str, Any]:
    """Metrics but for `TIMES`, ledger and exported weights of a run that has ended."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{k: v for k, v in row.items() if k not in TIMES} for row in metrics],
        "ledger": (out / "ledger.jsonl").read_bytes(),
        "model": (out / "model" / "model.safetensors").read_bytes(),
    }
