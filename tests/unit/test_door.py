"""Claimed: the names that `safereg_dist` gives work together in a loop of one's own.

Judges: plain transformers with full logits of both models, in float64. Exact: what the step says of
its rows, state that is saved and loaded, collectives of nobody in one process. Rounds: float32 of
the model, 1e-5.
"""

import copy
import doctest
import importlib
import math
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from support.builders import tiny_model
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import safereg_dist
from safereg_dist import RiskSource, SafeRegError, collate, filler, prepare, row_of
from safereg_dist.errors import ConfigError, DataError, GroupError
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe
from safereg_dist.types import head_of

SETTINGS = {
    "risk": {"estimator": "column"},
    "regularizer": {"schedule": "linear", "ceiling": 0.8},
    "train": {"precision": "fp32", "micro_batch_size": 2},
}
ROWS = [
    row_of("a", [1, 9, 8, 7, 2], [0, 0, 1, 1, 1], risk=0.0),
    row_of("b", [1, 5, 6, 2, 11, 12], [0, 0, 0, 1, 1, 0], risk=0.75),
    row_of("c", [1, 30, 2], [0, 1, 1], risk=0.5),
    row_of("anchor", [1, 31, 32, 2], [0, 0, 1, 1], is_anchor=True),
]


def take_step(regularizer, model, rows, *, micro_batches=2, step=0):
    """A loop of one's own: gradients add up in the model; what the step did."""
    plan = regularizer.plan(rows, step=step, micro_batches=micro_batches)
    total = 0.0
    for planned in plan.micro_batches:
        batch = collate(planned.rows, pad_id=0)
        with regularizer.loss_of(planned, batch, plan):
            loss = model(input_ids=batch.input_ids, use_cache=False).logits
        loss.backward()
        total += loss.item()
    return total, regularizer.close(plan)


def judged(model, reference, rows, coefficient):
    """The loss by the equations, with full logits in float64; gradients add up in `model`."""
    model, reference = model.double(), reference.double()
    total, count = 0.0, sum(sum(row.loss_mask[1:]) for row in rows)
    for row in rows:
        b = 1.0 if row.is_anchor else coefficient(row.risk)
        ids = torch.tensor([row.input_ids])
        p = log_softmax(model(input_ids=ids).logits[0], -1)
        with torch.no_grad():
            q = log_softmax(reference(input_ids=ids).logits[0], -1)
        for t in range(1, len(row.input_ids)):
            if row.loss_mask[t]:
                ce = cross_entropy(p[t - 1][None], ids[0, t][None])
                apart = kl_div(p[t - 1], q[t - 1], reduction="sum", log_target=True)
                total = total + ((1 - b) * ce + b * apart) / count
    total.backward()
    return total.item()


def assert_same_gradients(model, expected):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        scale = q.grad.abs().max().clamp_min(1e-6)
        assert float((p.grad.double() - q.grad).abs().max() / scale) < 1e-5, name


def test_a_loop_of_ones_own_equals_the_equations():
    model, reference = tiny_model(seed=0), tiny_model(seed=1)
    expected = copy.deepcopy(model)
    truth = judged(expected, copy.deepcopy(reference), ROWS, lambda risk: 0.8 * risk)
    regularizer = prepare(model, SETTINGS, reference=reference)
    loss, totals = take_step(regularizer, model, ROWS)
    assert loss == pytest.approx(truth, rel=1e-5)
    assert totals.sums["loss"] == pytest.approx(truth, rel=1e-5)
    assert_same_gradients(model, expected)
    assert {row.id: row.kl_coef for row in totals.ledger_rows} == pytest.approx(
        {"a": 0.0, "b": 0.6, "c": 0.4, "anchor": 1.0}
    )
    assert totals.sums["reference_rows"] == 3
    row = totals.metrics_row(step=0, lr=1e-3, grad_norm=1.0, step_time_s=1.0)
    assert (row["rows"], row["active_rows"], row["risk_max"]) == (4, 3, 0.75)


def test_outside_a_step_the_model_is_as_it_was():
    model = tiny_model()
    ids = torch.tensor([[1, 9, 8, 7]])
    before = model(input_ids=ids).logits
    regularizer = prepare(model, SETTINGS, reference=tiny_model(seed=1))
    take_step(regularizer, model, ROWS)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


