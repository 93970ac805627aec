"""Claimed: over two hosts a run gives the bits of as many ranks on one, under each launcher; where
a rank, a host or the network is lost, it ends on all hosts with one clear line, and the same
command goes on to the same bits. A lost ssh connection and a slow network end nothing.

Exact: metrics (but for times and memory), ledger, exported weights.
"""

import pytest
from support.extent import cases
from support.host_faults import FAULTS, messages, result, strike

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


@pytest.mark.parametrize("launcher", cases(["torchrun", "openmpi"], ["no_ssh", "pdsh"]))
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
        assert "Traceback" not in outcome.output, outcome.output[-4000:]
        assert not (out / "summary.json").exists()
        again = hosts(arguments, launcher=launcher)
        assert again.status == 0, again.output[-4000:]
        assert "resuming from" in again.output
        assert not messages(again.output)
    assert result(out) == result(one_host)
