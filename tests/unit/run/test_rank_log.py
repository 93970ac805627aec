"""Claimed: what goes wrong on a rank can be read in its file afterwards: warnings of Python and of
libraries whatever their loggers do, the traceback of what ended it, the stacks of a crash. Nothing
is lost on the screen, no secret gets in, the file stays bounded, and there is none before the
folder belongs to a run.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import warnings

import pytest

from safereg_dist.errors import DataError
from safereg_dist.run.rank_log import MAX_BYTES, rank_log


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").touch()
    return tmp_path


def kept(folder, rank=3):
    return (folder / "logs" / f"rank{rank:04d}.{socket.gethostname()}.log").read_text()


def closed_logger():
    """A library's logger that hands nothing on, as deepspeed's."""
    logger = logging.getLogger("a_library")
    logger.propagate = False
    return logger


def fail_after_warnings(folder):
    with rank_log(folder, rank=3, world_size=4) as say:
        say("hello")
        warnings.warn("from Python", UserWarning, stacklevel=1)
        closed_logger().warning("from %s", "a library")
        closed_logger().info("too small to keep")
        logging.getLogger("open_library").error("from another")
        raise DataError("row 7 is bad")


def test_warnings_and_errors_are_kept_and_shown(folder):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match="row 7"):
            fail_after_warnings(folder)
        warnings.warn("later", UserWarning, stacklevel=1)
    assert [str(each.message) for each in shown] == ["from Python", "later"]
    text = kept(folder)
    for part in ("start: rank 3 of 4", "hello", "UserWarning: from Python", "from a library"):
        assert part in text, part
    assert "from another" in text
    assert "raise DataError" in text
    assert "row 7 is bad" in text
    assert "too small" not in text
    assert all(f"Z {socket.gethostname()} rank3 " in text.splitlines()[line] for line in range(5))
    assert "later" not in text


def test_there_is_no_file_before_there_is_a_run(tmp_path):
    with rank_log(tmp_path, rank=3, world_size=4):
        closed_logger().warning("early")
        assert not list(tmp_path.iterdir())
        (tmp_path / "config.yaml").touch()
        closed_logger().warning("late")
    text = kept(tmp_path)
    assert text.index("start:") < text.index("early") < text.index("late")
    other = tmp_path / "never"
    with rank_log(other, rank=0, world_size=1):
        pass
    assert not other.exists()


def test_secrets_stay_out(folder, monkeypatch):
    monkeypatch.setenv("SAFEREG_API_KEY", "sk-very-secret")
    with rank_log(folder, rank=3, world_size=4):
        try:
            raise ValueError("refused: sk-very-secret")
        except ValueError:
            closed_logger().warning("sent sk-very-secret", exc_info=True)
    assert "very-secret" not in kept(folder)
    assert kept(folder).count("***") >= 2


def test_the_file_is_bounded_and_a_full_disk_is_no_error(folder, capsys):
    with rank_log(folder, rank=3, world_size=4):
        for _ in range(40):
            closed_logger().warning("x" * 100_000)
    sizes = [path.stat().st_size for path in (folder / "logs").iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= MAX_BYTES
    with rank_log(folder, rank=5, world_size=8):
        (folder / "logs" / f"rank0006.{socket.gethostname()}.log").symlink_to("/dev/full")
    with rank_log(folder, rank=6, world_size=8):
        closed_logger().warning("nowhere to go")
    assert "Logging error" not in capsys.readouterr().err


def test_a_crash_leaves_its_stacks(folder):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from safereg_dist.run.rank_log import rank_log\n"
        "def crash_here(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "with rank_log(Path(sys.argv[1]), rank=3, world_size=4): crash_here()\n"
    )
    quiet = {k: v for k, v in os.environ.items() if k != "PYTHONFAULTHANDLER"}
    done = subprocess.run([sys.executable, "-c", program, str(folder)], env=quiet, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "in crash_here" in kept(folder)
