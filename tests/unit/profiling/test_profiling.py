"""Claimed: `profile: true` bills every product of a training step to the part that asked for it,
changes no bit of a loss, and writes what it says into the run folder.

The judge of FLOPs is the count written out from the dimensions of a small Llama: integers, equal to
the last one. Losses are equal bit for bit. Shares are ratios of the same integers, to one rounding
of a float. Seconds are only held against each other: parts add up to the step.
"""

import base64
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from step_flops import Rows, llama, write_run_folder
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from safereg_dist import regions
from safereg_dist.config import config_to_yaml, load_config
from safereg_dist.errors import CheckpointError
from safereg_dist.evaluate.report import write_report
from safereg_dist.factory import build_run, start_backend
from safereg_dist.profiling import Recorder
from safereg_dist.profiling.table import with_unit
from safereg_dist.regions import region
from safereg_dist.run.checkpoint import config_hash
from safereg_dist.trainer import train

LAYERS, H, VOCAB = 2, 128, 256
SHAPE = llama(LAYERS, H, vocab=VOCAB)
EVEN = Rows(name="even", prompts=(12,) * 8, responses=(9,) * 8, rows_per_batch=2)
RAGGED = Rows(name="ragged", prompts=(5, 17, 9, 30), responses=(12, 4, 21, 7), rows_per_batch=1)
"""One row a micro-batch: nothing is padded, so every length below is a row's own."""
RISKY = 3
"""Every row whose number it divides has risk 1."""


def configured(folder, rows, *changes):
    """Steps of a whole epoch, each of all rows in 2 (or 4) micro-batches."""
    write_run_folder(folder, SHAPE, rows)
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for index, row in enumerate(lines):
        row["risk"] = float(index % RISKY == 0)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "base.yaml").write_text(
        f"""
model: {folder}/model
data: {{train: {folder}/rows.jsonl}}
risk: {{estimator: column, max_held_back: 1.0}}
train: {{steps: 2, micro_batch_size: {rows.rows_per_batch},
         grad_accum_steps: {len(rows.prompts) // rows.rows_per_batch}, precision: fp32}}
engine: {{name: single}}
"""
    )
    return load_config(folder / "base.yaml", [f"output_dir={folder}/run", "profile=true", *changes])


def trained(config):
    """(rows of profile.jsonl, profile.json, rows of metrics.jsonl) of a run to its end."""
    run = build_run(config, start_backend(config))
    assert train(run, None) == 0
    folder = Path(config.output_dir)

    def lines(name):
        return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]

    if not config.profile:
        return [], {}, lines("metrics.jsonl")
    summary = json.loads((folder / "profile.json").read_text("utf-8"))
    return lines("profile.jsonl"), summary, lines("metrics.jsonl")


def flops_by_part(rows, step):
    """What is not 0 of one step."""
    return {r["part"]: r["flops"] for r in rows if r["step"] == step and r["flops"]}


def forward_flops(layers, lengths):
    """Decoder layers over rows of these lengths: 4 square projections, 3 of the MLP, attention's 2
    products over all pairs of positions."""
    linear = sum(2 * n * (4 * H * H + 3 * H * SHAPE.intermediate_size) for n in lengths)
    attention = sum(2 * 2 * n * n * H for n in lengths)
    return layers * linear, layers * attention


def expected_flops(rows):
    """FLOPs of one step by part, all rows in it, written out from the dimensions."""
    lengths = [p + r for p, r in zip(rows.prompts, rows.responses, strict=True)]
    risky = range(0, len(lengths), RISKY)
    linear, attention = forward_flops(LAYERS, lengths)
    return {
        regions.POLICY_FORWARD: linear + attention,
        # Two products for each projection's one; attention's four, and its scores again.
        regions.POLICY_BACKWARD: 2 * linear + attention * 5 // 2,
        regions.REFERENCE_TRUNK: sum(forward_flops(LAYERS, [lengths[i] for i in risky])),
        regions.HEAD_CE: 3 * 2 * sum(rows.responses) * H * VOCAB,
        regions.HEAD_DIVERGENCE: 2 * sum(rows.responses[i] for i in risky) * H * VOCAB,
    }


@pytest.fixture(scope="module", params=[EVEN, RAGGED], ids=lambda r: r.name)
def profiled(request, tmp_path_factory):
    """(rows, configuration, what `trained` gives)."""
    config = configured(tmp_path_factory.mktemp("profiled"), request.param)
    return request.param, config, trained(config)


def test_flops_of_every_part_are_those_written_out(profiled):
    rows, _, (found, _, _) = profiled
    for step in (0, 1):
        assert flops_by_part(found, step) == expected_flops(rows)


def test_losses_are_the_same_bits(profiled, tmp_path):
    rows, _, (_, _, with_profile) = profiled
    _, _, without = trained(configured(tmp_path, rows, "profile=false"))
    assert not (tmp_path / "run" / "profile.jsonl").exists()
    for key in ("loss", "task_loss", "divergence", "grad_norm"):
        assert [row[key] for row in with_profile] == [row[key] for row in without]


