"""`safereg probe sweep`: every layer, kind and pooling side by side; saves no probe."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict

from safereg_dist.evaluate.statistics import bounds_of
from safereg_dist.probe_lab.figures import draw_comparison
from safereg_dist.probe_lab.fit import choose, fit_all, json_numbers, why
from safereg_dist.probe_lab.job import Collected
from safereg_dist.probe_lab.layer_fit import LayerReport
from safereg_dist.probe_lab.tables import print_sweep
from safereg_dist.storage.atomic import write_atomically


def sweep_collected(collected: Collected) -> list[LayerReport]:
    """A report for each pooling, layer and kind; writes `sweep.json`, `sweep.csv`, `sweep.png`.

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
    text = json.dumps(json_numbers(facts), indent=2, allow_nan=False) + "\n"
    write_atomically(out / "sweep.json", text)
    write_atomically(out / "sweep.csv", _csv(reports))
    draw_comparison(reports, chosen, out / "sweep.png")
    print_sweep(reports, chosen)
    print(why(reports, chosen))
    print(f"sweep: {len(reports)} probes, written to {out}", flush=True)
    collected.clean_up()
    return reports


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