class Adapted(torch.nn.Module):
    """A linear layer with an adapter beside it, as LoRA has."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.is_on = layer, True
        self.low = torch.nn.Parameter(0.1 * torch.randn(layer.in_features, 2))
        self.high = torch.nn.Parameter(0.1 * torch.randn(2, layer.out_features))

    def forward(self, x):
        """The layer, and what the adapter adds to it."""
        return self.layer(x) + (x @ self.low @ self.high if self.is_on else 0.0)


class AdaptersOff:
    """A reference that is the policy itself with its adapters off: no weights of its own."""

    def __init__(self, model, adapters):
        self.model, self.adapters, self.passes = model, adapters, 0

    @property
    def head(self):
        """The policy's own."""
        return head_of(self.model)

    @contextmanager
    def _off(self):
        self.passes += 1
        for adapter in self.adapters:
            adapter.is_on = False
        with torch.no_grad():
            yield
        for adapter in self.adapters:
            adapter.is_on = True

    def hidden_states(self, input_ids):
        """[B, S, H] last hidden states of the model as it was before."""
        with self._off():
            return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def prefix_states(self, input_ids, num_layers):
        """Not asked for by a column."""
        raise NotImplementedError

    @contextmanager
    def gathered_head(self):
        """The policy's own head."""
        yield self.head


def test_a_reference_can_be_the_policy_with_its_adapters_off():
    torch.manual_seed(3)
    model = tiny_model()
    frozen = copy.deepcopy(model)
    adapters = []
    for layer in model.base_model.layers:
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj)
        adapters.append(layer.mlp.up_proj)
    model.lm_head.weight.requires_grad_(False)
    expected = copy.deepcopy(model)
    truth = judged(expected, frozen, ROWS, lambda risk: 0.8 * risk)
    own = AdaptersOff(model, adapters)
    loss, _ = take_step(prepare(model, SETTINGS, reference=own), model, ROWS)
    assert loss == pytest.approx(truth, rel=1e-5)
    assert own.passes == 2  # three active rows, two of them in a pass
    for adapter, judge in zip(
        adapters, (m for m in expected.modules() if isinstance(m, Adapted)), strict=True
    ):
        for name in ("low", "high"):
            grad, wanted = getattr(adapter, name).grad.double(), getattr(judge, name).grad
            assert float((grad - wanted).abs().max() / wanted.abs().max()) < 1e-5, name


def test_state_comes_back(tmp_path):
    batch_mean = {"granularity": "batch", "ema": 0.5, "schedule": "linear"}
    settings = {**SETTINGS, "regularizer": batch_mean}
    rows, later = ROWS[:2], ROWS[1:3]

    def coefficients(regularizer, model, chosen):
        _, totals = take_step(regularizer, model, chosen, micro_batches=1)
        return [row.kl_coef for row in totals.ledger_rows]

    model = tiny_model()
    regularizer = prepare(model, settings, reference=tiny_model(seed=1))
    coefficients(regularizer, model, rows)
    small = regularizer.save_state(tmp_path / "risk.safetensors")
    expected = coefficients(regularizer, model, later)
    other_model = tiny_model()
    other = prepare(other_model, settings, reference=tiny_model(seed=1))
    assert coefficients(other, other_model, later) != expected
    other.load_state(tmp_path / "risk.safetensors", small)
    assert coefficients(other, other_model, later) == expected


class LongIsRisky(RiskSource):
    """A source of one's own."""

    name = "length"

    def __call__(self, rows, probed=None, *, in_first_epoch):
        """1 for rows of five tokens and more."""
        return [float(len(row.input_ids) >= 5) for row in rows]


@pytest.mark.parametrize(
    ("rows", "micro_batches", "said"),
    [
        ([{"messages": []}], 1, "got a dict for step 3: tokenise it and make it one"),
        (ROWS[:3], 2, "expected a multiple of micro_batches=2 as the rows of step 3, got 3"),
        (ROWS, 0, "expected a multiple of micro_batches=0"),
    ],
)
def test_what_is_no_row_or_is_left_over_is_refused(rows, micro_batches, said):
    regularizer = prepare(tiny_model(), SETTINGS, reference=tiny_model(seed=1))
    with pytest.raises(DataError, match=said):
        regularizer.plan(rows, step=3, micro_batches=micro_batches)


