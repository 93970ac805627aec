"""torchrun for one node, with two things it lacks: an early signal and the ranks' exit status.

    python launch/slurm/node_agent.py [torchrun options] launch/finetune.py CONFIG.yaml ...

A batch system signals a job some minutes before its time is up. torchrun itself would die of
SIGUSR1, and whatever its ranks return it reports as status 1. This agent hands SIGUSR1 on to the
ranks, which save and exit with status 75, and then exits with the status of the rank that ended
first.

Where SAFEREG_REQUEUE_FILE is set, status 75 creates that file and becomes status 0: under `srun
--kill-on-bad-exit` any other status would have the nodes that are still ending shot.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

SAVED_STATUS = 75
"""A rank saved a checkpoint and wants to be run again (EX_TEMPFAIL of sysexits.h)."""


def forward_to_ranks(signum: int, frame: FrameType | None) -> None:
    """Sends the signal to every process that this agent has started."""
    for rank in psutil.Process().children():
        try:
            rank.send_signal(signum)
        except psutil.NoSuchProcess:
            pass  # it has just ended


def run(arguments: list[str]) -> int:
    """Runs the ranks of this node and returns the exit status of the one that failed first."""
    signal.signal(signal.SIGUSR1, forward_to_ranks)
    try:
        torchrun(arguments)
    except ChildFailedError as err:
        status = err.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status  # killed by a signal: as a shell says it
    return 0


def main() -> int:
    """Exit status of the node; see the top of the file."""
    status = run(sys.argv[1:])
    requeue_file = os.environ.get("SAFEREG_REQUEUE_FILE")
    if status == SAVED_STATUS and requeue_file:
        Path(requeue_file).touch()
        return 0
    return status


if __name__ == "__main__":
    sys.exit(main())
