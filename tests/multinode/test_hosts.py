"""Claimed: over two hosts a run gives the bits of as many ranks on one, under each launcher; where
a rank, a host or the network is lost, it ends on all hosts with one clear line, and the same
command goes on to the same bits. A lost ssh connection and a slow network end nothing.

Exact: metrics (but for times and memory), ledger, exported weights.
"""

import pytest
from support.extent import FULL, cases
from support.host_faults import FAULTS, messages, strike
from support.results import result

from safereg_dist.run.manifest import first_changed, read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


@pytest.mark.parametrize("launcher", cases(["torchrun", "openmpi", "safereg"], ["no_ssh", "pdsh"]))
def test_two_hosts_give_the_bits_of_one(hosts, folder, one_host, launcher):
    out = folder / launcher
    done = hosts([folder / "run.yaml", f"output_dir={out}"], launcher=launcher)
    assert done.status == 0, done.output[-4000:]
    assert result(out) == result(one_host)


@pytest.mark.parametrize(
    ("name", "launcher"),
    cases(
        [("SIGKILL of a rank", "pdsh"), ("link down", "no_ssh")],
        [
            *[("SIGKILL of a rank", "torchrun"), ("SIGKILL of rank 0", "pdsh")],
            *[("link down", "pdsh"), ("host without power", "pdsh")],
            *[("SIGKILL of sshd", "pdsh"), ("link at 20 Mbit/s", "pdsh")],
        ],
    ),
)
def test_a_fault_ends_the_run_or_nothing(hosts, folder, one_host, name, launcher):
    fault = FAULTS[name]
    out = folder / f"{launcher}-{name.replace(' ', '-').replace('/', '-')}"
    arguments = [folder / "run.yaml", f"output_dir={out}"]
    outcome = strike(hosts, fault, arguments, out, launcher=launcher)
    if fault.ends:
        assert outcome.status != 0
        assert outcome.lines, outcome.output[-4000:]
        assert all("has ended or cannot be reached" in line for line in outcome.lines)
        # torchrun's agent ends in a traceback of its own, after what the ranks said.
        assert "Traceback" not in outcome.output.partition("torch/distributed/elastic")[0]
        assert not (out / "summary.json").exists()
        again = hosts(arguments, launcher=launcher)
        assert again.status == 0, again.output[-4000:]
        assert "resuming from" in again.output
        assert not messages(again.output)
    assert result(out) == result(one_host)


def test_saves_wait_on_a_disk_of_each_host(hosts, folder, one_host):
    """Asynchronous saves over a fault: the same bits, whole checkpoints, disks that are empty."""
    out, local = folder / "async", folder / "own" / "local"
    arguments = [folder / "run.yaml", f"output_dir={out}", "train.async_save=true"]
    arguments += [f"train.save_staging={local}", "train.save_every=1"]
    outcome = strike(hosts, FAULTS["SIGKILL of a rank"], arguments, out, launcher="torchrun")
    assert outcome.status != 0
    left = [hosts.run(host, "ls", local).output.split() for host in range(hosts.count)]
    assert any(left), "nothing was ever staged"
    assert len({name for names in left for name in names}) == sum(map(len, left))
    again = hosts(arguments, launcher="torchrun")
    assert again.status == 0, again.output[-4000:]
    assert "resuming from" in again.output
    assert result(out) == result(one_host)
    assert [hosts.run(host, "ls", local).output for host in range(hosts.count)] == ["", ""]
    for checkpoint in (out / "checkpoint").iterdir():
        files = read_manifest(checkpoint, None).files
        assert first_changed(checkpoint, files, files) is None


def test_a_name_that_resolves_to_loopback_is_refused(hosts, folder, one_host):
    """Debian's installer writes a host's own name beside 127.0.1.1; the remedy told works."""
    out = folder / "loopback"
    arguments = [folder / "run.yaml", f"output_dir={out}"]
    hosts.run(0, "sh", "-c", "cp /etc/hosts /dev/shm/; echo 127.0.1.1 node0 >/etc/hosts")
    hosts.run(0, "sh", "-c", "cat /dev/shm/hosts >>/etc/hosts")
    try:
        done = hosts(arguments, launcher="torchrun")
        assert done.status != 0
        assert any("set GLOO_SOCKET_IFNAME" in line for line in messages(done.output)), done.output
        assert not out.exists()
        if FULL:
            env = {"GLOO_SOCKET_IFNAME": "eth0"}
            done = hosts(arguments, launcher="torchrun", env=env)
            assert done.status == 0, done.output[-4000:]
            assert result(out) == result(one_host)
    finally:
        hosts.run(0, "sh", "-c", "cat /dev/shm/hosts >/etc/hosts")


@pytest.mark.skipif(not FULL, reason="SAFEREG_TESTS=full")
def test_a_replaced_host_is_refused_until_it_has_the_model(hosts, folder, one_host):
    """The model lies on a disk of each host; the second host is a new one, with an empty disk."""
    out, model = folder / "replaced", folder / "own" / "model"
    arguments = [folder / "run.yaml", f"output_dir={out}", f"model={model}"]
    hosts.run(0, "cp", "-r", folder / "model", model)
    done = hosts(arguments, launcher="pdsh")
    assert done.status != 0
    (line,) = messages(done.output)
    assert str(model) in line
    assert "rank 1" in line or "node1" in line
    assert not (out / "metrics.jsonl").exists()
    hosts.run(1, "cp", "-r", folder / "model", model)
    done = hosts(arguments, launcher="pdsh")
    assert done.status == 0, done.output[-4000:]
    assert result(out)["model"] == result(one_host)["model"]


@pytest.mark.skipif(not FULL, reason="SAFEREG_TESTS=full")
def test_a_run_folder_on_each_host_s_own_disk_is_refused(hosts, folder):
    out = folder / "own" / "out"
    done = hosts([folder / "run.yaml", f"output_dir={out}"], launcher="pdsh")
    assert done.status != 0
    (line,) = messages(done.output)
    assert str(out) in line
    for host in range(2):
        assert hosts.run(host, "test", "-e", out / "metrics.jsonl").status != 0