def test_a_risk_of_ones_own_and_rows_that_are_missing():
    model = tiny_model()
    settings = {**SETTINGS, "regularizer": {"ceiling": 0.25}}
    regularizer = prepare(model, settings, reference=tiny_model(seed=1), risk=LongIsRisky())
    _, totals = take_step(regularizer, model, [*ROWS[:3], filler(0)])
    found = {row.id: (row.estimator, row.kl_coef) for row in totals.ledger_rows}
    assert found == {"a": ("length", 0.25), "b": ("length", 0.25), "c": ("length", 0.0)}


class Told(RiskSource):
    """A source that notes what it is told, and fails where it is asked to."""

    sum_names = ("asked",)

    def __init__(self):
        self.told, self.fails = [], False

    def begin_step(self, step):
        """Notes the step."""
        self.told.append(step)

    def __call__(self, rows, probed=None, *, in_first_epoch):
        """No risk."""
        if self.fails:
            raise DataError("no risk today")
        self.told.append(in_first_epoch)
        return [0.0] * len(rows)

    def take_sums(self):
        """How often it was asked in all."""
        return {"asked": float(len(self.told))}

    def end_step(self, total):
        """The same, as a metric."""
        return {"asked": int(total["asked"])}


def test_a_source_is_told_of_steps_and_epochs_and_has_its_metric():
    model, source = tiny_model(), Told()
    regularizer = prepare(model, SETTINGS, reference=tiny_model(seed=1), risk=source)
    _, totals = take_step(regularizer, model, ROWS[:2], step=7)
    assert source.told == [7, True]
    assert totals.risk_metrics == {"asked": 2}
    plan = regularizer.plan(ROWS[:2], step=8, in_first_epoch=False)
    assert source.told == [7, True, 8, False]
    assert not plan.in_first_epoch


@pytest.mark.parametrize("granularity", ["sequence", "batch"])
def test_a_source_that_fails_is_an_error_of_the_forward(granularity):
    """With granularity `batch` too, where ranks agree on the risk before. No gradient is left."""
    model, source = tiny_model(), Told()
    settings = {**SETTINGS, "regularizer": {"granularity": granularity}}
    regularizer = prepare(model, settings, reference=tiny_model(seed=1), risk=source)
    source.fails = True
    plan = regularizer.plan(ROWS, step=0, micro_batches=2)
    batch = collate(plan.micro_batches[0].rows, pad_id=0)
    with (
        pytest.raises(DataError, match="no risk today"),
        regularizer.loss_of(plan.micro_batches[0], batch, plan),
    ):
        model(input_ids=batch.input_ids, use_cache=False)
    assert all(p.grad is None for p in model.parameters())
    source.fails = False
    loss, _ = take_step(regularizer, model, ROWS)
    assert loss > 0


def test_a_probe_on_the_policy_reads_this_forward(tmp_path):
    """Each micro-batch is decided on in its own forward, from the states of its own rows."""
    model, layer, size = tiny_model(), 2, 32
    generator = torch.Generator().manual_seed(4)
    probe = Probe(
        layer=layer,
        pooling="last_prompt_token",
        mean=torch.zeros(size),
        scale=torch.ones(size),
        weight=torch.randn(size, generator=generator) / 16,
        bias=0.0,
        threshold=0.5,
        fingerprint=model_fingerprint(model),
        meta={},
    )
    probe.save(tmp_path / "probe")
    risk = {"estimator": "probe", "path": str(tmp_path / "probe"), "source": "policy"}
    settings = {**SETTINGS, "risk": {**risk, "cache": "none", "drift": "warn"}}
    rows = [row for row in ROWS if not row.is_anchor]
    rows.append(row_of("d", [1, 40, 41, 42, 2], [0, 0, 0, 1, 1]))
    expected = []
    for row in rows:
        with torch.no_grad():
            ids = torch.tensor([row.input_ids])
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[layer]
        logit = states[0, row.prompt_ends[0] - 1].double() @ probe.tensors["weight"].double()
        expected.append(float(torch.sigmoid(logit)))
    assert max(expected) - min(expected) > 0.3  # rows can be told apart
    regularizer = prepare(model, settings, reference=copy.deepcopy(model))
    _, totals = take_step(regularizer, model, rows, step=1)
    assert [row.id for row in totals.ledger_rows] == ["a", "b", "c", "d"]
    assert [row.risk for row in totals.ledger_rows] == pytest.approx(expected, rel=1e-4)
    assert [row.kl_coef for row in totals.ledger_rows] == pytest.approx(
        [0.8 * risk for risk in expected], rel=1e-4
    )


