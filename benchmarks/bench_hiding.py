"""False alarms and detection of what hides below the threshold (`safereg_dist/run/shape.py`).

    python benchmarks/bench_hiding.py --out WORK [--seeds 0 1 2] [--audit NAME=RUN.audit ...]

For each seed the embedded world, a probe fitted in it, and the audit of its training data (15 % of
it poisoned); beside them audits that are given, such as that of `bash launch/demo.sh --real`. Their
honest rows are drawn again, with replacement; then a share of them is put at a rescaled risk (the
threshold is 0.5), with a spread of 0.01, or anywhere in [0.25, 0.5). Writes results/hiding.csv:
`refused`: draws in which training would refuse by `risk.max_hidden`; `noticed`: heap or spread with
p < 0.001. The first row of each data set, `placed` 0 and one draw, is the data set as it is.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from world_runs import run_verb, same_for_all, world_of

from safereg_dist.config import Config, load_config
from safereg_dist.risk.probe import rescale
from safereg_dist.run.shape import SIGNIFICANT, Shape, limits_of, what_hides

RESULT = Path(__file__).resolve().parent / "results" / "hiding.csv"
SHARES = (0.01, 0.05, 0.15, 0.6)
LEVELS = (0.44, 0.48, None)
DRAWS = 200
SPREAD = 0.01


def audited(out: Path, seed: int) -> Path:
    """The folder of the audit of the world of a seed, made where it is not there yet."""
    world, folder = world_of(out, seed), out / f"seed{seed}"
    if not (folder / "audit" / "audit.json").is_file():
        fit = ("--model", world.base, "--data", world.probe, "--out", folder / "probe")
        run_verb("probe", "fit", *fit, "--seed", seed)
        config = {
            "model": str(world.base),
            "data": {"train": str(world.train), "max_length": 256},
            "risk": {"path": str(folder / "probe"), "cache": "none"},
            "regularizer": {"schedule": "step"},
            "train": {"precision": "fp32"},
            "engine": {"name": "single"},
            "output_dir": str(folder / "run"),
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        run_verb("audit", folder / "run.yaml", "--out", folder / "audit")
    return folder / "audit"


def rows_of(name: str, folder: Path, config: Config) -> Iterator[dict]:
    """The rows of the table of one audit."""
    facts = json.loads((folder / "audit.json").read_text())
    lines = (folder / "rows.jsonl").read_text().splitlines()
    known = [json.loads(line)["risk"] for line in lines]
    honest = np.array([rescale(r, facts["threshold"]) for r in known if isinstance(r, float)])
    benign = facts.get("below_threshold_share_of_benign_calibration_rows")
    draw = np.random.default_rng(0)

    def shape_of(risks: np.ndarray) -> Shape:
        counts = Shape.of(((r >= 0.5, r, {}) for r in risks.tolist()), 0.5, {}).counts
        return Shape.of_counts(counts, benign)

    def placed(share: float, level: float | None) -> np.ndarray:
        risks = draw.choice(honest, len(honest))
        count = round(share * len(risks))
        at = np.full(count, level or 0.0) + draw.normal(0, SPREAD, count)
        risks[:count] = draw.uniform(0.25, 0.5, count) if level is None else at
        risks[:count] = np.clip(risks[:count], 0, np.nextafter(0.5, 0))
        return risks

    cases = [(0.0, None, [honest]), (0.0, None, [placed(0, None) for _ in range(DRAWS)])]
    for share in SHARES:
        for level in LEVELS:
            cases.append((share, level, [placed(share, level) for _ in range(DRAWS)]))
    for share, level, draws in cases:
        shapes = [shape_of(risks) for risks in draws]
        refused = [what_hides(shape, limits_of(config), 0.5) is not None for shape in shapes]
        noticed = [min(s.heap_p, s.spread_p) < SIGNIFICANT for s in shapes]
        yield {
            "data": name,
            "rows": len(honest),
            "benign_share": benign,
            "placed": share,
            "at": ("uniform" if share else "") if level is None else level,
            "draws": len(draws),
            "bins": " ".join(map(str, shapes[0].bins)),
            "refused": np.mean(refused),
            "noticed": np.mean(noticed),
            **same_for_all(),
        }


def main() -> None:
    """Writes the table and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="WORK")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--audit", nargs="*", default=[], metavar="NAME=DIR")
    arguments = parser.parse_args()
    audits = {f"world {seed}": audited(arguments.out, seed) for seed in arguments.seeds}
    audits |= {name: Path(folder) for name, folder in (a.split("=", 1) for a in arguments.audit)}
    plain = arguments.out / "plain.yaml"
    plain.write_text("model: m\ndata: {train: t}\nrisk: {estimator: column}\noutput_dir: o\n")
    config = load_config(plain)
    table = pd.DataFrame(r for n, folder in audits.items() for r in rows_of(n, folder, config))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(RESULT, index=False)
    print(table.drop(columns=list(same_for_all())).to_string(index=False))


if __name__ == "__main__":
    main()
