"""`safereg score`: the same rows in the same order, with the judge's risk.

Claimed: rows come out in order with all their fields, `risk` is the judge's, `risk_failed` is there
exactly where it failed; a run that is killed goes on where it was, and nothing that was stored is
asked again; a bad row, a dead endpoint or a failure under `stop` ends with status 2 and leaves no
file. Exact, but for risks (1e-12 of the server's own) and for what was under way at the kill.
"""

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import random_rows, save_model, tiny_model, word_tokenizer, write_jsonl
from support.critic_server import RunningServer, is_hopeless, risk_of, running_server
from support.indexed import write_indexed
from support.launching import Launcher, Process, kill_session, tail
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from safereg_dist.cli import main
from safereg_dist.critic.formats import VERSION
from safereg_dist.critic.verdict import conversation_key
from safereg_dist.data.files import read_rows
from safereg_dist.data.indexed import read_risks
from safereg_dist.demo.guard import write_guard
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.risk.probe import Probe
from safereg_dist.storage.score_cache import ScoreCache

IDENTITY = f"remote llama_guard.{VERSION} guard"


def rows(count: int) -> list[dict]:
    """Rows of every kind that training takes, with fields of their own."""
    some = []
    for n in range(count):
        row: dict = {"id": f"row-{n}", "note": {"kept": [n, None, "\u00e9"]}, "risk": 0.123}
        if n % 3 == 0:
            row |= {"prompt": f"pair {n:05d}", "response": "answer"}
        elif n % 3 == 1:
            row["messages"] = [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": f"pair {n:05d}"},
                {"role": "assistant", "content": "answer"},
            ]
        else:
            row |= {"prompt": f"pair {n:05d}", "response": "answer", "risk_failed": True}
        some.append(row)
    return some


def arguments(url: str, data: Path, out: Path, *more: str) -> list[str]:
    judge = ["--endpoint", url, "--model", "guard", "--format", "llama_guard"]
    return ["score", *judge, "--data", str(data), "--out", str(out), *more]


def cache(folder: Path) -> list[str]:
    return ["--cache", str(folder / "scores.sqlite")]


def written(out: Path) -> list[dict]:
    return [row for _, row in read_rows(out)]


def check(result: list[dict], given: list[dict]) -> None:
    assert len(result) == len(given)
    for n, (mine, row) in enumerate(zip(result, given, strict=True)):
        expected = 1.0 if is_hopeless(n) else risk_of(n)
        assert mine["risk"] == pytest.approx(expected, abs=1e-12)
        assert mine.get("risk_failed", "absent") == (True if is_hopeless(n) else "absent")
        for name in row.keys() - {"risk", "risk_failed"}:
            assert mine[name] == row[name]
        assert mine.keys() - {"risk_failed"} == row.keys() - {"risk_failed"} | {"risk"}


