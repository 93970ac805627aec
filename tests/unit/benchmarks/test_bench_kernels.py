"""Claimed: the GPU check asks nvidia-smi and never falls back to the CPU; a gate that fails ends it
before anything is timed; losses are held against what autograd gives in float64; host waits are
counted in the watched call alone; a row is on disk when it has been added.

Judges: exit status and output of the script; the definitions under autograd (1e-9 relative, sums in
another order); a trace written by hand. No time is asserted. The stages themselves run in CI, by
`gpu_check.sh --cpu`.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from host_waits import waits_of
from problems import LinearProblem, LogitsProblem, truth_of
from result_rows import Rows, read_rows

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu_check.sh"


def gpu_check(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_no_gpu_is_one_clear_line_and_nothing_runs(tmp_path):
    shims = tmp_path / "bin"
    shims.mkdir()
    (shims / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    (shims / "nvidia-smi").chmod(0o755)
    run = gpu_check(tmp_path / "out", PATH=f"{shims}:{os.environ['PATH']}")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == (
        "gpu_check: no GPU: nvidia-smi says 'No devices were found': use a machine with one, or "
        "--cpu\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_gate_that_fails_ends_it_before_timing(tmp_path):
    run = gpu_check(tmp_path, "--cpu", "--only", "gate,parts", SAFEREG_GATE="false")
    assert run.returncode == 1
    assert "== gate" in run.stdout
    assert "== parts" not in run.stdout
    assert "the gate failed: nothing is timed" in run.stderr
    assert not (tmp_path / "cpu.csv").exists()


def test_an_unknown_stage_is_refused(tmp_path):
    run = gpu_check(tmp_path, "--cpu", "--only", "timing")
    assert run.returncode == 2
    assert "no stage timing" in run.stderr


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_truth_of_logits_is_autograd_in_float64(direction):
    problem = LogitsProblem.random((37, 101), torch.float32, torch.device("cpu"), direction)
    x = problem.policy.detach().double().requires_grad_()
    a, b = x.log_softmax(-1), problem.reference.double().log_softmax(-1)
    m = torch.logaddexp(a, b) - np.log(2)
    terms = {
        "forward": b.exp() * (b - a),
        "reverse": a.exp() * (a - b),
        "jsd": (a.exp() * (a - m) + b.exp() * (b - m)) / 2,
    }
    loss = terms[direction].sum() / 37
    grads = torch.autograd.grad(loss, x)
    assert truth_of(problem).gap(loss.detach(), grads) < 1e-9


def test_truth_of_a_linear_problem_is_autograd_in_float64():
    problem = LinearProblem.random(
        (37, 101, 16),
        torch.float32,
        torch.device("cpu"),
        num_active=20,
        is_trained=True,
        chunk_tokens=None,
    )
    truth = truth_of(problem)
    hidden, head = (t.detach().double().requires_grad_() for t in problem.leaves)
    a = (hidden @ head.T).log_softmax(-1)
    b = (problem.reference_hidden.double() @ problem.reference_head.double().T).log_softmax(-1)
    ce = -a.gather(1, problem.labels[:, None])[:, 0]
    kl = (b.exp() * (b - a)).sum(-1)
    loss = problem.ce_weights.double() @ ce + problem.kl_weights.double() @ kl
    grads = torch.autograd.grad(loss, [hidden, head])
    loss = loss.detach()
    assert truth.gap(loss, grads) < 1e-9
    assert truth.gap(loss * 1.01, grads) == pytest.approx(0.01)
    without_last = grads[1].clone()
    without_last[-1] = 0
    assert truth.gap(loss, [grads[0], without_last]) > 1e-3


def test_waits_are_those_of_the_watched_call():
    def event(name, cat, ts, **args):
        return {"name": name, "cat": cat, "ts": ts, "dur": 1, "args": args}

    waits = waits_of(
        [
            {"name": "safereg watched call", "cat": "user_annotation", "ts": 10, "dur": 10},
            event("cudaStreamSynchronize", "cuda_runtime", 12, correlation=1),
            event("cudaMemcpyAsync", "cuda_runtime", 11, correlation=2),
            event("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", 30, correlation=2),
            event("cudaMemcpyAsync", "cuda_runtime", 13, correlation=3),
            event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 31, correlation=3),
            event("cudaLaunchKernel", "cuda_runtime", 14, correlation=4),
            event("cudaDeviceSynchronize", "cuda_runtime", 25, correlation=5),
            event("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", 5, correlation=6),
        ]
    )
    assert waits.by_name == {"cudaStreamSynchronize": 1, "Memcpy DtoH (Device -> Pageable)": 1}
    assert waits.total == 1


def test_a_row_is_on_disk_when_it_has_been_added(tmp_path, capsys):
    rows = Rows(tmp_path / "new" / "cpu.csv", date="2026-01-01", stage="parts")
    rows.add(what="copy", implementation="torch", status="ok", median_ms=1.5)
    [row] = read_rows(tmp_path / "new" / "cpu.csv")
    assert (row["date"], row["stage"], row["median_ms"]) == ("2026-01-01", "parts", "1.5")
    assert "1.500 ms" in capsys.readouterr().out
    Rows(tmp_path / "new" / "cpu.csv").add(what="copy", implementation="torch", status="failed")
    assert [r["status"] for r in read_rows(tmp_path / "new" / "cpu.csv")] == ["ok", "failed"]
    with pytest.raises(ValueError, match="unknown"):
        rows.add(what="copy", implementation="torch", unknown=1)
