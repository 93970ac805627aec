"""Claimed: in Megatron's own schedules, in every layout, a step gives the loss and gradients of the
equations; the reference runs on micro-batches with a risky row alone; without risk a run is the
plain one; a run goes on from a checkpoint.

The judge is the whole model in float64 with whole logits (`megatron_worker.py oracle`); float32
rounds (1e-6 in the norm of a gradient), bf16 more (2e-2). Exact: a pipeline's gradients against one
stage's, a run without risk, a resumed run, FLOPs, bytes and slots. CUDA, Transformer Engine and
NCCL take no part: `support.megatron_on_cpu` lists what stands in for them.
"""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from megatron_cases import (
    EXPERTS,
    HIDDEN,
    LAGGED,
    LAGGED_STEPS,
    LAYERS,
    LAYOUTS,
    LENGTH,
    ROWS,
    VOCAB,
    errors_of,
    facts,
    normaliser,
    tensors,
)
from support.builders import write_jsonl
from support.critic_server import running_server
from support.extent import FULL
from support.launching import Launcher
from support.step_cost import read_cost

from safereg_dist import regions
from safereg_dist.cli import main
from safereg_dist.plan.pipeline import Pipeline
from safereg_dist.run.ledger import verify_ledger
from safereg_dist.run.manifest import read_manifest
from safereg_dist.storage.signing import HmacKey

pytest.importorskip("megatron.core")

WORKER = Path(__file__).with_name("megatron_worker.py")
EXAMPLES = Path(__file__).resolve().parents[2] / "launch" / "examples" / "megatron"
RTOL = 1e-5
LAG = ("--probe", LAGGED, "--lag", "--steps", LAGGED_STEPS)
VARIANTS = {
    "full-recompute": ("pp2", 2, ("--recompute", "full")),
    "selective-recompute": ("dp1", 1, ("--recompute", "selective")),
    "bf16": ("tp2-sp", 2, ("--bf16",)),
    "two-tuple": ("dp1", 1, ("--two-tuple",)),
    "per-token": ("dp1", 1, ("--per-token",)),
    "documents": ("pp2", 2, ("--risk", "documents")),
    "two-probes": ("pp2-vpp2", 2, ("--probe", "both")),
    "probe-over-the-sequence": ("tp2-pp2-sp", 4, ("--probe", "middle")),
    "probe-over-contexts": ("cp2", 2, ("--per-token", "--probe", "last")),
    "probe-first": ("tp2", 2, ("--probe", "first")),
    "lagged-probe": ("dp2-pp2", 4, (*LAG, "--per-token", "--recompute", "full")),
    "bridge": ("pp2", 2, ("--bridge",)),
    "one-row": ("dp2", 2, ("--risk", "one")),
    "all-rows": ("tp2", 2, ("--risk", "all")),
}


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    return Launcher(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, launch):
    """Makes a folder with models and what they must give."""
    known = {}

    def of(*options):
        if options not in known:
            folder = tmp_path_factory.mktemp("models")
            result = launch(WORKER, "oracle", folder, *options)
            assert result.status == 0, result.output
            known[options] = folder
        return known[options]

    return of


@pytest.fixture(scope="module")
def train(made, launch, tmp_path_factory):
    """Runs a layout; gives the path of its files."""

    def run(layout, ranks, *options, model=(), out=None):
        out = out or tmp_path_factory.mktemp("run") / "out"
        result = launch(WORKER, layout, made(*model), out, *options, *model, ranks=ranks)
        assert result.status == 0, result.output
        return out

    return run


def weights(out: Path, ranks: int) -> list[dict[str, torch.Tensor]]:
    return [
        {name: tensor for name, tensor in own.items() if name.startswith("weight ")}
        for own in tensors(out, ranks)
    ]