def test_a_risk_that_is_there_is_replaced_aloud(tmp_path: Path, capsys) -> None:
    given = [row | {"risk": 0.25 if n < 2 else None} for n, row in enumerate(rows(4)[1:])]
    data, out = write_jsonl(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    with running_server("good") as server:
        assert main(arguments(server.url, data, out, *cache(tmp_path))) == 0
    assert "2 rows had a risk of their own" in capsys.readouterr().out
    assert all(row["risk"] != 0.25 for row in written(out))


def test_rows_come_out_in_order_with_all_fields(tmp_path: Path, capsys) -> None:
    given = rows(180)  # 0, 89 and 178 get no verdict
    data, out = write_jsonl(tmp_path / "in.jsonl", given), tmp_path / "deep" / "out.jsonl"
    with running_server("hasty chaos") as server:
        # A judge that answers late is asked again, and a busy machine makes it late.
        more = [*cache(tmp_path), "--concurrency", "64", "--timeout-s", "240"]
        more += ["--json", str(tmp_path / "figures.json")]
        assert main(arguments(server.url, data, out, *more)) == 0
        first = server.counts()
        check(written(out), given)
        printed = capsys.readouterr()
        last = printed.out.splitlines()[-1]
        assert last.startswith("score: 180 rows, 3 failed judgements that count as risk 1 (1 x ")
        warned, now = printed.err.splitlines(keepends=True)
        assert warned.startswith("score in.jsonl: a judgement failed (")
        assert now == f"now: safereg train CONFIG.yaml data.train={out} " + (
            "risk.estimator=column\n"
        )
        assert "pair" not in printed.out + printed.err
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert (figures["rows"], figures["failed"], figures["out"]) == (180, 3, str(out))
        risks = [row["risk"] for row in written(out)]
        tenths = np.histogram(risks, 10, (0, 1))[0].tolist()
        assert list(figures["rows_by_risk"].values()) == tenths
        for tenth, count in figures["rows_by_risk"].items():
            assert [tenth, str(count)] in [x.split()[:2] for x in printed.out.splitlines()]
        # Again: only what failed is asked for.
        assert main(arguments(server.url, data, out, *more)) == 0
        second = server.counts()
    assert second["verdicts"] == first["verdicts"] == {n: 1 for n in range(180) if n % 89}
    assert second["met"]["good"] == first["met"]["good"]
    assert second["met"]["error"] > first["met"]["error"]
    assert list(tmp_path.glob("deep/.*")) == []


@pytest.mark.parametrize(("fail", "risk"), [("closed", 1.0), ("open", 0.0)])
def test_failures_are_marked_and_counted_and_end_with_status_0(tmp_path, capsys, fail, risk):
    data, out = write_jsonl(tmp_path / "in.jsonl", rows(5)), tmp_path / "out.jsonl"
    with running_server("too_long") as server:
        assert main(arguments(server.url, data, out, *cache(tmp_path), "--fail", fail)) == 0
    assert [(row["risk"], row["risk_failed"]) for row in written(out)] == [(risk, True)] * 5
    printed = capsys.readouterr()
    assert (
        f"5 failed judgements that count as risk {risk:.0f} (5 x HTTP 400)"
        in (printed.out.splitlines()[-1])
    )
    assert "now:" not in printed.err  # nothing to train on yet
    assert stored_pairs(tmp_path, rows(5)) == set()


def test_a_judge_that_fails_from_the_first_row_on_is_not_asked_for_all(tmp_path, capsys):
    data, out = write_jsonl(tmp_path / "in.jsonl", rows(400)), tmp_path / "out.jsonl"
    with running_server("too_long") as server:
        assert main(arguments(server.url, data, out, *cache(tmp_path))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "failed at each of the first 64 rows (64 x HTTP 400)" in error
    assert "nothing is written: check that --format" in error
    assert not out.exists()


@pytest.mark.parametrize("mode", ["garbage", "reset"])
def test_under_stop_a_failure_ends_the_run_and_leaves_no_file(tmp_path, capsys, mode) -> None:
    data, out = write_jsonl(tmp_path / "in.jsonl", rows(5)), tmp_path / "out.jsonl"
    with running_server(mode) as server:
        more = [*cache(tmp_path), "--fail", "stop", "--timeout-s", "3"]
        assert main(arguments(server.url, data, out, *more)) == 2
    error = capsys.readouterr().err
    assert "a judgement failed" in error
    assert "pair" not in error
    assert [path.name for path in tmp_path.glob("*out*")] == []


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path, launch: Launcher) -> None:
    given = rows(400)
    data, out = write_jsonl(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    with running_server("slow") as server:
        more = [*cache(tmp_path), "--concurrency", "4"]
        command = arguments(server.url, data, out, *more)
        process, log = launch.start("-m", "safereg_dist", *command, launcher="forked")
        while len(server.counts()["verdicts"]) < 100:
            assert process.poll() is None, tail(log)
            time.sleep(0.02)
        kill_session(process)
        stored = stored_pairs(tmp_path, given)
        assert 80 < len(stored) < 400
        assert not out.exists()
        assert main(command) == 0
        counts = server.counts()["verdicts"]
    result = written(out)
    assert [row["risk"] for row in result] == pytest.approx([risk_of(n) for n in range(400)])
    assert set(counts) == set(range(400))
    assert {counts[n] for n in stored} == {1}
    assert sum(counts.values()) - 400 <= 2 * 4  # under way when it was killed


def stored_pairs(folder: Path, given: list[dict]) -> set[int]:
    known = ScoreCache(folder / "scores.sqlite")
    keys = {}
    for n, row in enumerate(given):
        pair = [("user", row.get("prompt")), ("assistant", row.get("response"))]
        turns = [{"role": role, "content": text} for role, text in pair]
        keys[conversation_key(row.get("messages") or turns)] = n
    found = known.get_many(IDENTITY, list(keys))
    known.close()
    return {keys[key] for key in found}


def test_csv_comes_in_and_equal_rows_are_judged_once(tmp_path: Path) -> None:
    data, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    numbers = [7, 5, 7, 7, 1234, 5]
    with data.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response", "source"])
        writer.writerows([f"pair {n:05d},\nplease", 'a "quoted" answer', f"s{n}"] for n in numbers)
    with running_server("good") as server:
        assert main(arguments(server.url, data, out, *cache(tmp_path))) == 0
        assert server.counts()["verdicts"] == {7: 1, 5: 1, 1234: 1}
    assert written(out) == [
        {
            "prompt": f"pair {n:05d},\nplease",
            "response": 'a "quoted" answer',
            "source": f"s{n}",
            "risk": pytest.approx(risk_of(n)),
        }
        for n in numbers
    ]


def test_every_answer_of_a_conversation_is_judged(tmp_path: Path) -> None:
    """The server gives both prefixes the verdict of their first pair number; both are asked."""
    turn = {"role": "assistant", "content": "answer"}
    messages = [{"role": "user", "content": "pair 00004"}, turn, turn | {"role": "user"}, turn]
    data, out = write_jsonl(tmp_path / "in.jsonl", [{"messages": messages}]), tmp_path / "o.jsonl"
    with running_server("good") as server:
        assert main(arguments(server.url, data, out, *cache(tmp_path))) == 0
        assert server.counts()["verdicts"] == {4: 2}
    assert written(out)[0]["risk"] == pytest.approx(risk_of(4))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "pair 1"}, "expected `messages`, or `prompt` and `response`"),
        ({"prompt": "pair 1", "response": 3}, "as text"),
        ({"messages": [{"role": "user", "content": "pair 1"}]}, "no assistant turn"),
        ({"messages": [{"role": "user"}]}, "OpenAI chat format"),
    ],
)
def test_a_bad_row_is_found_before_anything_is_asked(tmp_path, capsys, row, said) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [*rows(3), row])
    with running_server("good") as server:
        assert main(arguments(server.url, data, tmp_path / "out.jsonl", *cache(tmp_path))) == 2
        assert server.counts()["met"] == {}
    error = capsys.readouterr().err
    assert f"{data}:4" in error
    assert said in error


