"""Claimed: a process that MPI or Slurm started as one of several gets torch's variables or one line
that says what to set; it never takes itself to be alone, and a lone process always does.

The environments are those that the launchers set (Open MPI 4.1 as seen, Slurm and MPICH as their
manuals say). Exact.
"""

import socket

import pytest

from safereg_dist import cli
from safereg_dist.errors import GroupError
from safereg_dist.parallel import rendezvous
from safereg_dist.parallel.launchers import adopt_launcher, first_host, require_ranks
from safereg_dist.parallel.single import single_ranks

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_ess_base_jobid": "1547436033",
    "PMIX_RANK": "1",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[05-08]",
}
PMI = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


def adopted(env):
    """What torch's variables are then."""
    env = dict(env)
    adopt_launcher(env)
    assert require_ranks(env)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    assert 20000 <= int(env["MASTER_PORT"]) < 32768
    return [env[name] for name in names]


def test_ranks_of_one_host_meet_there():
    assert adopted(OPEN_MPI) == ["1", "4", "1", "127.0.0.1"]
    assert adopted(PMI) == ["0", "2", "0", "127.0.0.1"]
    assert adopted({**SLURM, "SLURM_STEP_NUM_NODES": "1"}) == ["3", "4", "1", "127.0.0.1"]


def test_ranks_of_several_hosts_meet_on_the_first():
    assert adopted(SLURM) == ["3", "4", "1", "gpu07"]
    # Open MPI's daemons are a step of Slurm's of their own, without the first host.
    daemon = {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu[06-08]"}
    both = {**daemon, **OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert adopted(both) == ["1", "4", "1", "gpu05"]
    pmi2 = {**SLURM, "PMI_RANK": "3", "PMI_SIZE": "4"}  # srun --mpi=pmi2
    assert adopted(pmi2) == ["3", "4", "1", "gpu05"]


def test_what_the_user_sets_stays():
    env = {**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "29501"}
    adopt_launcher(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["RANK"]) == ("head", "29501", "3")
    torchrun = {**SLURM, "RANK": "9", "WORLD_SIZE": "16"}
    adopt_launcher(torchrun)
    assert (torchrun["RANK"], torchrun["WORLD_SIZE"]) == ("9", "16")
    assert "LOCAL_RANK" not in torchrun


def test_two_runs_have_two_ports():
    ports = set()
    for step in ("0", "1"):
        env = {**SLURM, "SLURM_STEP_ID": step}
        adopt_launcher(env)
        ports.add(env["MASTER_PORT"])
    assert len(ports) == 2


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MASTER_ADDR"),
        ({"PMIX_RANK": "0"}, "WORLD_SIZE, MASTER_ADDR"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "MASTER_ADDR": "h"}, "WORLD_SIZE, MASTER_PORT"),
    ],
)
def test_what_cannot_be_known_is_refused(env, missing):
    adopt_launcher(env)
    with pytest.raises(GroupError, match="MASTER_ADDR") as error:
        require_ranks(env)
    assert f"but {missing} cannot be known" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {k: v for k, v in SLURM.items() if "STEP" not in k},  # a batch script or shell
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # salloc's interactive step
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_lone_process_is_alone(env):
    before = dict(env)
    adopt_launcher(env)
    assert env == before
    assert not require_ranks(env)


def test_a_process_of_several_never_trains_alone(monkeypatch):
    local = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", *local):
        monkeypatch.setenv(name, "")  # so that what is set here goes again
        monkeypatch.delenv(name)
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GroupError, match="started 4"):
        single_ranks()


def test_the_first_host_of_a_list():
    lists = ["a", "a,b", "gpu[07-09,12],login", "n[1,3]x", "login,gpu[1-2]"]
    assert [first_host(each) for each in lists] == ["a", "a", "gpu07", "n1x", "login"]


def test_a_name_that_leads_nowhere_is_said(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    rendezvous._require_own_address()  # one host
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(GroupError, match=r"127\.0\.1\.1.*GLOO_SOCKET_IFNAME"):
        rendezvous._require_own_address()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    rendezvous._require_own_address()


def test_each_host_speaks_before_there_is_a_group(monkeypatch, capsys):
    monkeypatch.setattr(cli, "SILENT_S", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    heard = {}
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert cli.main(["train", "nowhere.yaml"]) == 2
        heard[rank] = capsys.readouterr().err
    assert heard[0].startswith("safereg: expected a configuration")
    assert heard[2].startswith(f"safereg: rank 2 on {socket.gethostname()}: expected a conf")
    assert heard[1] == heard[3] == ""
