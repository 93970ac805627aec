"""Claimed: no answer of a judge and no damage to a cache gives anything but a score in [0, 1], a
malformed answer, or one line.

Hypothesis builds replies, and bytes of good ones are changed, for every format of judge; the pages
of a score cache and of its journal are changed, cut and exchanged. Seeds are fixed, times bounded.
Exact: the kinds of outcome.
"""

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safereg_dist.critic.answers import Judgement, MalformedAnswer, read_reply
from safereg_dist.critic.formats import FORMATS
from safereg_dist.errors import SafeRegError
from safereg_dist.storage.score_cache import CachedScore, ScoreCache

CONVERSATION = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
BOUNDED = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
WORDS = [
    *("safe", "unsafe", "\nS1", "S1,S2", "yes", "no", "n/a", "Safety: Unsafe", "#thescore: 5", "1"),
    *('{"violation": 1}', "<END>", "\n", " ", ",", "\ud800", "\x00", "\u202e"),
    *("Harmful request: no\nResponse refusal: no\nHarmful response: yes", "S" * 5000, "\n" * 5000),
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=6).map("".join)
NUMBERS = st.floats() | st.integers() | st.just(float("nan")) | st.just("-1") | st.none()
TOPS = st.lists(st.fixed_dictionaries({"token": TEXTS, "logprob": NUMBERS}), max_size=3)
TOKENS = st.lists(st.fixed_dictionaries({"token": TEXTS, "top_logprobs": TOPS}), max_size=4)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "message": st.fixed_dictionaries({}, optional={"content": TEXTS, "refusal": ANYTHING})
        | ANYTHING,
        "text": TEXTS | ANYTHING,
        "finish_reason": st.sampled_from(["stop", "length", "content_filter", None, 7]),
        "logprobs": st.fixed_dictionaries({"content": TOKENS}) | ANYTHING,
    },
)
REPLIES = st.fixed_dictionaries({"choices": st.lists(CHOICES, max_size=2)}) | ANYTHING


def read(form, reply) -> list[Judgement]:
    """The judgements of a reply to each question of a format; malformed ones left out."""
    found, said = [], []
    for question in form.questions(CONVERSATION):
        is_chat = not isinstance(question.input, str)
        try:
            found.append(form.read(read_reply(reply, is_chat=is_chat), question))
        except MalformedAnswer as err:
            said.append(str(err))
    assert all("\n" not in text and len(text) < 200 for text in said)
    return found


def is_judgement(judgement: Judgement) -> bool:
    category = judgement.category
    in_range = 0 <= judgement.score <= 1
    return in_range and (category is None or (isinstance(category, str) and len(category) < 1000))


@pytest.mark.parametrize("name", sorted(FORMATS))
@BOUNDED
@given(reply=REPLIES)
def test_no_reply_is_more_than_a_judgement(name, reply):
    began = time.monotonic()
    assert all(is_judgement(each) for each in read(FORMATS[name](), reply))
    assert time.monotonic() - began < 5.0


def good_reply(text: str) -> dict:
    tops = [{"token": text[:3], "logprob": -0.1}, {"token": "no", "logprob": -2.0}]
    tokens = [{"token": text, "top_logprobs": tops}]
    choice = {"message": {"content": text}, "text": text, "finish_reason": "stop"}
    return {"choices": [{**choice, "logprobs": {"content": tokens}}]}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_change_of_bytes_is_more_than_a_judgement(name):
    form, draw = FORMATS[name](), random.Random(0)
    for trial in range(300):
        raw = bytearray(json.dumps(good_reply(draw.choice(WORDS))).encode())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(raw))
            if trial % 3 == 0:
                raw[at] = draw.randrange(256)
            elif trial % 3 == 1:
                del raw[at : at + draw.randint(1, 20)]
            else:
                raw[at:at] = raw[: draw.randrange(len(raw))]
            raw = raw or bytearray(b" ")
        try:
            reply = json.loads(bytes(raw))
        except (ValueError, RecursionError):
            continue  # `critic.remote` reads it as malformed
        assert all(is_judgement(each) for each in read(form, reply))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_long_answer_is_read_in_time(name):
    """Four megabytes, the most that is read, of what grammars like to go back over."""
    for piece in ("S1,", "a ", "\n", "yes\n", "Safety: ", "{", '{"violation": '):
        began = time.monotonic()
        read(FORMATS[name](), good_reply(piece * ((1 << 22) // len(piece))))
        assert time.monotonic() - began < 5.0, piece


def test_no_damage_to_a_cache_gives_another_score(tmp_path, monkeypatch, capsys):
    """Pages changed, cut, doubled and exchanged, the journal's too."""
    monkeypatch.setenv("SAFEREG_CACHE", str(tmp_path / "own"))
    scores = {f"{n:064x}": CachedScore(0.5 + n / 1000, f"S{n % 9}") for n in range(200)}
    path = tmp_path / "scores.sqlite"
    cache = ScoreCache(path)
    cache.put_many("judge", scores)
    pristine = {p: p.read_bytes() for p in sorted(tmp_path.glob("scores.sqlite*"))}
    cache.close()
    draw = random.Random(0)
    for _ in range(120):
        for each in tmp_path.glob("scores.sqlite*"):
            each.unlink()
        for each, content in pristine.items():
            each.write_bytes(content)
        _damage(draw.choice([p for p in pristine if pristine[p]]), draw)
        try:
            cache = ScoreCache(path)
            found = cache.get_many("judge", list(scores))
        except SafeRegError as err:
            said = str(err)
        else:
            assert found.items() <= scores.items()
            said = ""
        assert "\n" not in said
        cache.close()
    capsys.readouterr()


def _damage(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at, size = draw.randrange(len(content)), draw.choice([1, 16, 4096])
    match draw.randrange(4):
        case 0:
            content[at : at + size] = draw.randbytes(len(content[at : at + size]))
        case 1:
            del content[at:]
        case 2:
            content[at:at] = content[at : at + size]
        case _:
            other = draw.randrange(len(content))
            content[at : at + size] = content[other : other + size]
    path.write_bytes(content)
