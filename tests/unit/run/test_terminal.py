"""Claimed: a run outlives its terminal. Whether the reader of its output has gone or the terminal
was closed (which sends SIGHUP), it ends with status 0 and the bits of the run left alone.

Exact. Real processes on real pipes and pseudo-terminals.
"""

import os
import pty
import subprocess
import sys

import pytest
from support.builders import write_run
from support.launching import FINETUNE

from safereg_dist.screen import progress


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    return write_run(
        folder,
        rows=8,
        train={"steps": 40, "precision": "fp32", "micro_batch_size": 2},
        engine={"name": "single"},
    )


@pytest.fixture
def whole(config, launch):
    out = config.parent / "whole"
    done = launch(FINETUNE, config, f"output_dir={out}", launcher="forked")
    assert done.status == 0, done.output
    return result(out)


def command(config, out):
    return [sys.executable, str(FINETUNE), str(config), f"output_dir={out}"]


def result(out):
    return (out / "ledger.jsonl").read_bytes(), (out / "model/model.safetensors").read_bytes()


def read_until_it_trains(reader):
    """Reads the output up to the first of the bar's steps."""
    seen = b""
    while b" steps" not in seen:
        more = os.read(reader, 1)
        assert more, seen
        seen += more


def test_a_pipe_whose_reader_goes_away(config, whole):
    out = config.parent / "pipe"
    reader, writer = os.pipe()
    process = subprocess.Popen(command(config, out), stdout=writer, stderr=writer)
    os.close(writer)
    read_until_it_trains(reader)
    os.close(reader)
    assert process.wait(120) == 0
    assert result(out) == whole


def test_a_terminal_that_is_closed(config, whole):
    out = config.parent / "terminal"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command(config, out))
    read_until_it_trains(terminal)
    os.close(terminal)  # SIGHUP to the session, and EIO for whoever writes
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert result(out) == whole


def test_no_output_from_the_start(tmp_path):
    program = (
        "from safereg_dist.run.terminal import outlive_terminal; outlive_terminal()\n"
        "import sys; print('said'); sys.stderr.write('said'); sys.stderr.flush()\n"
        f"open({str(tmp_path / 'end')!r}, 'w').close()"
    )
    closing = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", program]
    assert subprocess.run(closing, check=False).returncode == 0
    assert (tmp_path / "end").exists()


def test_without_a_terminal_a_line_says_how_far_it_is(capsys):
    """At most one in half a minute: after 20, 31, 35, 70 seconds only the second and the last."""
    clock = [1000.0]
    with progress.progress_bar(total=10, initial=2, desc="train", unit=" steps") as bar:
        bar._time, bar.start_t, bar.last_print_t = lambda: clock[0], clock[0], clock[0]
        for seconds in (20, 31, 35, 70):
            clock[0] = 1000.0 + seconds
            bar.set_postfix({"loss": "1.5"}, refresh=False)
            bar.update()
    told = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[0] for line in told] == ["train: 4/10", "train: 6/10"]
    assert all(line.endswith(" left, loss=1.5") for line in told)
    with progress.quiet():
        assert progress.progress_bar(total=9).disable
    assert progress.progress_bar(total=9, shown=False).disable
    assert list(progress.progress_bar(range(3), desc="short")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
