"""What the answers of hosts mean for a run."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safereg_dist.config import SigningConfig
from safereg_dist.doctor.finding import Finding, finding
from safereg_dist.doctor.host import Answer, leads_elsewhere
from safereg_dist.doctor.work import Work
from safereg_dist.errors import ConfigError
from safereg_dist.models.extras import install
from safereg_dist.run.checkpoint import saved_checkpoints
from safereg_dist.run.lock import holder_of, is_lock
from safereg_dist.run.stop import stop_file
from safereg_dist.screen.table import gigabytes
from safereg_dist.storage.signing import signing_key

KILLED_AFTER_S = 30.0
"""deepspeed's `launch` and torchrun kill ranks so long after they were told to end."""
_HEADROOM = 0.8  # of those seconds, for a save


def host_findings(answers: Mapping[str, Answer], work: Work) -> Iterator[Finding]:
    """Of all hosts together: they must be alike, see the same folder and know each other."""
    several = len(answers) > 1
    if several:
        seen = Counter(answer.host for answer in answers.values())
        yield _everywhere(
            "each name is a host of its own",
            {h: f"answers as {a.host}" if seen[a.host] > 1 else "" for h, a in answers.items()},
            found=", ".join(answers),
            remedy="a name leads to the wrong host: correct /etc/hosts, DNS or the hostfile",
        )
        yield _alike("python", answers, lambda a: a.python)
        for name in next(iter(answers.values())).versions:
            yield _alike(f"version of {name}", answers, lambda a, name=name: a.versions[name])
        yield _alike("our code", answers, lambda a: a.code)
        yield _alike("GPU", answers, lambda a: a.gpu or "none")
    missing = {h: [p for p in work.packages if not _has(a, p)] for h, a in answers.items()}
    yield _everywhere(
        "packages are there",
        {h: ", ".join(names) for h, names in missing.items()},
        found=", ".join(work.packages),
        remedy="there: " + install(*(name for names in missing.values() for name in names)),
    )
    yield _everywhere(
        "output_dir is one folder",
        {h: "" if a.sees_nonce else "does not see it" for h, a in answers.items()},
        found="all see a file written by the first",
        remedy="mount the folder that holds output_dir at the same path on all hosts",
    )
    yield _everywhere(
        "inputs are there",
        {h: ", ".join(a.missing) for h, a in answers.items()},
        found="model, data, risk" if work.hub_model is None else "data, risk",
        remedy="copy them there, or mount the folder they are in; a probe: `safereg probe fit`, "
        "anchors: `safereg anchor build`",
    )
    if work.hub_model is not None:
        yield Finding(
            check="model",
            found=f"{work.hub_model} is no folder here but a hub's id: not looked at",
            expected="a folder, or an id that every host can fetch",
            verdict="warn",
            remedy="`safereg train CONFIG --dry-run` fetches it here",
        )
    if any(a.unreachable for a in answers.values()) or work.endpoints:
        yield _everywhere(
            "judge answers",
            {h: _listed(a.unreachable, "; ") for h, a in answers.items()},
            found="takes connections",
            remedy="start the judge, or correct `endpoint`; every rank asks it",
        )
    if several:
        yield _everywhere(
            "own name",
            {h: _loopback(a) for h, a in answers.items()},
            found="no loopback address",
            remedy="ranks offer this address to the others: remove the line of 127.0.1.1 from "
            "/etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface",
        )
        yield _everywhere(
            "names of the others",
            {h: _listed(a.unknown_peers, ", ") for h, a in answers.items()},
            found="all resolve",
            remedy="add them to DNS or /etc/hosts",
        )


def _has(answer: Answer, package: str) -> bool:
    return answer.versions.get(package, "unknown") != "unknown"


def first_host_findings(first: Answer, *, port: int) -> Iterator[Finding]:
    """Of the host that the ranks meet at."""
    if port:
        yield finding(
            f"port {port} on {first.host}",
            not first.port_error,
            found=first.port_error or "free",
            expected="free",
            remedy="--master_port OTHER (deepspeed, torchrun), and end what holds it",
        )


