"""The hosts of the tests in this folder, and a small run to start on them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.host_faults import write_run
from support.hosts import Hosts, missing
from support.launching import FINETUNE, Launcher


def require_hosts() -> None:
    """Skips with the reason where no hosts can be started; fails where they were promised."""
    reason = missing()
    if reason is not None and os.environ.get("SAFEREG_REQUIRE_HOSTS") == "1":
        pytest.fail(f"SAFEREG_REQUIRE_HOSTS=1, but {reason}")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that all hosts of a module share, with a model, rows and a configuration."""
    folder = tmp_path_factory.mktemp("multinode")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def hosts(folder) -> Iterator[Hosts]:
    """Two hosts; `own` below the module's folder is a disk of each."""
    require_hosts()
    hosts = Hosts(folder / "hosts", 2, disks=[folder / "own"])
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def one_host(folder) -> Path:
    """The run folder of the same run with as many ranks on this machine, uninterrupted."""
    require_hosts()
    launcher, out = Launcher(folder), folder / "one-host"
    done = launcher(FINETUNE, folder / "run.yaml", f"output_dir={out}", ranks=2)
    assert done.status == 0, done.output[-4000:]
    return out
