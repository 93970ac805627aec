"""Claimed: a hidden layer separates what no line does and a direction is the difference of the
means; near-duplicates never part; background rows of the user's count; a probe of either position,
kind and calibration does on new rows what its file says; sweep, evaluate and score agree with plain
transformers; and labels can come from what the model itself refuses.

The judges are NumPy, scikit-learn, and single unpadded forwards. Exact: files, splits, refusals.
Rounds: whole forwards in float32 (1e-4). Models are random, but for one that is taught to refuse.
"""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from support import oracles
from support.builders import WORDS, save_model, tiny_model, word_tokenizer, write_jsonl

from safereg_dist.cli import main
from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import ConfigError, DataError, ProbeError
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.probe_lab.apply import score_rows
from safereg_dist.probe_lab.evaluate import evaluate_probe
from safereg_dist.probe_lab.fit import fit_probe
from safereg_dist.probe_lab.layer_fit import Recipe, fit_layer
from safereg_dist.probe_lab.split import SplitRows, split_rows
from safereg_dist.risk.probe import Probe, load_probes, rescale

POSITIONS = ("prompt", "response")


def rows_of(count=240, *, seed=0, tell="both"):
    """Exchanges whose label is one word of the prompt, of the answer, or of both."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        harmful = bool(i % 2)
        words = [str(w) for w in draw.choice(WORDS[10:], size=draw.integers(3, 7))]
        answer = [str(w) for w in draw.choice(WORDS[10:], size=draw.integers(1, 4))]
        tells = (tell in ("both", "prompt") and harmful, tell in ("both", "response") and harmful)
        rows.append(
            {
                "id": f"row-{i}",
                "prompt": " ".join([*words, "w1" if tells[0] else "w2"]),
                "response": " ".join([*answer, "w3" if tells[1] else "w4"]),
                "label": "harmful" if harmful else "benign",
            }
        )
    return rows


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("verbs") / "model", tiny_model(seed=5))


@pytest.fixture(scope="module")
def fitted(model_dir, tmp_path_factory):
    """A folder with a linear probe for prompts and an isotonic mlp for responses."""
    folder = tmp_path_factory.mktemp("verbs") / "probe"
    data = write_jsonl(folder.with_suffix(".jsonl"), rows_of())
    common = {"layers": [2], "recall": 0.9, "background": 60, "progress": False}
    fit_probe(model_dir, data, folder / "prompt", **common)
    fit_probe(
        model_dir,
        data,
        folder / "response",
        position="response",
        kinds=("mlp",),
        calibration="isotonic",
        **common,
    )
    return folder


def plain_risk(model_dir, probe, messages):
    """Largest probability over the assistant turns, each by plain unpadded forwards."""
    model, tokenizer = tiny_model(seed=5).eval(), word_tokenizer()

    def ids(turns, **how):
        return tokenizer.apply_chat_template(turns, return_dict=True, **how)["input_ids"]

    risks = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, full = ids(messages[:turn], add_generation_prompt=True), ids(messages[: turn + 1])
        with torch.no_grad():
            out = model(torch.tensor([full]), output_hidden_states=True)
        states = out.hidden_states[probe.layer][0]
        span = states[: len(prompt)] if probe.position == "prompt" else states[len(prompt) :]
        pooled = torch.from_numpy(oracles.pooled(span, probe.pooling))
        risks.append(float(probe.probability(pooled[None])))
    return max(risks)


# Fits on one layer


def four_parts(harmful, seed=0):
    """Every row its own group; parts and folds at random."""
    draw = np.random.default_rng(seed)
    count = len(harmful)
    part = draw.choice(3, size=count, p=[0.6, 0.2, 0.2])
    return SplitRows(
        np.asarray(harmful),
        np.zeros(count, bool),
        part,
        draw.integers(0, 3, count),
        np.arange(count),
    )


def test_a_hidden_layer_separates_what_no_line_does():
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(600, 6, generator=draw) * torch.tensor([1.0, 1.0, 5.0, 0.1, 1.0, 1.0])
    harmful = (states[:, 0] * states[:, 1] > 0).numpy()
    rows = four_parts(harmful)
    found = {
        kind: fit_layer(states, rows, 1, Recipe(pooling="mean_prompt", kind=kind)).report
        for kind in ("linear", "mlp")
    }
    assert found["linear"].auroc < 0.7
    assert found["mlp"].auroc > 0.95
    assert found["mlp"].l2 > 0
    again = fit_layer(states, rows, 1, Recipe(pooling="mean_prompt", kind="mlp")).report
    assert (again.auroc, again.threshold) == (found["mlp"].auroc, found["mlp"].threshold)


def test_a_direction_is_the_difference_of_the_means():
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(300, 5, generator=draw) * torch.tensor([1.0, 3.0, 0.2, 1.0, 1.0]) + 2
    harmful = np.arange(300) % 2 == 0
    states[harmful] += torch.tensor([0.5, 0.0, 0.1, 0.0, -0.5])
    rows = four_parts(harmful)
    fit = fit_layer(states, rows, 1, Recipe(pooling="mean_prompt", kind="direction"))
    part = rows.where("fit")
    x = states.double().numpy()
    z = (x - x[part].mean(0)) / x[part].std(0, ddof=1)
    way = z[part & harmful].mean(0) - z[part & ~harmful].mean(0)
    cosine = np.dot(fit.probe.weight.numpy(), way) / (
        np.linalg.norm(fit.probe.weight.numpy()) * np.linalg.norm(way)
    )
    assert cosine == pytest.approx(1, abs=1e-6)
    middle = (z[part & harmful].mean(0) + z[part & ~harmful].mean(0)) / 2
    state = torch.from_numpy(middle * x[part].std(0, ddof=1) + x[part].mean(0)).float()
    assert float(fit.probe.probability(state[None])) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("calibration", ["temperature", "isotonic"])
@pytest.mark.parametrize("kind", ["linear", "mlp", "direction"])
def test_calibration_keeps_ranking_threshold_and_honesty(kind, calibration):
    draw = torch.Generator().manual_seed(3)
    harmful = np.arange(4000) % 2 == 0
    states = torch.randn(4000, 4, generator=draw)
    states[:, 0] += torch.from_numpy(harmful) * 1.5
    rows = four_parts(harmful)
    recipe = Recipe(pooling="mean_prompt", kind=kind, calibration=calibration, recall=0.9)
    report, probe = (fit := fit_layer(states, rows, 1, recipe)).report, fit.probe
    assert (probe.knots_x is not None) == (calibration == "isotonic")
    ideal = roc_auc_score(harmful, states[:, 0].numpy())
    assert report.auroc == pytest.approx(ideal, abs=0.03)
    assert report.calibration_error < 0.06
    low, high = report.intervals["auroc"]
    assert low < report.auroc < high
    assert high - low < 0.1
    calibrate = rows.calibration_positives
    assert (fit.probability[calibrate] >= probe.threshold).mean() >= 0.9
    assert report.recall == pytest.approx(0.9, abs=0.05)


# The split


def test_near_duplicates_never_part():
    draw = np.random.default_rng(0)
    prompts = []
    for label in ("harmful", "benign"):
        for i in range(40):
            words = list(draw.choice(WORDS, size=30))
            for copy in range(3):
                text = " ".join(words) + (f" extra{copy}" if copy else "")
                turn = {"role": "user", "content": text}
                prompts.append(
                    LabelledPrompt(id=f"{label}{i}", messages=[turn], label=label, response=None)
                )
    order = draw.permutation(len(prompts))
    prompts = [prompts[i] for i in order]
    rows = split_rows(prompts, [], 0.2, 0)
    part_of = {}
    for prompt, part, fold in zip(prompts, rows.part, rows.fold, strict=True):
        assert part_of.setdefault(prompt.id, (part, fold)) == (part, fold)
    assert len({group for group in rows.group}) == 80
    for part in ("fit", "calibrate", "hold_out"):
        assert rows.where(part).sum() / len(prompts) == pytest.approx(
            {"fit": 0.6}.get(part, 0.2), abs=0.03
        )
    assert rows.calibration_positives.sum() == 8  # of 24 rows: each near-duplicate once


# Verbs


def test_both_positions_from_the_command_line(model_dir, tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of())
    fresh = write_jsonl(tmp_path / "fresh.jsonl", rows_of(80, seed=8))
    status = main(
        [
            *("probe", "fit", "--model", str(model_dir), "--data", str(data)),
            *("--out", str(tmp_path / "probe"), "--position", "both", "--layers", "1,3"),
            *("--recall", "0.9", "--background", "60", "--kind", "linear,direction"),
            *("--pooling", "mean_prompt", "--calibration", "isotonic"),
            *("--json", str(tmp_path / "fit.json")),
        ]
    )
    assert status == 0
    printed, err = capsys.readouterr()
    anchor = tmp_path / f"anchor-{model_dir.name}.jsonl"
    given = f"--model {model_dir} --prompts {data} --out {anchor}"
    assert err.splitlines()[-1] == f"now: safereg anchor build {given}"
    assert printed.count("<- chosen") == 2
    assert printed.count("not under attack or shift") == 2
    assert "flags a new harmful response with probability at least 0.9" in printed
    probes = load_probes(tmp_path / "probe")
    assert [(p.position, p.pooling) for p in probes] == [
        ("prompt", "mean_prompt"),
        ("response", "mean_response"),
    ]
    figures = json.loads((tmp_path / "fit.json").read_text())["probes"]
    for probe in probes:
        own = figures[probe.position]
        assert own["metrics"] == probe.meta["metrics"]
        assert own["threshold"] == probe.threshold
        assert own["folder"] == str(tmp_path / "probe" / probe.position)
        assert probe.meta["guarantee"]["level"] == 0.9
        assert probe.meta["guarantee"]["calibration_positives"] == 24
        assert len(probe.meta["layers"]) == 4
        assert probe.meta["metrics"]["auroc"] > 0.6  # one word of a mean over ten
        assert len(probe.meta["template_sha256"]) == len(probe.meta["data_sha256"]) == 64
    assert evaluate_probe(
        tmp_path / "probe", model_dir, fresh, tmp_path / "out.json", progress=False
    )["probes"].keys() == {"prompt", "response", "both"}


def test_a_response_probe_sees_what_a_prompt_probe_cannot(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(600, tell="response"))
    reports = {
        position: fit_probe(
            model_dir,
            data,
            tmp_path / position,
            position=position,
            layers=[1],
            recall=0.8,
            background=0,
            progress=False,
        )
        for position in POSITIONS
    }
    assert reports["prompt"].chosen.auroc < 0.75
    assert reports["response"].chosen.auroc > 0.9


def test_background_rows_of_the_user(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of())
    draw = np.random.default_rng(4)
    texts = [" ".join(draw.choice(WORDS[50:], size=6)) for _ in range(50)]
    own = write_jsonl(tmp_path / "own.jsonl", [{"prompt": t, "response": "w9"} for t in texts])
    report = fit_probe(
        model_dir,
        data,
        tmp_path / "probe",
        layers=[1],
        background=0,
        background_file=own,
        recall=0.9,
        progress=False,
    )
    assert report.probe.meta["background"] == 50
    assert 0 <= report.chosen.background_false_positive_rate <= 1
    harmful = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "w1", "label": "harmful"}])
    with pytest.raises(DataError, match="move it to --data"):
        fit_probe(model_dir, data, tmp_path / "no", background_file=harmful, progress=False)


def test_a_sweep_saves_tables_and_no_probe(model_dir, tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(150))
    out = tmp_path / "sweep"
    arguments = [
        *("probe", "sweep", "--model", str(model_dir), "--data", str(data), "--out", str(out)),
        *("--recall", "0.9", "--background", "30", "--layers", "1,3", "--kind", "linear,direction"),
    ]
    assert main([*arguments, "--json", str(tmp_path / "figures.json")]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["sweep.csv", "sweep.json", "sweep.png"]
    facts = json.loads((out / "sweep.json").read_text())
    assert json.loads((tmp_path / "figures.json").read_text()) == {"sweeps": [facts]}
    with (out / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    wanted = {
        (str(layer), kind, pooling)
        for layer in (1, 3)
        for kind in ("linear", "direction")
        for pooling in ("last_prompt_token", "mean_prompt", "both_prompt")
    }
    assert {(r["layer"], r["kind"], r["pooling"]) for r in lines} == wanted
    for line, stored in zip(lines, facts["layers"], strict=True):
        assert float(line["auroc"]) == stored["auroc"]
        assert float(line["auroc_low"]) == stored["intervals"]["auroc"][0]
    printed, err = capsys.readouterr()
    assert printed.count("<- chosen") == 1
    best = facts["chosen"]
    assert f"--layers {best['layer']} --position prompt --kind {best['kind']}" in err


def test_evaluate_measures_what_plain_transformers_say(model_dir, fitted, tmp_path):
    rows = rows_of(60, seed=3)
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = evaluate_probe(fitted, model_dir, data, tmp_path / "all.json", progress=False)
    assert json.loads((tmp_path / "all.json").read_text()) == found
    labels = np.array([row["label"] == "harmful" for row in rows])
    scaled = []
    for probe in load_probes(fitted):
        risk = np.array([plain_risk(model_dir, probe, conversation(row)) for row in rows])
        got = found["probes"][probe.position]
        assert got["auroc"] == pytest.approx(roc_auc_score(labels, risk), abs=2e-3)
        assert got["brier"] == pytest.approx(np.mean((risk - labels) ** 2), abs=1e-4)
        scaled.append([rescale(r, probe.threshold) for r in risk])
    both = np.max(scaled, axis=0)
    assert found["probes"]["both"]["recall"] == (both[labels] >= 0.5).mean()
    assert found["same_model"]
    assert found["same_template"]
    names = {p.name for p in tmp_path.iterdir()} - {"rows.jsonl"}
    figures = {f"all.{p}.{f}.png" for p in (*POSITIONS, "both") for f in ("roc", "reliability")}
    assert names == {"all.json"} | figures


def test_evaluate_refuses_another_model_unless_forced(fitted, tmp_path, capsys):
    other = save_model(tmp_path / "other", tiny_model(seed=6))
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(40))
    command = [
        *("probe", "evaluate", "--probe", str(fitted / "prompt"), "--model", str(other)),
        *("--data", str(data), "--out", str(tmp_path / "out.json")),
    ]
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
    capsys.readouterr()
    assert main([*command, "--force", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "out.json").read_text())
    assert not figures["same_model"]
    wider = save_model(tmp_path / "wider", tiny_model(hidden_size=64))
    with pytest.raises(ProbeError, match="features of layer 2"):
        evaluate_probe(fitted, wider, data, tmp_path / "out.json", force=True, progress=False)
    one_class = write_jsonl(tmp_path / "one.jsonl", rows_of(40)[::2])
    with pytest.raises(DataError, match="both kinds"):
        evaluate_probe(fitted, other, one_class, tmp_path / "out.json", progress=False)


# Raw rows


def conversation(row):
    if "messages" in row:
        return row["messages"]
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["response"]},
    ]


RAW = [
    *rows_of(9, seed=6),
    {
        "messages": [
            {"role": "user", "content": "w20 w21"},
            {"role": "assistant", "content": "w22 w3"},
            {"role": "user", "content": "w23 w24 w1"},
            {"role": "assistant", "content": "w25"},
        ]
    },
]


@pytest.mark.parametrize("which", ["prompt", "response", "."])
def test_scores_of_raw_rows(model_dir, fitted, which):
    got = score_rows(fitted / which, model_dir, RAW, batch_size=4, progress=False)
    probes = load_probes(fitted / which)
    for row, risk in zip(RAW, got, strict=True):
        raw = [plain_risk(model_dir, probe, conversation(row)) for probe in probes]
        each = [rescale(r, p.threshold) for r, p in zip(raw, probes, strict=True)]
        assert risk == pytest.approx(max(each), abs=1e-3)


def test_raw_rows_that_cannot_be_scored(model_dir, fitted, tmp_path):
    long = {"prompt": "w1 " * 300, "response": "w2"}
    with pytest.raises(DataError, match=r"row 2 has 30\d tokens, the model takes 128"):
        score_rows(fitted, model_dir, [RAW[0], long], progress=False)
    with pytest.raises(DataError, match="row 1"):
        score_rows(fitted, model_dir, [{"prompt": "w1"}], progress=False)
    other = save_model(tmp_path / "other", tiny_model(seed=6))
    with pytest.raises(ProbeError, match="fit a probe on this model"):
        score_rows(fitted, other, RAW, progress=False)


def test_raw_rows_whose_states_are_not_finite(model_dir, fitted, tmp_path):
    """Weights that fail are the probe's own model: only the fingerprint is forged."""
    model = tiny_model(seed=5)
    with torch.no_grad():
        model.get_input_embeddings().weight[word_tokenizer().convert_tokens_to_ids("w88")] = (
            math.nan
        )
    broken = save_model(tmp_path / "broken", model)
    for probe in load_probes(fitted):
        replace(probe, fingerprint=model_fingerprint(model)).save(tmp_path / "p" / probe.position)
    clean = [row for row in RAW if "w88" not in json.dumps(row)]
    assert len(score_rows(tmp_path / "p", broken, clean, progress=False)) == len(clean)
    bad = {"prompt": "w88 w2", "response": "w3"}
    with pytest.raises(DataError, match=r"row 3 has no finite risk.*layer"):
        score_rows(tmp_path / "p", broken, [*clean[:2], bad], progress=False)


