"""One evaluation on several ranks: each answers its share of the prompts, the first does the rest.

The first rank alone reads, keeps, judges and writes, as if it were alone; its respondent tells the
others what is asked, and gathers what all have said. Each rank has the whole model. Answers are
those of one process: a sample's random numbers hang on its prompt's place among all of them.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.evaluate.attacks import attack_of
from safereg_dist.evaluate.respondent import Asked, Respondent
from safereg_dist.parallel.comm import Ranks

_ROUND = 32
"""Answers of a rank between two gathers: what a run that is cut off loses."""


@contextmanager
def shared_among(ranks: Ranks, own: Respondent) -> Iterator[Respondent | None]:
    """Yields the respondent of the first rank; None on the others, which have answered by then.

    Raises:
        What a rank's own respondent raises, on all ranks.
    Collectives: gathers of texts, three a call.
    """
    if ranks.world_size == 1:
        yield own
        return
    share = _Share(ranks, own)
    if not ranks.is_main:
        while (call := json.loads(ranks.gather_texts("")[0])) is not None:
            share.perform(call)
        yield None
        return
    everyone = SharedRespondent(share)
    try:
        yield everyone
    finally:
        everyone.close()


class SharedRespondent:
    """All ranks as one respondent; see `Respondent`."""

    def __init__(self, share: "_Share") -> None:
        self._share, self._is_open = share, True
        self.name, self.identity = share.own.name, share.own.identity

    def answers(self, prompts: list[LabelledPrompt], how: Asked) -> Iterator[tuple[int, str]]:
        """See `Respondent.answers`."""
        wanted = len(prompts) - len(how.without)
        if wanted == 0:
            return
        sent = {**how._asdict(), "without": sorted(how.without)}
        sent["attack"] = None if how.attack is None else how.attack.name
        self._call("begin", prompts=[asdict(prompt) for prompt in prompts], how=sent)
        most = math.ceil(wanted / self._share.ranks.world_size)
        for _ in range(math.ceil(most / _ROUND)):
            for said in self._call("more"):
                yield from map(tuple, said)

    def first_token(self, asked: list[tuple[LabelledPrompt, str]]) -> list[float | None]:
        """See `Respondent.first_token`."""
        return self._dealt("first_token", asked) or []

    def likelihoods(
        self, asked: list[tuple[LabelledPrompt, str]]
    ) -> list[tuple[float, int]] | None:
        """See `Respondent.likelihoods`."""
        return self._dealt("likelihoods", asked)

    def close(self) -> None:
        """Lets the other ranks go; nothing can be asked after it."""
        if self._is_open:
            self._is_open = False
            self._share.ranks.gather_texts(json.dumps(None))
            self._share.own.close()

    def _dealt(self, name: str, asked: list[tuple[LabelledPrompt, str]]) -> list[Any] | None:
        if not asked:
            return []
        found = self._call(name, asked=[(asdict(prompt), text) for prompt, text in asked])
        if any(part is None for part in found):
            return None
        result: list[Any] = [None] * len(asked)
        for rank, part in enumerate(found):
            result[rank :: len(found)] = part
        return result

    def _call(self, name: str, **given: Any) -> list[Any]:
        """What each rank found, in rank order."""
        call = {"name": name, "given": given}
        self._share.ranks.gather_texts(json.dumps(call))
        try:
            return self._share.perform(call)
        except Exception:
            self._is_open = False  # it was raised on all ranks: nobody waits for the end
            raise


class _Share:
    """A rank's part in what is asked."""

    def __init__(self, ranks: Ranks, own: Respondent) -> None:
        self.ranks, self.own = ranks, own
        self._said: Iterator[tuple[int, str]] = iter(())

    def perform(self, call: dict[str, Any]) -> list[Any]:
        """Does this rank's share; what each rank found. Collectives: two gathers."""
        with self.ranks.together():
            found = getattr(self, f"_{call['name']}")(**call["given"])
        return [json.loads(text) for text in self.ranks.gather_texts(json.dumps(found))]

    def _begin(self, prompts: list[dict[str, Any]], how: dict[str, Any]) -> None:
        known = set(how["without"])
        wanted = [place for place in range(len(prompts)) if place not in known]
        mine = set(wanted[self.ranks.rank :: self.ranks.world_size])
        attack = None if how["attack"] is None else attack_of(how["attack"])
        others = {place for place in range(len(prompts)) if place not in mine}
        asked = Asked(**{**how, "without": others, "attack": attack})
        self._said = self.own.answers([_prompt(each) for each in prompts], asked)

    def _more(self) -> list[tuple[int, str]]:
        return list(islice(self._said, _ROUND))

    def _first_token(self, asked: list[Any]) -> list[float | None]:
        return self.own.first_token(self._mine(asked))

    def _likelihoods(self, asked: list[Any]) -> list[tuple[float, int]] | None:
        return self.own.likelihoods(self._mine(asked))

    def _mine(self, asked: list[Any]) -> list[tuple[LabelledPrompt, str]]:
        mine = asked[self.ranks.rank :: self.ranks.world_size]
        return [(_prompt(each), text) for each, text in mine]


def _prompt(fields: dict[str, Any]) -> LabelledPrompt:
    lists = {name: tuple(fields[name]) for name in ("responses", "choices")}
    return LabelledPrompt(**{**fields, **lists})
