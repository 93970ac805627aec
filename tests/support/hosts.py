"""Several hosts on one machine (`tests/hosts.sh`), and launches of the entry over them."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safereg_dist.commands.launch import PATIENT_SSH
from support.launching import FINETUNE, ROOT, Finished, tail

SCRIPT = ROOT / "tests" / "hosts.sh"
BIN = Path(sys.executable).parent
PROGRAMS = (
    "ip",
    "nsenter",
    "unshare",
    "pgrep",
    "ssh",
    "ssh-keygen",
    "pdsh",
    "mpirun",
    "/usr/sbin/sshd",
)
LAUNCHERS = ("pdsh", "no_ssh", "torchrun", "openmpi")
RANKS = rf"{FINETUNE.name}|safereg_dist train"
"""What a rank's command line has, and a launcher's."""


def missing() -> str | None:
    """Why no hosts can be started on this machine; None where they can."""
    if os.geteuid() != 0:
        return "hosts of their own need root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        packages = "iproute2 procps openssh-server pdsh openmpi-bin"
        return f"hosts need {', '.join(absent)}: apt-get install {packages}"
    made = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], check=False)
    return "this machine allows no namespaces (unshare fails)" if made.returncode else None


@dataclass(frozen=True)
class Launch:
    """A launch over several hosts: the launcher's process and log on each host that started one."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def poll(self) -> int | None:
        """The first launcher's status; None while any runs."""
        statuses = [process.poll() for process in self.processes]
        return None if None in statuses else statuses[0]

    @property
    def output(self) -> str:
        """What all of them printed, host by host."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


class Hosts:
    """`count` hosts with a process of the entry started on each; ended by `close`.

    `disks` are folders that every host has for itself.
    """

    def __init__(self, folder: Path, count: int, *, disks: Sequence[Path] = ()) -> None:
        self.folder, self.count = folder, count
        self._launches = 0
        self._off: set[int] = set()
        for disk in disks:
            disk.mkdir(parents=True, exist_ok=True)
        self._script("up", count, *disks, env={**os.environ, "HOSTS_OWNER": str(os.getpid())})

    def close(self) -> None:
        """Ends every process on them, and them."""
        self._script("down")

    def _script(self, verb: str, *arguments: object, env: dict[str, str] | None = None) -> None:
        done = subprocess.run(
            ["bash", str(SCRIPT), verb, str(self.folder), *map(str, arguments)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"hosts.sh {verb} {arguments}: {done.stdout}"

    def cut(self, host: int) -> None:
        """Takes a host off the network: packets are lost in silence."""
        self._script("cut", host)

    def join(self, host: int) -> None:
        """Back on the network."""
        self._script("join", host)

    def power_off(self, host: int) -> None:
        """Ends all of a host at once; the others hear nothing."""
        self._script("off", host)
        self._off.add(host)

    def boot(self, host: int) -> None:
        """Starts a host that was off; its own disks are as they were."""
        self._script("boot", host)
        self._off.discard(host)

    def command(self, host: int, *command: object) -> list[str]:
        """The command line that runs a command on a host."""
        return ["bash", str(SCRIPT), "exec", str(self.folder), str(host), *map(str, command)]

    def run(self, host: int, *command: object) -> Finished:
        """A command on a host, to its end."""
        done = subprocess.run(
            self.command(host, *command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Finished(done.returncode, done.stdout)

    def rank_processes(self, host: int) -> list[int]:
        """Process ids, as the host counts them, of the ranks that run there."""
        found = self.run(host, "pgrep", "-f", f"^{sys.executable} .*{FINETUNE.name}").output.split()
        launching = self.run(
            host, "pgrep", "-f", r"deepspeed\.launcher|torch\.distributed\.run|bin/torchrun"
        )
        return sorted({int(pid) for pid in found} - {int(pid) for pid in launching.output.split()})

    def has_ranks(self) -> bool:
        """Whether a rank runs on any host."""
        return any(self.rank_processes(host) for host in self._on())

    def is_quiet(self) -> bool:
        """Whether no rank and no launcher runs on any host."""
        return not any(self.run(host, "pgrep", "-f", RANKS).output for host in self._on())

    def end_processes(self) -> None:
        """SIGKILL to everything that a launch may have left."""
        for host in self._on():
            self.run(host, "pkill", "-KILL", "-f", RANKS)

    def _on(self) -> list[int]:
        return [host for host in self._all() if host not in self._off]

    def _all(self) -> range:
        return range(self.count)

    # ---- launches ------------------------------------------------------------------------------

    def start(
        self,
        arguments: Sequence[object],
        *,
        launcher: str,
        ranks: int = 1,
        env: dict[str, str] | None = None,
    ) -> Launch:
        """The entry with `ranks` ranks on every host, as a user starts it.

        `pdsh`, `openmpi` and `safereg` (its verb `launch`) are started on host 0; `no_ssh` and
        `torchrun` on each.
        """
        self._launches += 1
        folder = self.folder / f"launch-{self._launches}"
        folder.mkdir()
        environment = {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "SAFEREG_CACHE": os.environ.get("SAFEREG_CACHE", str(self.folder / "cache")),
            **(env or {}),
        }
        # What ssh does not carry to the ranks of other hosts.
        (folder / ".deepspeed_env").write_text(
            "".join(f"{name}={value}\n" for name, value in environment.items())
        )
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"node{host} slots={ranks}\n" for host in self._all()))
        commands = _commands(launcher, self.count, ranks, hostfile, environment)
        launch = Launch([], [])
        for host, command in enumerate(commands):
            log = folder / f"node{host}.log"
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    self.command(host, *command, *arguments),
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    cwd=folder,
                    env={  # of the tests' own no more than ssh would carry: all hosts are alike
                        "HOME": os.environ.get("HOME", "/root"),
                        **environment,
                        **({"PDSH_SSH_ARGS_APPEND": PATIENT_SSH} if launcher == "pdsh" else {}),
                        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
                        "PYTHONPATH": os.pathsep.join((str(ROOT / "kernels"), str(ROOT))),
                    },
                )
            launch.processes.append(process)
            launch.logs.append(log)
        return launch

    def __call__(
        self, arguments: Sequence[object], *, timeout_s: float = 420, **how: object
    ) -> Finished:
        """A launch to the end of all its processes on all hosts."""
        launch = self.start(arguments, **how)  # type: ignore[arg-type]
        return Finished(self.wait(launch, timeout_s), launch.output)

    def wait(self, launch: Launch, timeout_s: float = 900) -> int:
        """The first launcher's status, once nothing of the launch runs on any host."""
        end = time.monotonic() + timeout_s
        while launch.poll() is None or not self.is_quiet():
            if time.monotonic() > end:
                self.end_processes()
                logs = "\n".join(tail(log) for log in launch.logs)
                raise AssertionError(f"no end on all hosts after {timeout_s} s:\n{logs}")
            time.sleep(0.1)
        status = launch.poll()
        assert status is not None
        return status


