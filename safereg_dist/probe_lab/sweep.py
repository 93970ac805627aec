"""`safereg probe sweep`: every layer, kind and pooling side by side; saves no probe."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from safereg_dist.evaluate.statistics import bounds_of
from safereg_dist.probe_lab.figures import draw_comparison
from safereg_dist.probe_lab.fit import choose, fit_all, why
from safereg_dist.probe_lab.job import Collected
from safereg_dist.probe_lab.layer_fit import LayerReport
from safereg_dist.probe_lab.tables import print_sweep
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import json_ready


def sweep_collected(collected: Collected) -> dict[str, Any]:
    """Writes `sweep.json`, `sweep.csv` and `sweep.png`; what the first one holds.

    `layers` of it has the figures of each pooling, layer and kind, `chosen` the best of them.

    Raises:
        CheckpointError: the output folder cannot be written.
    """
    reports = [fit.report for fit in fit_all(collected, collected.store.manifest.poolings)]
    chosen, out = choose(sorted(reports, key=lambda r: r.layer)), collected.out
    facts = {
        **collected.facts(),
        "fingerprint": collected.store.manifest.fingerprint,
        "position": collected.store.manifest.position,
        "chosen": {"layer": chosen.layer, "kind": chosen.kind, "pooling": chosen.pooling},
        "layers": [asdict(report) for report in reports],
    }
    facts = json_ready(facts)
    text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
    write_atomically(out / "sweep.json", text)
    write_atomically(out / "sweep.csv", _csv(reports))
    draw_comparison(reports, chosen, out / "sweep.png")
    print_sweep(reports, chosen)
    print(why(reports, chosen))
    print(f"sweep: {len(reports)} probes, written to {out}", flush=True)
    collected.clean_up()
    return facts


def _csv(reports: Sequence[LayerReport]) -> str:
    """One line for each probe; an interval is two columns, NAME_low and NAME_high."""
    rows = []
    for report in reports:
        row = asdict(report)
        intervals = row.pop("intervals")
        rows.append(row | bounds_of(intervals))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
