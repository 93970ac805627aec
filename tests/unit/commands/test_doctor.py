"""Claimed: `safereg doctor` says what would fail, with a remedy, and exits with 1 where something
does: on this host, and for what hosts answer of themselves. It leaves nothing behind.

Real sockets, folders and files; the answers of several hosts are written down here.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from support.builders import write_run

from safereg_dist.cli import main
from safereg_dist.config import load_config
from safereg_dist.doctor.checks import disk_findings, host_findings, link_finding
from safereg_dist.doctor.host import Question, answer
from safereg_dist.doctor.link import receive
from safereg_dist.doctor.remote import read_hostfile
from safereg_dist.doctor.work import work_of
from safereg_dist.errors import ConfigError
from safereg_dist.plan.settings import settings_of
from safereg_dist.run.lock import STALE_S, RunLock


@pytest.fixture
def config(tmp_path):
    return write_run(
        tmp_path,
        rows=8,
        train={"steps": 10, "precision": "fp32", "save_every": 5},
        output_dir=str(tmp_path / "runs" / "one"),
    )


def findings(capsys, *words):
    """Exit status and check -> finding."""
    capsys.readouterr()
    status = main(["doctor", *map(str, words), "--json", "-"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert all(each["found"] in err for each in found)  # the table says the same
    assert ("now: safereg audit" in err) == (status == 0)
    return status, {each["check"]: each for each in found}


def test_a_healthy_host_and_what_fails_on_it(config, capsys):
    folder = config.parent
    before = sorted(folder.rglob("*"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        judge = f"{{endpoint: 'http://127.0.0.1:{port}/v1', model: m, format: harmbench}}"
        judged = f"risk={{estimator: critic, critic: {judge}}}"
        status, found = findings(capsys, config, "--port", 0)
        assert (status, {f["verdict"] for f in found.values()}) == (0, {"ok"})
        _, found = findings(capsys, config, judged, "--port", port)
        assert found["judge answers"]["verdict"] == "ok"
        (held,) = [f for name, f in found.items() if name.startswith("port")]
        assert (held["verdict"], held["found"]) == ("FAIL", "Address already in use")
    status, found = findings(capsys, config, judged, "--port", 0)
    assert status == 1
    assert "refused" in found["judge answers"]["found"]
    asks = ("train.async_save=true", f"train.save_staging={folder / 'not' / 'there'}")
    _, found = findings(capsys, config, *asks, "--port", 0)
    assert found["disk for staging"]["verdict"] == "ok"
    assert f"in {folder} of " in found["disk for staging"]["found"]
    status, found = findings(capsys, config, "data.train=/nowhere/x.jsonl", "--port", 0)
    assert "/nowhere/x.jsonl" in found["inputs are there"]["found"]
    for words in ("model=./none", "model=/nowhere", "eval={canary: /nowhere}"):
        _, found = findings(capsys, config, words, "--port", 0)
        assert found["inputs are there"]["verdict"] == "FAIL", words
    unsigned = ("signing={hmac_env: SAFEREG_NO_SUCH_KEY}", "--port", 0)
    status, found = findings(capsys, config, *unsigned)
    assert (status, found["key to sign with, on this host"]["verdict"]) == (1, "FAIL")
    assert sorted(folder.rglob("*")) == before
    out = folder / "runs" / "one"
    out.mkdir(parents=True)
    for name in ("config.yaml", "summary.json", "stop"):
        (out / name).touch()
    status, found = findings(capsys, config, "--port", 0)
    assert (status, found["run folder"]["found"]) == (1, "complete")
    assert found["stop file"]["verdict"] == "warn"
    main(["doctor", str(config)])
    assert "-> nothing would be trained: choose another output_dir" in capsys.readouterr().out


def test_hosts_that_differ_are_named(config, tmp_path):
    (tmp_path / "nonce").touch()
    seen = answer(Question(folder=str(tmp_path), nonce="nonce"))
    assert seen.sees_nonce
    assert seen.write_bytes_per_s > 0
    one = replace(seen, host="a", own_address="10.0.0.1")
    other = replace(
        one,
        host="b",
        own_address="127.0.1.1",
        code="0" * 12,
        versions={**one.versions, "torch": "1.0"},
        sees_nonce=False,
        missing=["/data/x"],
        unknown_peers={"a": "unknown (no such name)"},
        free_bytes=10,
        write_bytes_per_s=1.0,
    )
    work = work_of(load_config(config, []), world_size=16, per_host=8, gpu="NVIDIA H100 80GB HBM3")
    good = {name: replace(one, host=name) for name in ("a", "c", "d")}
    assert {f.verdict for f in host_findings(good, work)} == {"ok"}
    found = {f.check: f for f in host_findings({**good, "b": other}, work)}
    wrong = {name: f.found for name, f in found.items() if f.verdict == "FAIL"}
    assert wrong == {
        "version of torch": "b has 1.0",
        "our code": "b has 000000000000",
        "output_dir is one folder": "b: does not see it",
        "inputs are there": "b: /data/x",
        "own name": "b: b is 127.0.1.1",
        "names of the others": "b: a: unknown (no such name)",
    }
    assert all(f.remedy for f in found.values() if f.verdict == "FAIL")
    twice = {f.check: f for f in host_findings({"a": one, "b": one}, work)}
    assert twice["each name is a host of its own"].verdict == "FAIL"
    staged = replace(one, staging="/local", staging_free_bytes=10)
    _, staging, _ = disk_findings({"a": staged, "b": replace(other, staging="")}, work, tmp_path)
    assert (staging.verdict, staging.check) == ("FAIL", "disk for staging")
    assert "in /local of a" in staging.found
    disk, save = disk_findings({"a": one, "b": other}, work, tmp_path)
    assert (disk.verdict, save.verdict) == ("FAIL", "warn")
    assert link_finding({"a": 1e12, "b": 1e12}, work, between_hosts=True).verdict == "ok"
    slow = link_finding({"a": 1e12, "b": 1.0}, work, between_hosts=True)
    assert (slow.verdict, "into b" in slow.found) == ("warn", True)


def test_where_no_host_answers_this_one_is_examined(config, capsys, tmp_path):
    """Names that no resolver knows: one line for both, whatever ssh says, and the checks here."""
    hosts = tmp_path / "hosts"
    hosts.write_text("a.invalid slots=2\nuser@b.invalid slots=2\n")
    status, found = findings(capsys, config, "--hostfile", hosts, "--port", 0)
    assert status == 1
    told = found.pop("ssh to a.invalid, user@b.invalid")
    assert "of this host alone" in told["expected"]
    assert told["found"].endswith("; the others alike")
    assert "HOST" not in told["found"]
    assert not any(check.startswith(("ssh", "link")) for check in found)
    alone = {"packages are there", "output_dir is one folder", "inputs are there", "disk"}
    assert {f["verdict"] for name, f in found.items() if name in alone} == {"ok"}
    assert alone | {"time of a save", "run folder"} == found.keys()
    main(["doctor", str(config), "--hostfile", str(hosts)])
    assert "of several hosts" not in capsys.readouterr().out
    main(["doctor", str(config)])
    assert "figures of one rank on this host; of several hosts: --" in capsys.readouterr().out


def test_a_hub_model_is_not_called_there_and_its_disk_is_known_by_its_name(config, capsys):
    name = "meta-llama/Llama-3.1-70B-Instruct"
    _, found = findings(capsys, config, f"model={name}", "--port", 0)
    assert found["model"]["found"].startswith(f"{name} is no folder here")
    assert found["model"]["verdict"] == "warn"
    assert "checkpoints of 1,129 GB" in found["disk"]["expected"]
    words = (f"model={name}", "lora.rank=16")
    work = work_of(load_config(config, words), world_size=16, per_host=8, gpu="")
    assert work.checkpoint_bytes == 16 * 207_093_760
    _, found = findings(capsys, config, "model=org/other", "--port", 0)
    assert "org/other is no folder" in found["model"]["found"]


def test_who_holds_the_folder_is_said(config, capsys):
    """This process, one of another host with and without a sign of life, and a dead one."""
    out = config.parent / "runs" / "one"
    lock = RunLock(out)
    while not lock.take():
        pass
    status, found = findings(capsys, config, "--port", 0)
    held = found["run lock"]
    assert (status, held["verdict"]) == (1, "FAIL")
    assert f"pid {os.getpid()}, since 2" in held["found"]
    assert found["run folder"]["found"] == "new"  # a lock alone is no run, and no foreign file
    elsewhere = json.loads(lock.text) | {"place": "another boot", "host": "node7"}
    lock.release()
    out.mkdir(exist_ok=True)
    file = out / "run.lock.3"
    file.write_text(json.dumps(elsewhere))
    status, found = findings(capsys, config, "--port", 0)
    assert (status, found["run lock"]["verdict"]) == (1, "FAIL")
    assert "host node7" in found["run lock"]["found"]
    os.utime(file, (0, time.time() - 2 * STALE_S))
    status, found = findings(capsys, config, "--port", 0)
    assert (status, found["run lock"]["verdict"]) == (0, "warn")
    file.write_text(lock.text.replace('"started": "', '"started": "9'))  # its id went to another
    status, found = findings(capsys, config, "--port", 0)
    assert (status, found["run lock"]["verdict"]) == (0, "warn")
    file.unlink()
    _, found = findings(capsys, config, "--port", 0)
    assert "run lock" not in found


def test_stages_that_the_planner_does_not_know_have_no_plan(config):
    known, other = (
        work_of(load_config(config, words), world_size=16, per_host=8, gpu="")
        for words in ([], ["engine.zero_stage=2"])
    )
    assert known.step_seconds
    assert other.step_seconds is other.between_bytes is None
    found = link_finding({"a": 1.0}, other, between_hosts=True)
    assert (found.expected, found.verdict) == ("no plan to compare", "ok")
    offloaded = load_config(config, ["engine.offload_params=cpu", "reference.offload=cpu"])
    settings = settings_of(offloaded, world_size=16)
    assert (settings.offload_params, settings.offload_reference) == ("cpu", "cpu")


def test_a_transfer_is_timed():
    command = [sys.executable, "-m", "safereg_dist.doctor.link", "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert receive("127.0.0.1", int(server.stdout.readline())) > 1e6
    assert server.returncode == 0


@pytest.mark.parametrize("line", ["node0", "node0 slots=x", "-oProxyCommand=x slots=1", "a b"])
def test_a_hostfile_that_is_none_is_refused(tmp_path, line):
    path = tmp_path / "hostfile"
    path.write_text(f"# hosts\nnode1 slots=2\n{line}\n")
    with pytest.raises(ConfigError, match=":3: expected `HOST slots=N`"):
        read_hostfile(path)
    path.write_text("node1 slots=2 # fast\nuser@10.0.0.2 slots=4\n")
    assert read_hostfile(path) == {"node1": 2, "user@10.0.0.2": 4}
