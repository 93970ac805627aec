"""Ranks without the wait for their imports: a process that has loaded the libraries, and forks.

A fresh rank spends most of a small test on loading torch and transformers. This program loads them
once, listens on a socket, and forks a process for every rank that it is asked for; each has its own
environment, folder, arguments and output, and runs a script from its first line, as a launcher's
rank does. What is under test (safereg_dist, safereg_kernels, deepspeed) is loaded by the rank
itself: workers wrap functions of torch before deepspeed takes them.

    python tests/support/rank_server.py SOCKET       ends when its standard input does

One connection is one launch: the client sends a line of JSON (`Request`), gets the process id of
the launch, whose children are the ranks, and at the end its status; a connection that ends without
one is a launch that was killed.
"""

import faulthandler
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

LIBRARIES = (
    *("torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard"),
    *("transformers.models.llama.modeling_llama", "transformers.models.falcon.modeling_falcon"),
    *("transformers.models.qwen2.modeling_qwen2", "transformers.models.mistral.modeling_mistral"),
    *("datasets", "matplotlib.figure", "safetensors.torch", "scipy.stats", "triton", "yaml"),
    *("transformers.trainer", "torch.utils.flop_counter", "httpx", "tqdm"),
)
WHERE_INSTALLED = ("mlflow", "wandb", "peft", "trl.trainer.sft_trainer")
"""Found by deepspeed and transformers; mlflow is most of the time of deepspeed's import."""
GRACE_S = 1.0
"""Seconds that ranks have to end by themselves once one has failed (deepspeed's launcher: 1)."""
KILL_AFTER_S = 10.0

Request = dict[str, Any]
"""`argv` (a script, or -m and a module, and arguments), `cwd`, `log` (file), and for each rank its
environment: `ranks`."""


def main() -> None:
    """Loads, listens, forks a supervisor for each connection."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in WHERE_INSTALLED:
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    # Deepspeed's first engine decorates a function with it, and that alone loads torch's compiler.
    torch.compile(abs)
    _draw_once()
    # What ranks load themselves they compile once, also where Python is told to leave no files.
    sys.dont_write_bytecode, sys.pycache_prefix = False, f"{sys.argv[1]}.pycache"
    # A collection, of which every engine of deepspeed makes one, goes through a rank's own objects.
    gc.freeze()
    assert not {"deepspeed", "safereg_dist", "safereg_kernels"} & sys.modules.keys()
    _require_one_thread()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{sys.argv[1]}.new")
        listener.listen()
        os.rename(f"{sys.argv[1]}.new", sys.argv[1])  # there once it can be connected to
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _supervise(connection)
            connection.close()
            _reap()
        _reap()


def _draw_once() -> None:
    """Loads fonts and back ends: every run ends with figures."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    figure.subplots().plot([0.0, 1.0], label="once")
    for form in ("png", "svg"):
        figure.savefig(io.BytesIO(), format=form)


def _reap() -> None:
    """Buries supervisors that have ended, so that their time counts as this process's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _require_one_thread() -> None:
    """A fork takes one thread along; what others hold would stay held (jemalloc's knows that)."""
    names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    others = [name for name in names if name != "jemalloc_bg_thd"]
    assert len(others) == 1, f"expected one thread, found {others}: what starts them?"


def _supervise(connection: socket.socket) -> NoReturn:
    """Starts the ranks of one launch, waits for them, says how they ended."""
    os.setsid()
    with connection.makefile("r") as lines:
        request: Request = json.loads(lines.readline())
    running = set()
    for environment in request["ranks"]:
        pid = os.fork()
        if pid == 0:
            connection.close()
            _run_rank(request, environment)
        running.add(pid)
    connection.sendall(f"{os.getpid()}\n".encode())
    status = _wait(running, connection)
    with suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _wait(running: set[int], connection: socket.socket) -> int:
    """0, or the status of the first rank that failed; the others are ended then.

    All are killed where the client has gone.
    """
    status, failed_at, sent = 0, 0.0, 0
    while running:
        pid, how = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.remove(pid)
            code = os.waitstatus_to_exitcode(how)
            if code and not status:
                status, failed_at = code, time.monotonic()
            continue
        has_client = not select.select([connection], [], [], 0.02)[0]  # it sends nothing more
        waited = time.monotonic() - failed_at if status else 0.0
        if not has_client or waited > KILL_AFTER_S:
            wanted = signal.SIGKILL
        elif waited > GRACE_S:
            wanted = signal.SIGTERM
        else:
            continue
        if sent != wanted:
            sent = wanted
            for pid in running:
                os.kill(pid, wanted)
    return status


def _run_rank(request: Request, environment: dict[str, str]) -> NoReturn:
    """Becomes a rank: what an interpreter that was started afresh would find."""
    out = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, out), (2, out)):
        os.dup2(source, target)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    status: Any = 1
    try:
        _run_script(request["argv"], environment)
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run_script(argv: list[str], environment: dict[str, str]) -> None:
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path[:1] = [os.getcwd(), *paths]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path[:1] = [os.path.dirname(os.path.abspath(argv[0])), *paths]
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
