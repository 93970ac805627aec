"""Claimed: `safereg doctor --hostfile` over real ssh finds two hosts good, names one that is down,
one whose version of a package is another, and one without the shared folder, and still shows what
the others have. (`safereg launch --hostfile`: test_hosts.)

Exact: verdicts.
"""

import json
import shlex
import sys

import pytest
from support.launching import ROOT, Finished

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


def safereg(hosts, folder, *words) -> Finished:
    """A verb on host 0, as a user's shell runs it; its Python path leads to a disk of each host."""
    hostfile = folder / "hostfile"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    path = f"{folder / 'own' / 'site'}:{ROOT / 'kernels'}:{ROOT}"
    environment = (
        "env",
        "-C",
        folder,
        f"PYTHONPATH={path}",
        "OMP_NUM_THREADS=1",
        "DS_ACCELERATOR=cpu",
    )
    return hosts.run(
        *(0, *environment, sys.executable, "-m", "safereg_dist", *words, "--hostfile", hostfile)
    )


def findings(hosts, folder, *words) -> tuple[int, dict[str, dict]]:
    """Exit status, and check -> finding."""
    out = folder / "doctor.json"
    out.unlink(missing_ok=True)
    done = safereg(hosts, folder, "doctor", folder / "run.yaml", *words, "--json", out)
    assert out.is_file(), done.output[-4000:]
    return done.status, {each["check"]: each for each in json.loads(out.read_text())}


def test_two_good_hosts(hosts, folder):
    status, found = findings(hosts, folder)
    assert status == 0, found
    assert {each["verdict"] for each in found.values()} <= {"ok", "warn"}
    assert found["each name is a host of its own"]["found"] == "node0, node1"
    assert found["output_dir is one folder"]["verdict"] == "ok"
    assert "MB/s into node" in found["bandwidth"]["found"]


def test_a_host_that_is_down(hosts, folder):
    hosts.power_off(1)
    try:
        status, found = findings(hosts, folder)
    finally:
        hosts.boot(1)
    assert status == 1
    failed = {name: each for name, each in found.items() if each["verdict"] == "FAIL"}
    assert failed.keys() == {"ssh to node1"}
    assert (
        "timed out" in failed["ssh to node1"]["found"] or "route" in failed["ssh to node1"]["found"]
    )
    assert found["inputs are there"]["verdict"] == found["disk"]["verdict"] == "ok"


def test_a_host_with_another_version(hosts, folder):
    """The metadata of a package, found earlier on node1's path than the installed one's."""
    place = folder / "own" / "site" / "peft-0.0.1.dist-info"
    text = "Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n"
    hosts.run(1, "mkdir", "-p", place)
    hosts.run(1, "sh", "-c", f"printf {shlex.quote(text)} >{place}/METADATA")
    try:
        status, found = findings(hosts, folder)
    finally:
        hosts.run(1, "rm", "-r", place)
    assert status == 1
    failed = {name: each["found"] for name, each in found.items() if each["verdict"] == "FAIL"}
    assert failed == {"version of peft": "node1 has 0.0.1"}


def test_a_folder_that_is_not_shared(hosts, folder):
    status, found = findings(hosts, folder, f"output_dir={folder / 'own' / 'out'}")
    assert status == 1
    assert found["output_dir is one folder"]["found"] == "node1: does not see it"