# Labels from the model's own behaviour


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """A tiny model that was taught to say Sorry to prompts with w1, and w5 to all others."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["Sorry"])
    model = tiny_model(seed=7, vocab=len(tokenizer), num_hidden_layers=2, initializer_range=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    sorry, other, end = tokenizer.convert_tokens_to_ids(["Sorry", "w5", "<eos>"])
    for seed in range(60):
        rows = rows_of(48, seed=100 + seed)
        turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        answers = [sorry if row["label"] == "harmful" else other for row in rows]
        full = [[*p, a, end] for p, a in zip(ids["input_ids"], answers, strict=True)]
        width = max(map(len, full))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in full])
        labels = torch.full_like(tokens, -100)
        for place, row in enumerate(full):
            labels[place, len(row) - 2 : len(row)] = torch.tensor(row[-2:])
        optimizer.zero_grad()
        model(tokens, attention_mask=(tokens != 0).long(), labels=labels).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("refusing") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("has_labels", [True, False])
def test_labels_from_what_the_model_refuses(refusing, tmp_path, capsys, has_labels):
    rows = rows_of(240)
    if not has_labels:
        rows = [{"prompt": row["prompt"]} for row in rows]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = fit_probe(
        refusing,
        data,
        tmp_path / "probe",
        self_supervised=True,
        recall=0.9,
        background=60,
        work=tmp_path / "work",
        progress=False,
    )
    printed = capsys.readouterr().out
    probe = Probe.load(tmp_path / "probe")
    assert (probe.kind, probe.meta["labels"]) == ("direction", "behaviour")
    assert report.chosen.auroc > 0.9
    assert "flags a new prompt that the model refuses" in printed
    if has_labels:
        compared = probe.meta["comparison"]
        assert compared["behaviour_agrees_with_labels"] > 0.95
        assert compared["auroc_self_supervised"] > 0.9
        assert compared["auroc_supervised"] > 0.9
        assert compared["agreement"] > 0.8
        assert f"agreement of the two {compared['agreement']:.3f}" in printed
    else:
        assert probe.meta["comparison"] is None
        assert "no labels to compare with" in printed
    assert len(list((tmp_path / "work" / "answers").iterdir())) == 1


def test_the_labels_in_the_data_do_not_leak_into_a_self_supervised_fit(refusing, tmp_path):
    rows = rows_of(240)
    turned = [
        {**row, "label": {"harmful": "benign", "benign": "harmful"}[row["label"]]} for row in rows
    ]
    weights = []
    for name, part in (("right", rows), ("wrong", turned)):
        data = write_jsonl(tmp_path / f"{name}.jsonl", part)
        options = {"self_supervised": True, "recall": 0.9, "background": 60, "progress": False}
        weights.append(fit_probe(refusing, data, tmp_path / name, **options).probe)
    assert weights[0].identity == weights[1].identity
    assert weights[1].meta["comparison"]["behaviour_agrees_with_labels"] < 0.1


def test_a_model_that_refuses_nothing_gives_no_labels(model_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": r["prompt"]} for r in rows_of(60)])
    with pytest.raises(DataError, match="refused 0 of 60 prompts"):
        fit_probe(model_dir, data, tmp_path / "probe", self_supervised=True, progress=False)


def test_a_model_that_refuses_too_little_is_named_and_not_the_prompts(refusing, tmp_path):
    """All 140 are harmful by their label; it refuses the 20 with w1, give or take a mistake."""
    rows = [row for row in rows_of(240) if row["label"] == "benign"]
    rows += [row for row in rows_of(240) if row["label"] == "harmful"][:20]
    data = write_jsonl(tmp_path / "rows.jsonl", [{**row, "label": "harmful"} for row in rows])
    with pytest.raises(ProbeError, match=r"needs about 95 refused ones .* give labels") as caught:
        fit_probe(refusing, data, tmp_path / "probe", self_supervised=True, progress=False)
    assert 15 <= int(str(caught.value).split()[3]) <= 25
    assert " of 140 prompts" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kinds": ("forest",)}, "--kind must be one of linear, mlp, direction"),
        ({"kinds": ()}, "--kind"),
        ({"calibration": "platt"}, "--calibration"),
        ({"position": "middle"}, "--position"),
        ({"position": "response", "pooling": "mean_prompt"}, "--pooling"),
        ({"self_supervised": True, "position": "response"}, "--self-supervised"),
        ({"held_out_fraction": math.nan}, "held_out_fraction"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, says):
    # Nothing is there: options are refused before anything is read.
    with pytest.raises(ConfigError, match=says):
        fit_probe(tmp_path / "model", tmp_path / "data", tmp_path / "out", **options)