def test_rows_add_up_to_the_summary(profiled):
    rows, config, (found, summary, _) = profiled
    assert (summary["steps"], summary["world_size"], summary["device"]) == (2, 1, "cpu")
    assert summary["micro_batches_per_rank_and_step"] == config.train.grad_accum_steps
    passes = 2 * config.train.grad_accum_steps
    for name, cost in summary["parts"].items():
        own = [row for row in found if row["part"] == name]
        assert cost["flops"] == sum(row["flops"] for row in own)
        assert cost["seconds"] == pytest.approx(sum(row["seconds"] for row in own))
        assert cost["flops_per_rank_and_micro_batch"] == cost["flops"] / passes
        assert cost["flops_share"] == pytest.approx(cost["flops"] / summary["all"]["flops"])
        assert 0 < cost["peak_memory_bytes"] <= summary["all"]["peak_memory_bytes"]
    assert sum(c["seconds_share"] for c in summary["parts"].values()) == pytest.approx(1)
    expected = expected_flops(rows)
    safe = expected[regions.REFERENCE_TRUNK] + expected[regions.HEAD_DIVERGENCE]
    assert summary["safety_path"]["flops"] == 2 * safe
    assert summary["all"]["flops"] == 2 * sum(expected.values())
    assert summary["all"]["bytes"] == {}


def test_parts_take_no_longer_than_the_step(profiled):
    _, _, (found, _, metrics) = profiled
    for step, row in enumerate(metrics):
        of_parts = sum(r["seconds"] for r in found if r["step"] == step and r["part"] != "other")
        assert 0 < of_parts <= row["step_time_s"]


def test_the_table_and_the_figure(profiled, tmp_path, capsys):
    rows, *_ = profiled
    config = configured(tmp_path, rows)
    trained(config)
    out = capsys.readouterr().out
    assert "profile of 2 steps, 1 ranks, cpu (peak: resident memory)" in out
    (line,) = [line for line in out.splitlines() if line.startswith("* reference trunk")]
    assert with_unit(expected_flops(rows)[regions.REFERENCE_TRUNK]) in line.split()
    height, width, _ = imread(tmp_path / "run" / "profile.png").shape
    assert width > height > 100
    page = write_report([tmp_path / "run"]).read_text("utf-8")
    assert base64.b64encode((tmp_path / "run" / "profile.png").read_bytes()).decode() in page


def test_a_resumed_run_has_each_step_once(tmp_path):
    config = configured(tmp_path, RAGGED, "train.save_every=1", "train.steps=3")
    rows, _, _ = trained(config)
    run = tmp_path / "run"
    for name in ("summary.json", "profile.json"):
        (run / name).unlink()
    lines = (run / "profile.jsonl").read_text()
    (run / "profile.jsonl").write_text(lines[:-5])  # killed while it wrote
    again, summary, _ = trained(config)  # from the checkpoint after step 2 of 3
    key = [(r["step"], r["part"], r["flops"]) for r in rows]
    assert [(r["step"], r["part"], r["flops"]) for r in again] == key
    assert summary["steps"] == 3