def test_what_is_wrong_with_files_and_arguments_is_said(tmp_path, capsys) -> None:
    data, out = write_jsonl(tmp_path / "in.jsonl", rows(2)), tmp_path / "out.jsonl"
    closed = "http://127.0.0.1:9/v1"  # the discard port: nobody listens
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "x.idx").write_bytes(b"")
    (tmp_path / "garbage.sqlite").write_text("garbage" * 200)
    garbage = ["--cache", str(tmp_path / "garbage.sqlite")]
    with running_server("good") as server:
        url = server.url
        judge = ["--endpoint", url, "--model", "guard", "--format", "llama_guard"]
        for command, said in [
            (arguments(closed, data, out, "--timeout-s", "1"), "start the server"),
            (arguments(url, tmp_path / "empty.jsonl", out), "holds no row"),
            (arguments(url, tmp_path / "none.jsonl", out), "expected a data file"),
            (arguments(url, data, data / "out.jsonl", *cache(tmp_path)), "cannot write"),
            (arguments(url, data, out, *garbage), "not a database"),
            (arguments(url, data, out, "--timeout-s", "0"), "timeout_s"),
            (["score", "--probe", "p", "--data", str(data), "--out", str(out)], "--model-path"),
            (["score", "--endpoint", url, "--data", str(data), "--out", str(out)], "--format too"),
            (["score", "--endpoint", url, "--data", str(data)], "--out is missing"),
            (["score", "--endpoint", url, "--data", str(tmp_path / "x")], "give --tokenizer"),
            (["score", *judge, "--data", "none.idx", "--tokenizer", "t"], "found no file none.idx"),
        ]:
            assert main(command) == 2, said
            assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_local_guard_scores_too(tmp_path: Path, capsys) -> None:
    guard = tmp_path / "guard"
    write_guard(guard, seed=0, steps=3, progress=False)
    given = [{"prompt": f"how do i rob the train {n}?", "response": "first"} for n in range(9)]
    given.append({"prompt": "hello", "response": "train " * 400, "id": "long"})
    data, out = write_jsonl(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    judge = ["score", "--local", str(guard), "--format", "llama_guard"]
    command = [*judge, "--data", str(data), "--out", str(out), *cache(tmp_path)]
    assert main(command) == 0
    assert "1 failed judgements that count as risk 1" in capsys.readouterr().out
    first = out.read_bytes()
    *good, long = written(out)
    assert all(0 < row["risk"] < 1 and "risk_failed" not in row for row in good)
    assert (long["risk"], long["risk_failed"]) == (1.0, True)
    assert main(command) == 0
    assert out.read_bytes() == first


def test_a_probe_scores_too(tmp_path: Path, capsys) -> None:
    """Against a plain forward pass: hidden state 2 at the last token of each prompt."""
    model = tiny_model("llama")
    folder = save_model(tmp_path / "m", model)
    torch.manual_seed(5)
    probe = Probe(
        **{"layer": 2, "pooling": "last_prompt_token", "bias": 0.1, "threshold": 0.4},
        **{"mean": torch.randn(32), "scale": torch.rand(32) + 0.5, "weight": torch.randn(32) / 4},
        fingerprint=model_fingerprint(model),
    )
    probe.save(tmp_path / "p")
    given = random_rows(21)
    data, out = write_jsonl(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    judge = ["score", "--probe", str(tmp_path / "p"), "--model-path", str(folder)]
    assert main([*judge, "--data", str(data), "--out", str(out)]) == 0
    assert "score: 21 rows, 0 failed judgements" in capsys.readouterr().out
    tokenizer = word_tokenizer()
    for row, result in zip(given, written(out), strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            **{"add_generation_prompt": True, "return_tensors": "pt", "return_dict": False},
        )
        with torch.inference_mode():
            state = model(ids, output_hidden_states=True).hidden_states[2][0, -1]
        logit = (state - probe.mean) / probe.scale @ probe.weight + probe.bias
        # Scaled so that the threshold, 0.4, becomes that of a column, 0.5.
        risk = np.interp(float(logit.sigmoid()), [0, 0.4, 1], [0, 0.5, 1])
        assert result == {**row, "risk": pytest.approx(risk, abs=1e-5)}
    save_model(tmp_path / "other", tiny_model("llama", seed=9))
    other = ["score", "--probe", str(tmp_path / "p"), "--model-path", str(tmp_path / "other")]
    assert main([*other, "--data", str(data), "--out", str(out)]) == 2


def pair_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer that writes token n, from 10 on, as the word `NNNNN`."""
    words = ["<unk>", "<eod>", "pair", *(f"filler{n}" for n in range(7))]
    words += [f"{n:05d}" for n in range(10, 1000)]
    model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", eos_token="<eod>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_an_indexed_data_set_is_judged_in_pieces(tmp_path: Path, capsys) -> None:
    """178 gets no verdict; the last sequence has no text."""
    pytest.importorskip("megatron.core")
    numbers = [[300], [40, 700, 50], [178, 41], [90, 900], []]
    sequences = [[*(t for n in own for t in (2, n)), 1] for own in numbers]
    prefix = write_indexed(tmp_path / "x_document", sequences, np.uint16)
    tokenizer = ["--tokenizer", str(pair_tokenizer(tmp_path / "t")), "--piece-tokens", "2"]
    judge = ["--model", "guard", "--format", "llama_guard", "--timeout-s", "10", *cache(tmp_path)]
    with running_server("chaos") as server:
        command = ["score", "--endpoint", server.url, *judge, *tokenizer]
        assert main([*command, "--data", f"{prefix}.idx"]) == 0
        first = server.counts()["verdicts"]
        moved = tmp_path / "deep" / "stem"
        assert main([*command, "--data", str(prefix), "--out", str(moved)]) == 0
        assert server.counts()["verdicts"] == first  # known from the first time
    assert "score: 5 sequences, 1 failed judgements that count as risk 1" in capsys.readouterr().out
    expected = [max(1.0 if is_hopeless(n) else risk_of(n) for n in own or [0]) for own in numbers]
    expected[-1] = 0.0
    risks = read_risks(prefix)
    assert risks.tolist() == pytest.approx(expected, abs=1e-12)
    assert read_risks(prefix, moved).tolist() == risks.tolist()
    known = json.loads(Path(f"{prefix}.risk.json").read_text())
    assert (known["scorer"], known["piece_tokens"]) == (IDENTITY, 2)
    assert sum(known["failed"].values()) == 1


def test_a_probe_reads_the_sequences_of_an_indexed_data_set(tmp_path: Path, capsys) -> None:
    """Against plain forward passes: a probe on prompts and one on responses; the larger counts."""
    pytest.importorskip("megatron.core")
    model = tiny_model("llama")
    folder = save_model(tmp_path / "m", model)
    torch.manual_seed(5)
    probes = {}
    for position, pooling in (("prompt", "last_prompt_token"), ("response", "mean_response")):
        probes[position] = Probe(
            **{"layer": 2, "pooling": pooling, "bias": 0.1, "threshold": 0.4},
            **{"mean": torch.randn(32), "scale": torch.rand(32) + 0.5},
            **{"weight": torch.randn(32) / 4, "position": position},
            fingerprint=model_fingerprint(model),
        )
        probes[position].save(tmp_path / "p" / position)
    draw = np.random.default_rng(0)
    sequences = [draw.integers(6, 30, length).tolist() for length in (9, 1, 40, 2)]
    prefix = write_indexed(tmp_path / "x", sequences)
    judge = ["score", "--probe", str(tmp_path / "p"), "--model-path", str(folder)]
    assert main([*judge, "--data", str(prefix), "--piece-tokens", "32"]) == 0
    expected = []
    for sequence in sequences:
        pieces = []
        for begin in range(0, len(sequence), 32):
            ids = torch.tensor([sequence[begin : begin + 32]])
            with torch.inference_mode():
                states = model(ids, output_hidden_states=True).hidden_states[2][0]
            pooled = {"prompt": states[-1], "response": states[len(states) > 1 :].mean(0)}
            for position, probe in probes.items():
                scaled = (pooled[position] - probe.mean) / probe.scale
                risk = float((scaled @ probe.weight + probe.bias).sigmoid())
                pieces.append(np.interp(risk, [0, 0.4, 1], [0, 0.5, 1]))
        expected.append(max(pieces))
    assert read_risks(prefix).tolist() == pytest.approx(expected, abs=1e-5)
    assert main([*judge, "--data", str(prefix), "--piece-tokens", "200"]) == 0  # none so long
    sequences.append([7] * 200)
    write_indexed(prefix, sequences)
    assert main([*judge, "--data", str(prefix)]) == 2
    assert "a text has 200 tokens, the model takes 128" in capsys.readouterr().err


def test_several_processes_may_score_at_once(tmp_path: Path, launch: Launcher) -> None:
    """Two shards of a file with one cache: as two ranks, or two jobs, would."""
    given = rows(120)
    with running_server("good") as server:
        processes = [start(launch, tmp_path, server, given[s::2], s) for s in range(2)]
        assert [process.wait(120) for process in processes] == [0, 0]
        assert server.counts()["verdicts"] == {n: 1 for n in range(120)}
    for shard in range(2):
        result = written(tmp_path / f"{shard}.out.jsonl")
        expected = [risk_of(n) for n in range(120) if n % 2 == shard]
        assert [row["risk"] for row in result] == pytest.approx(expected)
    assert len(stored_pairs(tmp_path, given)) == 120


def start(
    launch: Launcher, folder: Path, server: RunningServer, given: list[dict], shard: int
) -> Process:
    data = write_jsonl(folder / f"{shard}.jsonl", given)
    command = arguments(server.url, data, folder / f"{shard}.out.jsonl", *cache(folder))
    return launch.start("-m", "safereg_dist", *command, launcher="forked")[0]


def test_the_output_is_ascii_json_whatever_the_text(tmp_path: Path) -> None:
    row = {"prompt": "pair 00003 \ud800 \x00 \u2028", "response": "\u00e9\U0001f600", "n": 1e300}
    data, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps(row) + "\n")
    with running_server("good") as server:
        assert main(arguments(server.url, data, out, *cache(tmp_path))) == 0
    assert written(out) == [{**row, "risk": pytest.approx(risk_of(3))}]
    assert out.read_bytes().isascii()


def test_a_judge_without_patience_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    arguments = ["--data", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert main(["score", "--local", "folder", "--timeout-s", "0", *arguments]) == 2
    error = capsys.readouterr().err
    assert error == "safereg: risk.critic.timeout_s must be positive and finite, got 0.0\n"