def disk_findings(answers: Mapping[str, Answer], work: Work, folder: Path) -> Iterator[Finding]:
    """Whether the run's files fit, and how long a save takes."""
    if work.checkpoint_bytes is None:
        return
    needed = work.disk_bytes
    free = min(a.free_bytes for a in answers.values())
    yield finding(
        "disk",
        free >= needed,
        found=f"{gigabytes(free)} free",
        expected=f"{gigabytes(needed)}: {work.disk_text}",
        remedy="free space, lower train.keep_checkpoints, or move output_dir",
    )
    staged = [a for a in answers.values() if a.staging]
    if staged:
        part = work.checkpoint_bytes // len(answers)
        least = min(staged, key=lambda a: a.staging_free_bytes)
        free = f"{gigabytes(least.staging_free_bytes)} free"
        yield finding(
            "disk for staging",
            least.staging_free_bytes >= part,
            found=f"{free} in {least.staging} of {least.host}",
            expected=f"{gigabytes(part)} on every host: its ranks' part of a checkpoint",
            remedy="train.save_staging: a folder on a larger disk of each host",
        )
    slowest = min(a.write_bytes_per_s for a in answers.values())
    if not slowest:
        host = min(answers, key=lambda h: answers[h].write_bytes_per_s)
        yield Finding(
            check="writing",
            found=f"{host} cannot write to {folder}",
            expected="writable by all",
            verdict="FAIL",
            remedy="mount it writable, or give its user the right",
        )
        return
    seconds = work.checkpoint_bytes / len(answers) / slowest
    yield finding(
        "time of a save",
        seconds <= _HEADROOM * KILLED_AFTER_S,
        found=f"{seconds:.1f} s at {slowest / 1e6:.0f} MB/s a host",
        expected=f"under {_HEADROOM * KILLED_AFTER_S:.0f} s, if it is to be stopped by SIGTERM",
        remedy="launchers kill ranks 30 s after SIGTERM: stop with `safereg stop` instead, give "
        "schedulers and TORCH_ELASTIC_SHUTDOWN_TIMEOUT that long (launch/slurm, launch/kubernetes: "
        "600 s), and save seldom",
        bad="warn",
    )


def key_findings(signing: SigningConfig | None) -> Iterator[Finding]:
    """Of the key that the first rank signs with, as it is on this host."""
    if signing is None:
        return
    wrong = ""
    try:
        signing_key(signing)
    except ConfigError as error:
        wrong = str(error)
    yield finding(
        "key to sign with, on this host",
        not wrong,
        found=wrong or "can sign",
        expected="can sign",
        remedy="give it to the host of the first rank, where training would refuse to start",
    )


def folder_findings(folder: Path) -> Iterator[Finding]:
    """The state of the run's folder."""
    saved = saved_checkpoints(folder / "checkpoint")
    state = "new" if not (folder / "config.yaml").is_file() else "holds a run"
    state += f", resumes from {saved[-1].name}" if saved else ""
    is_complete = (folder / "summary.json").is_file()
    is_new = state == "new" and folder.is_dir()
    is_foreign = is_new and not all(map(is_lock, folder.iterdir()))
    yield finding(
        "run folder",
        not (is_complete or is_foreign),
        found="complete" if is_complete else "other files" if is_foreign else state,
        expected="new, or a run to go on with",
        remedy="nothing would be trained: choose another output_dir",
    )
    if (holder := holder_of(folder)) is not None:
        yield finding(
            "run lock",
            False,
            found=f"held by {holder.name}",
            expected="nobody writes to the folder",
            remedy="wait for its end, stop it, or choose another output_dir"
            if holder.is_alive
            else "it is gone, or silent for a while: the next run makes sure, and takes over",
            bad="FAIL" if holder.is_alive else "warn",
        )
    if stop_file(folder).exists():
        yield Finding(
            check="stop file",
            found="there is one",
            expected="none",
            verdict="warn",
            remedy="a run that uses this folder now is about to end; a new start removes it",
        )


def link_finding(rates: Mapping[str, float], work: Work, *, between_hosts: bool) -> Finding:
    """The slowest link against the bytes of a step.

    `rates` are bytes/s that each host, or rank, receives.
    """
    slowest = min(rates, key=lambda name: rates[name])
    rate = rates[slowest]
    found = f"{rate / 1e6:.0f} MB/s into {slowest}"
    moved = work.moved_bytes(between_hosts=between_hosts)
    if moved is None or work.step_seconds is None:
        return Finding(check="bandwidth", found=found, expected="no plan to compare", verdict="ok")
    seconds = moved / rate
    return finding(
        "bandwidth",
        seconds <= work.step_seconds,
        found=f"{found}: {seconds:.2g} s a step",
        expected=f"{moved / 1e6:.3g} MB a step within its {work.step_seconds:.2g} s of products",
        remedy="steps will wait for the network: use the fast interface (NCCL_SOCKET_IFNAME), more "
        "rows a step, engine.hpz_partition_size, or reference.cache",
        bad="warn",
    )


def _alike(check: str, answers: Mapping[str, Answer], value: Callable[[Answer], str]) -> Finding:
    values = {host: value(answer) for host, answer in answers.items()}
    usual = Counter(values.values()).most_common(1)[0][0]
    others = [f"{host} has {v}" for host, v in values.items() if v != usual]
    return finding(
        check,
        not others,
        found=", ".join(others) or usual,
        expected=f"{usual} on all" if others else "the same on all",
        remedy="make the environments and checkouts alike",
    )


def _everywhere(check: str, wrong: Mapping[str, str], *, found: str, remedy: str) -> Finding:
    bad = [f"{host}: {what}" for host, what in wrong.items() if what]
    return finding(
        check, not bad, found="; ".join(bad) or found, expected="on every host", remedy=remedy
    )


def _listed(reasons: Mapping[str, str], mark: str) -> str:
    return mark.join(f"{name}: {why}" for name, why in reasons.items())


def _loopback(answer: Answer) -> str:
    """Why ranks of other hosts cannot reach this one by its name; empty where they can."""
    address = answer.own_address
    return "" if leads_elsewhere(address) else f"{answer.host} is {address}"