def test_categories_keep_their_ceilings():
    parts = [
        {"category": "mild", "estimator": "column", "threshold": 0.3, "ceiling": 0.25},
        {"category": "grave", "estimator": "column", "threshold": 0.6},
    ]
    settings = {**SETTINGS, "risk": {"estimator": "max", "parts": parts}}
    settings["regularizer"] = {"schedule": "step", "ceiling": 0.8}
    model = tiny_model()
    regularizer = prepare(model, settings, reference=tiny_model(seed=1))
    _, totals = take_step(regularizer, model, ROWS)
    found = {row.id: row.kl_coef for row in totals.ledger_rows}
    assert found == {"a": 0.0, "b": 0.8, "c": 0.25, "anchor": 1.0}


def test_validation_is_the_plain_cross_entropy():
    model = tiny_model()
    regularizer = prepare(model, SETTINGS, reference=tiny_model(seed=1))
    batch = collate(ROWS[:3], pad_id=0)
    with torch.no_grad(), regularizer.task_loss_of(batch) as token_losses:
        total = model(input_ids=batch.input_ids, use_cache=False).logits
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.response_index]
    truth = cross_entropy(logits.double(), batch.labels, reduction="none")
    assert torch.allclose(token_losses[0].double(), truth, rtol=1e-5, atol=1e-6)
    assert float(total) == pytest.approx(truth.sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "mask", "risk", "said"),
    [
        ([5, 6, 7], [0, 1], 0.5, "row 'a' has 3 input_ids and 2 values of loss_mask"),
        ([5, 6], [0, 1], 95, "row 'a' has risk 95: .* divide a percentage by 100"),
        ([5, 6], [0, 1], -0.95, "row 'a' has risk -0.95"),
        ([5, 6], [0, 1], "high", "row 'a' has risk 'high'"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(tokens, mask, risk, said):
    with pytest.raises(DataError, match=said):
        row_of("a", tokens, mask, risk=risk)


def test_a_risk_that_failed_or_is_not_known_stays_so():
    assert row_of("a", [5, 6], [0, 1]).risk is None
    assert math.isnan(row_of("a", [5, 6], [0, 1], risk=math.nan).risk)


def test_a_process_that_was_started_as_one_of_several_never_trains_alone(monkeypatch):
    for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GroupError, match="started 2 processes, which have formed no group"):
        prepare(tiny_model(), SETTINGS, reference=tiny_model(seed=1))
    monkeypatch.setenv("WORLD_SIZE", "1")
    prepare(tiny_model(), SETTINGS, reference=tiny_model(seed=1))


def test_settings_that_are_the_loops_own_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"settings hold .optimizer., .* leave it out"):
        prepare(tiny_model(), {"optimizer": {"lr": 1.0}})
    for key in ({"cache": "store"}, {"balance": "exchange"}):
        with pytest.raises(ConfigError, match="need the data of a whole run"):
            prepare(tiny_model(), {**SETTINGS, "reference": key})
    file = tmp_path / "safety.yaml"
    file.write_text("risk: {estimator: colum}")
    with pytest.raises(SafeRegError, match="colum"):
        prepare(tiny_model(), file)
    with pytest.raises(ConfigError, match=r"none.yaml cannot be read: No such .*: check the path"):
        prepare(tiny_model(), tmp_path / "none.yaml")
    for text, said in {"# later\n": "are empty", "risk: {": "are not YAML", "[]": "a list"}.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            prepare(tiny_model(), file)


@pytest.mark.parametrize("name", [n for n in safereg_dist.__all__ if n != "__version__"])
def test_every_name_is_documented(name):
    assert getattr(safereg_dist, name).__doc__


@pytest.mark.parametrize("module", ["factory.prepare", "data.collation"])
def test_examples_run(module):
    found = doctest.testmod(importlib.import_module(f"safereg_dist.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_the_bare_package_loads_nothing_heavy():
    code = (
        "import sys, safereg_dist; dir(safereg_dist); heavy = {'torch', 'numpy', 'transformers', "
        "'pydantic', 'datasets', 'deepspeed'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        safereg_dist.nothing  # noqa: B018