def check(
    out: Path,
    ranks: int,
    folder: Path,
    kind: str,
    normaliser: str,
    *,
    counts_tokens: bool = True,
    rtol: float = RTOL,
) -> None:
    """Every rank's gradients are the judge's, and so is the loss of a report that counts tokens."""
    errors = errors_of(out, ranks, folder, kind, normaliser)
    assert not errors.missing
    assert errors.gradient < rtol
    assert max(errors.first_loss, errors.last_loss) < 0.1 * rtol or not counts_tokens


def kind(options) -> str:
    """What the judge calls the risks of a run."""
    if "--lag" in options:
        return "lag"
    if "--probe" in options:
        return f"probe-{options[options.index('--probe') + 1]}"
    return options[options.index("--risk") + 1] if "--risk" in options else "mixed"


# ---- loss and gradients


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_equations(layout, train, made):
    ranks, options = LAYOUTS[layout]
    out = train(layout, ranks, *options)
    check(out, ranks, made(), "mixed", normaliser(options))
    last = facts(out, ranks - 1)
    policy, reference = last["bytes"]
    assert reference == policy  # the policy's own share, no more
    assert last["groups"] == 0  # Megatron's are enough
    report = last["reports"][0]
    assert report["safereg/kl_coef"] == 3 / 16
    [row] = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert report["safereg/risk"] == pytest.approx(row["risk_mean"], abs=1e-8)
    assert report["safereg/divergence"] == pytest.approx(row["divergence"], rel=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_options_of_a_run(name, train, made):
    layout, ranks, options = VARIANTS[name]
    out = train(layout, ranks, *options)
    counts_tokens = "--two-tuple" not in options
    found = (kind(options), normaliser(options))
    rtol = 3e-2 if "--bf16" in options else RTOL
    check(out, ranks, made(), *found, counts_tokens=counts_tokens, rtol=rtol)
    rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row.get("risk_lag") == (1 if "--lag" in options else None) for row in rows)


def test_a_judge_reads_the_rows_of_two_replicas(train, made):
    """Each owner asks for its own rows, once: not every rank of a replica."""
    with running_server("good") as server:
        out = train("dp2-tp2", 4, "--judge", server.url)
        asked = sum(server.counts()["verdicts"].values())
    check(out, 4, made(), "judged", "means")
    ledger = [json.loads(x) for x in (out / "ledger.jsonl").read_text().splitlines()]
    rows = [row for row in ledger if "risk" in row]
    assert asked == len(rows) == 16
    assert {row["estimator"] for row in rows} == {"critic"}
    assert main(["report", str(out)]) == 0
    assert "<html" in (out / "report.html").read_text()


def test_tied_embeddings_over_a_pipeline(train, made):
    check(train("pp2", 2, model=("--tied",)), 2, made("--tied"), "mixed", "means")


def test_experts_over_data_parallel_ranks(train, made):
    """One replica has no risky row: it still joins the other's reference passes."""
    check(train("ep2", 2, model=EXPERTS), 2, made(*EXPERTS), "mixed", "means")


@pytest.mark.parametrize("layout", ["pp2", "pp2-vpp2"])
def test_a_pipeline_gives_the_bits_of_one_stage(layout, train):
    [whole] = tensors(train("dp1", 1), 1)
    for own in tensors(train(layout, 2), 2):
        for name, tensor in own.items():
            assert torch.equal(tensor, whole[name]), name


# ---- runs


@pytest.mark.parametrize("layout", ["pp", "tp"])
def test_the_example_without_risk_is_the_plain_one(layout, launch, tmp_path):
    """Ten steps; where rows are risky they train otherwise."""
    draw = random.Random(0)
    files = {}
    for name, share in (("harmless", 0.0), ("risky", 1.0)):
        rows = [
            {
                "tokens": [draw.randrange(64) for _ in range(17)],
                "prompt": 4,
                "risk": share * draw.random(),
            }
            for _ in range(40)
        ]
        files[name] = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    losses = {}
    for script, data in (("plain", "harmless"), ("safe", "harmless"), ("safe", "risky")):
        out = tmp_path / f"{script}-{data}"
        how = [EXAMPLES / f"{script}.py", files[data], out, f"--{layout}", 2]
        result = launch(WORKER.with_name("megatron_example.py"), *how, ranks=2)
        assert result.status == 0, result.output
        losses[script, data] = re.findall(r"step \d+ lm loss (\S+)", result.output)
    assert len(losses["plain", "harmless"]) == 10
    assert losses["safe", "harmless"] == losses["plain", "harmless"]
    assert losses["safe", "risky"] != losses["plain", "harmless"]
    folders = [tmp_path / f"{script}-harmless" / "checkpoint" for script in ("plain", "safe")]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]  # nothing of ours is in a checkpoint
    rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["active_rows"] for row in rows) > 0