def _commands(
    launcher: str, count: int, ranks: int, hostfile: Path, environment: dict[str, str]
) -> list[list[str]]:
    """The command line of each host that starts one, without the entry's arguments."""
    entry = str(FINETUNE)
    if launcher == "pdsh":
        return [["deepspeed", "--hostfile", str(hostfile), entry]]
    if launcher == "safereg":
        verb = [sys.executable, "-m", "safereg_dist", "launch"]
        return [[*verb, "--hostfile", str(hostfile)]]
    if launcher == "no_ssh":
        told = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", "node0"]
        return [["deepspeed", *told, "--node_rank", str(host), entry] for host in range(count)]
    if launcher == "torchrun":
        sizes = ["--nnodes", str(count), "--nproc-per-node", str(ranks)]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500", "--rdzv-id", "run"]
        return [["torchrun", *sizes, *meeting, entry]] * count
    assert launcher == "openmpi"
    names = [*environment, "PYTHONPATH", "MASTER_ADDR=node0", "MASTER_PORT=29500"]
    return [
        [
            *("mpirun", "--allow-run-as-root", "-n", str(count * ranks)),
            *("--hostfile", str(hostfile), "--bind-to", "none"),
            *("--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0"),
            # Its daemons must notice a silent host before the ranks do: else mpirun waits for it.
            *("--mca", "oob_tcp_keepalive_time", "10", "--mca", "oob_tcp_keepalive_intvl", "5"),
            *("--mca", "oob_tcp_keepalive_probes", "2"),
            *(word for name in names for word in ("-x", name)),
            *(sys.executable, entry),
        ]
    ]