@pytest.mark.parametrize("content", ["{\n", "[]\n", '{"part": "probe"}\n'])
def test_a_profile_that_cannot_be_read_is_refused(tmp_path, content):
    config = configured(tmp_path, RAGGED)
    run = build_run(config, start_backend(config))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config_to_yaml(config))
    (tmp_path / "run" / "profile.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=r"profile\.jsonl cannot be read .* profile=false"):
        train(run, None)


def test_profiling_is_no_other_run(tmp_path):
    config = configured(tmp_path, RAGGED)
    assert config_hash(config) == config_hash(configured(tmp_path, RAGGED, "profile=false"))


def test_a_reference_side_probe_is_billed_in_its_first_epoch(tmp_path):
    from step_flops import _random_probe

    config = configured(
        tmp_path, RAGGED, "risk.estimator=probe", f"risk.path={tmp_path}/probe", "risk.cache=none"
    )
    _random_probe(tmp_path / "model", 1, "last_prompt_token", "linear").save(tmp_path / "probe")
    rows, _, _ = trained(config)
    assert flops_by_part(rows, 0)[regions.PROBE] == sum(forward_flops(1, RAGGED.prompts))
    assert regions.PROBE not in flops_by_part(rows, 1)


# The recorder by itself


def product(size):
    """FLOPs of the product that is made here."""
    torch.mm(torch.ones(size, size), torch.ones(size, size))
    return 2 * size**3


def test_an_inner_part_is_not_the_outer_one():
    marked = region(regions.PROBE)(product)
    with Recorder() as recorder:
        with region(regions.POLICY_FORWARD):
            outer = product(3)
            inner = marked(5)
            outer += product(7)
        rest = product(2)
    found = {name: cost.flops for name, cost in recorder.totals().items()}
    assert found == {regions.POLICY_FORWARD: outer, regions.PROBE: inner, regions.OTHER: rest}
    assert recorder.flops == outer + inner + rest
    assert list(found) == [regions.POLICY_FORWARD, regions.PROBE, regions.OTHER]


def test_seconds_are_those_of_the_innermost_part(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(seconds):
        clock[0] += seconds

    with Recorder() as recorder:
        work(1)
        with region(regions.POLICY_FORWARD):
            work(2)
            with region(regions.PROBE):
                work(4)
            work(8)
        work(16)
    assert {name: cost.seconds for name, cost in recorder.totals().items()} == {
        regions.POLICY_FORWARD: 10.0,
        regions.PROBE: 4.0,
        regions.OTHER: 17.0,
    }


def test_a_part_that_fails_is_left():
    with Recorder() as recorder:
        with pytest.raises(ZeroDivisionError), region(regions.PROBE):
            _ = 1 / 0
        product(3)
    assert recorder.totals()[regions.OTHER].flops == 54
    assert region(regions.PROBE)(product)(3) == 54  # nothing listens any more
    assert recorder.flops == 54


def test_marks_around_a_recorder_are_not_its_own():
    with region(regions.PROBE), Recorder() as recorder:
        product(3)
    assert recorder.totals()[regions.OTHER].flops == 54


def test_inference_mode_and_backward_are_seen():
    weight = torch.randn(4, 3, requires_grad=True)
    with Recorder() as recorder:
        with region(regions.CRITIC), torch.inference_mode():
            torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
        loss = torch.nn.functional.linear(torch.ones(2, 3), weight).sum()
        with region(regions.POLICY_BACKWARD):
            loss.backward()
    found = {name: cost.flops for name, cost in recorder.totals().items()}
    assert found == {regions.CRITIC: 48, regions.OTHER: 48, regions.POLICY_BACKWARD: 48}


def test_parts_of_another_thread_are_counted_and_take_no_time():
    def work():
        product(5)
        region(regions.CRITIC)(product)(3)

    with Recorder() as recorder, region(regions.PROBE):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    found = recorder.totals()
    assert (found[regions.CRITIC].flops, found[regions.CRITIC].seconds) == (54, 0)
    assert found[regions.PROBE].flops == 0


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


COLLECTIVES = {
    "all_reduce": (lambda x: dist.all_reduce(x), "all_reduce", 24),
    "broadcast": (lambda x: dist.broadcast(x, 0), "broadcast", 24),
    "reduce": (lambda x: dist.reduce(x, 0), "reduce", 24),
    "all_gather": (lambda x: dist.all_gather([torch.empty_like(x)], x), "all_gather", 24),
    "all_to_all": (lambda x: dist.all_to_all_single(torch.empty_like(x), x), "all_to_all", 24),
    "reduce_scatter": (lambda x: dist.reduce_scatter(x, [x.clone()]), "reduce_scatter", 24),
    "gather": (lambda x: dist.gather(x, [torch.empty_like(x)]), "gather", 24),
    "scatter": (lambda x: dist.scatter(torch.empty_like(x), [x]), "scatter", 24),
    "barrier": (lambda x: dist.barrier(), "barrier", 0),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_are_seen_with_their_payload(name, group):
    call, kind, size = COLLECTIVES[name]
    with Recorder() as recorder, region(regions.AGREEMENT):
        call(torch.ones(6))
    cost = recorder.totals()[regions.AGREEMENT]
    assert (dict(cost.bytes), dict(cost.calls)) == ({kind: size}, {kind: 1})
    assert recorder.safety_bytes == recorder.total_bytes == size


@pytest.fixture
def three_ranks():
    """The first of three ranks; its collectives are called as usual and carry nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    yield
    dist.destroy_process_group()


def parts_of(x):
    return [torch.empty_like(x) for _ in range(3)]


OF_THREE = {
    # Of 6 float32 here: what all ranks give together, or what this rank gives to all.
    "all_gather": (lambda x: dist.all_gather(parts_of(x), x), 72),
    "all_gather_into_tensor": (lambda x: dist.all_gather_into_tensor(x.new_empty(18), x), 72),
    "reduce_scatter": (lambda x: dist.reduce_scatter(x, parts_of(x)), 72),
    "reduce_scatter_tensor": (lambda x: dist.reduce_scatter_tensor(x, x.new_empty(18)), 72),
    "all_to_all": (lambda x: dist.all_to_all(parts_of(x), parts_of(x)), 72),
    "gather": (lambda x: dist.gather(x, parts_of(x)), 24),
    "scatter": (lambda x: dist.scatter(x, parts_of(x)), 24),
}


@pytest.mark.parametrize("name", OF_THREE)
def test_the_payload_is_whole_where_ranks_hold_parts(name, three_ranks):
    call, size = OF_THREE[name]
    with Recorder() as recorder, region(regions.AGREEMENT):
        call(torch.ones(6))
    kind = name.removesuffix("_tensor").removesuffix("_into")
    assert dict(recorder.totals()[regions.AGREEMENT].bytes) == {kind: size}