def test_a_resumed_run_gives_the_same_bits(train, made, launch, monkeypatch):
    """Our state lies in Megatron's own checkpoint, signed; once changed, all ranks refuse it."""
    monkeypatch.setenv("SAFEREG_TEST_KEY", "a secret of enough characters")
    key = HmacKey("SAFEREG_TEST_KEY")
    options = ("--stored-reference", "--probe", "middle", "--steps", 4)
    whole = train("pp2", 2, *options, "--save-at", 2)
    kept = whole.with_suffix("")
    ledger = (kept / "ledger.jsonl").read_bytes()
    expected = weights(whole, 2)
    model = whole.with_suffix(".saved") / "model"
    assert (model / "metadata.json").is_file()
    assert set(read_manifest(model / "safereg", key).files) == {"state.json", "risk0.safetensors"}
    resumed = train("pp2", 2, *options, "--resume-at", 2, out=whole)
    for own, other in zip(expected, weights(resumed, 2), strict=True):
        assert all(torch.equal(own[name], other[name]) for name in own)
    assert (kept / "ledger.jsonl").read_bytes() == ledger
    assert verify_ledger(kept, key).rows == 4 * 16
    risks = model / "safereg" / "risk0.safetensors"
    risks.write_bytes(risks.read_bytes()[:-1] + b"\x7f")
    refused = launch(WORKER, "pp2", made(), whole, *options, "--resume-at", 2, ranks=2)
    assert refused.status != 0
    assert refused.output.count("CheckpointError") >= 2
    assert "risk0.safetensors was changed" in refused.output
    assert (kept / "ledger.jsonl").is_file()


def test_stored_states_give_the_same_bits(train, made, launch, tmp_path):
    """The same rows in each step: the reference runs in the first step of the first run alone."""
    how = ("--repeat", "--steps", 3, "--per-token")
    layout, ranks, cache = "tp2-pp2-sp", 4, tmp_path / "states"
    outs = [train(layout, ranks, *how)]
    outs += [train(layout, ranks, *how, "--cache", cache) for _ in range(2)]
    expected, *found = [weights(out, ranks) for out in outs]
    for run in found:
        for own, other in zip(expected, run, strict=True):
            assert all(torch.equal(own[name], other[name]) for name in own)
    ran = [
        [json.loads(x)["reference_rows"] for x in (out / "metrics.jsonl").read_text().splitlines()]
        for out in outs
    ]
    assert len(set(ran[0])) == 1
    assert ran == [ran[0], [ran[0][0], 0, 0], [0, 0, 0]]
    assert {path.name for path in cache.iterdir()} == {"tp0-cp0", "tp1-cp0"}

    next(cache.glob("tp1-cp0/*/*.safetensors")).write_bytes(b"damaged")
    worker = [WORKER, layout, made(), tmp_path / "out", *how, "--cache", cache]
    result = launch(*worker, ranks=ranks)
    assert result.status != 0
    assert result.output.count("expected the reference's states of a line in") >= ranks


