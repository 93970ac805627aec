"""Claimed: no damage to a checkpoint of two DeepSpeed ranks, or to the logs behind it, is loaded:
of 2000 changes in every file each is found before anything is; a run goes on behind a damaged
checkpoint to the bits of an undamaged one, and counts it; a hostile pickle runs nothing, not even
where its manifest was made anew.

Exact. More of each kind, with resumes: benchmarks/damage.py.
"""

import json

import damage
import pytest
from support.extent import cases
from support.launching import FINETUNE

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return damage.make_run(tmp_path_factory.mktemp("damage"))


def test_no_damage_is_loaded(config, launch):
    folder = config.parent
    whole = launch(FINETUNE, config, ranks=damage.RANKS)
    assert whole.status == 0, whole.output[-4000:]
    summary = json.loads((folder / "whole" / "summary.json").read_text())["checkpoints"]
    assert (summary["saved"], summary["damaged"]) == (2, 0)
    assert summary["seconds"] > 0

    newest = damage.interrupted(folder / "whole", folder / "checked")
    rows = damage.try_all(damage.Damaged(newest, folder / "checked"), 2000)
    assert sum(row["tried"] for row in rows) == 2000
    assert [row for row in rows if row["loaded"]] == []

    for kind in cases(["zero_pp_rank_1*optim*"], ["zero_pp_rank_0*model*"]):
        run = folder / f"hostile-{kind[:14]}"
        goes_on_behind_hostile(config, launch, run, kind)


def goes_on_behind_hostile(config, launch, run, pattern):
    """A file that would run code, in place of one that rank 1 reads, and a manifest that fits."""
    whole, marker = config.parent / "whole", config.parent / "marker"
    newest = damage.interrupted(whole, run)
    (path,) = newest.rglob(pattern)
    damage.put_hostile(path, marker)
    damage.make_manifest_anew(newest)
    done = launch(FINETUNE, config, f"output_dir={run}", ranks=damage.RANKS)
    assert done.status == 0, done.output[-4000:]
    assert f"{path}, got: it asks for posix.system; nothing of it was run" in done.output
    assert f"resuming from {newest.with_name('step-00000002')} at step 2" in done.output
    assert not marker.exists()
    for name in ("ledger.jsonl", "model/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((run / "summary.json").read_text())["checkpoints"]["damaged"] == 1
    assert [p.name for p in newest.parent.glob("unused*")] == [f"unused-1-{newest.name}"]
