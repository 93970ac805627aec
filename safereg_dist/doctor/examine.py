"""The examination: of the hosts of a hostfile, of a launcher's ranks, or of this host alone."""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from safereg_dist.config import Config
from safereg_dist.doctor import checks
from safereg_dist.doctor.finding import Finding
from safereg_dist.doctor.host import Answer, Question, answer, nearest_folder
from safereg_dist.doctor.remote import ask_hosts, measure_links
from safereg_dist.doctor.work import Work, work_of
from safereg_dist.errors import ConfigError
from safereg_dist.parallel.comm import Ranks
from safereg_dist.screen.progress import say

GATHERED_BYTES = 16 << 20
"""Of each rank in a timed all-gather."""
TIMES = 3


def examine_hosts(config: Config, hosts: Mapping[str, int], *, port: int) -> list[Finding]:
    """Findings of all hosts of a hostfile, asked over ssh, with the rates of a ring of TCP.

    Where none of them answers, those of this host.
    """
    names = list(hosts)
    peers = [name.rpartition("@")[2] for name in names]
    sizes = dict(world_size=sum(hosts.values()), per_host=max(hosts.values()))
    work = work_of(config, **sizes, gpu="")
    with _question(config, work, peers=peers, port=port) as question:
        say(f"doctor: asks {len(names)} hosts over ssh")
        found = ask_hosts(names, question)
        answers = {host: a for host, a in found.items() if isinstance(a, Answer)}
        if not answers:
            answers["this host"] = answer(question)
    nobody = "this host" in answers
    findings = _unanswered(
        found,
        check="ssh to {}",
        expected="an answer; what follows is of this host alone" if nobody else "an answer",
        remedy="set up ssh without a password, and the project at the same path there; a name "
        "that does not resolve: correct the hostfile, or DNS and /etc/hosts",
    )
    work = work_of(config, **sizes, gpu=next(iter(answers.values())).gpu)
    findings += _of_answers(config, answers, work, port=port)
    if len(answers) > 1:
        say("doctor: measures the links between them")
        links = measure_links(list(answers))
        findings += _unanswered(
            links,
            check="link into {}",
            expected="a transfer",
            remedy="open the firewall between the hosts for all ports: ranks choose theirs",
        )
        rates = {host: rate for host, rate in links.items() if isinstance(rate, float)}
        if rates:
            findings.append(checks.link_finding(rates, work, between_hosts=True))
    return findings


def _unanswered(found: Mapping[str, object], *, check: str, **told: str) -> list[Finding]:
    """One finding for the hosts that failed for the same reason, which is a text in `found`."""
    alike: dict[str, dict[str, str]] = {}
    for host, why in found.items():
        if isinstance(why, str):
            name = re.escape(host.rpartition("@")[2])
            nameless = re.sub(rf"(?<![\w.-])(\S+@)?{name}(?![\w-])", "HOST", why)
            alike.setdefault(nameless, {})[host] = why
    return [
        Finding(
            check=check.format(", ".join(same)),
            found=next(iter(same.values())) + "; the others alike" * (len(same) > 1),
            verdict="FAIL",
            **told,
        )
        for same in alike.values()
    ]


def examine_ranks(config: Config, ranks: Ranks, *, port: int) -> list[Finding]:
    """The same findings on all ranks of a launcher, or of this process alone.

    Collectives: gathers of texts, and a few all-gathers of `GATHERED_BYTES` a rank.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    with ranks.together():
        work = work_of(config, world_size=ranks.world_size, per_host=local, gpu="")
    peers = sorted(set(ranks.gather_texts(os.uname().nodename))) if ranks.world_size > 1 else []
    with ExitStack() as stack:
        text = ""
        with ranks.together():
            if ranks.is_main:
                own_port = port if ranks.world_size == 1 else 0  # else the ranks hold it
                asked = stack.enter_context(_question(config, work, peers=peers, port=own_port))
                text = json.dumps(asdict(asked))
        question = Question(**json.loads(ranks.gather_texts(text)[0]))
        with ranks.together():
            own = json.dumps(asdict(answer(question))) if ranks.local_rank == 0 else ""
        texts = [text for text in ranks.gather_texts(own) if text]
    answers = {a.host: a for a in (Answer(**json.loads(text)) for text in texts)}
    first = next(iter(answers.values()))
    work = work_of(config, world_size=ranks.world_size, per_host=local, gpu=first.gpu)
    findings = _of_answers(config, answers, work, port=question.port)
    if ranks.world_size > 1:
        rates = _gather_rates(ranks)
        findings.append(checks.link_finding(rates, work, between_hosts=len(answers) > 1))
    return findings


def _of_answers(
    config: Config, answers: Mapping[str, Answer], work: Work, *, port: int
) -> list[Finding]:
    folder = Path(config.output_dir)
    return [
        *checks.host_findings(answers, work),
        *checks.first_host_findings(next(iter(answers.values())), port=port),
        *checks.disk_findings(answers, work, nearest_folder(folder)),
        *checks.folder_findings(folder),
        *checks.key_findings(config.signing),
    ]


@contextmanager
def _question(config: Config, work: Work, *, peers: list[str], port: int) -> Iterator[Question]:
    """A block in which a file of ours lies where the run's folder will be."""
    folder = nearest_folder(Path(config.output_dir).absolute())
    nonce = folder / f".doctor.{os.urandom(8).hex()}"
    try:
        nonce.touch()
    except OSError as err:
        raise ConfigError(
            f"expected to write to {folder} for output_dir {config.output_dir}, got: "
            f"{err.strerror}: choose a writable place"
        ) from err
    try:
        yield Question(
            folder=str(folder),
            nonce=nonce.name,
            peers=peers,
            paths=[str(Path(path).absolute()) for path in work.paths],
            endpoints=work.endpoints,
            port=port,
            staging=(config.train.save_staging or "") if config.train.async_save else None,
        )
    finally:
        nonce.unlink(missing_ok=True)


def _gather_rates(ranks: Ranks) -> dict[str, float]:
    """Rank -> bytes/s that it received in the fastest of `TIMES` all-gathers."""
    own = torch.zeros(GATHERED_BYTES, dtype=torch.uint8, device=ranks.device)
    best = float("inf")
    for _ in range(TIMES + 1):  # the first one connects
        ranks.raise_together(None)
        began = time.perf_counter()
        ranks.gather(own)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        best = min(best, time.perf_counter() - began)
    rate = GATHERED_BYTES * (ranks.world_size - 1) / best
    rates = ranks.gather_texts(str(rate))
    return {f"rank {rank}": float(text) for rank, text in enumerate(rates)}