def test_megatrons_distributed_optimizer(train):
    options = ("--optimizer", "--overlap", "--steps", 3)
    [alone] = weights(train("dp1", 1, *options), 1)
    for own in weights(train("dp2", 2, *options), 2):
        for name, tensor in own.items():  # Adam divides roundings by themselves
            assert (tensor - alone[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("layout", ["tp2-pp2", "dp2-pp2"])
def test_random_risks_for_many_steps(layout, train):
    steps = 50 if FULL else 15
    out = train(layout, 4, "--risk", "random", "--steps", steps, "--log-collectives")
    logs = [facts(out, rank)["collectives"] for rank in range(4)]
    groups = {tuple(group) for log in logs for _, group, _ in log}
    assert tuple(range(4)) in groups
    for group in groups:
        of_ranks = [[entry for entry in logs[r] if tuple(entry[1]) == group] for r in group]
        assert all(entries == of_ranks[0] for entries in of_ranks), group
    rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == steps
    assert {row["active_rows"] for row in rows} >= {0, 2, 16}


def test_a_bad_row_on_one_rank_ends_all(made, launch, tmp_path):
    result = launch(
        WORKER, "dp2-pp2", made(), tmp_path / "out", "--risk", "bad", "--steps", 3, ranks=4
    )
    assert result.status != 0
    assert result.output.count("expected a number in [0, 1]") >= 4
    assert "rank 3: row" in result.output


# ---- cost


@pytest.mark.parametrize(("layout", "stages", "chunks"), [("pp4", 4, 1), ("pp2-vpp2", 2, 2)])
def test_slots_are_those_of_the_plan(layout, stages, chunks, train):
    """The reference's pass adds its own slots and no second wait for the pipeline to fill."""
    out = train(layout, stages, "--risk", "random", "--steps", 5, "--slots")
    rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    ran = [row["reference_rows"] // ROWS for row in rows]
    assert {0, 8} < set(ran)
    pipeline = Pipeline(stages=stages, micro_batches=8, chunks=chunks)
    expected = [pipeline.slots + pipeline.added_slots(count) for count in ran]
    assert facts(out)["slots"] == expected


def test_cost_follows_risk(train):
    """Each micro-batch with a risky row costs one of the reference's passes, others nothing."""
    ranks, options = 2, ("--steps", 2, "--cost")
    outs = {
        name: train("tp2", ranks, *options, *how)
        for name, how in {
            "plain": ("--plain",),
            "none": ("--risk", "none"),
            "one": ("--risk", "one"),
            "all": ("--risk", "all"),
            "always": ("--always",),
            "probe": ("--probe", "first"),
        }.items()
    }
    cost = {name: read_cost(out, ranks) for name, out in outs.items()}
    flops = {name: sum(found.flops.values()) for name, found in cost.items()}
    bytes_ = {name: sum(found.bytes.values()) for name, found in cost.items()}
    assert flops["none"] == flops["plain"]
    # Without risk: one MAX all-reduce of six numbers, and the owner's rows counted and gathered.
    assert cost["none"].bytes[regions.AGREEMENT] == ranks * 6 * 8
    others = bytes_["none"] - bytes_["plain"] - cost["none"].bytes[regions.AGREEMENT]
    assert 0 <= others <= 200
    head = {name: found.flops[regions.HEAD_CE] for name, found in cost.items()}
    assert head["none"] == 0
    assert 0 < head["one"] * 7 < head["all"] <= head["one"] * 9
    trunk = {n: flops[n] - head[n] - cost[n].flops[regions.HEAD_DIVERGENCE] for n in flops}
    # The plain head of a micro-batch is replaced, the reference's trunk comes to it: 8 times as
    # much where 8 micro-batches are risky as where one is.
    more = {name: count - trunk["none"] for name, count in trunk.items()}
    assert more["all"] == 8 * more["one"] > 0
    # A teacher on every token costs what 100 % risk costs.
    assert flops["always"] == flops["all"]
    assert bytes_["always"] == bytes_["all"]
    # A probe behind the first of four layers runs that one on all micro-batches, of new rows.
    plain_head = 3 * 2 * ROWS * LENGTH * VOCAB * HIDDEN
    [_, row] = map(json.loads, (outs["probe"] / "metrics.jsonl").read_text().splitlines())
    ran = row["reference_rows"] // ROWS
    assert 0 < ran < 8
    assert more["probe"] == ran * more["one"] + 8 * (more["one"] + plain_head) // LAYERS
