"""Stage 1, with a judge model: it scores training pairs in the background, ahead of the step."""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future

from transformers import PreTrainedTokenizerBase

from safereg_dist.critic.verdict import Critic, Verdict
from safereg_dist.models.fingerprint import row_key
from safereg_dist.regions import CRITIC, region
from safereg_dist.risk.stage import ProbedStates, Risk, RiskSource
from safereg_dist.types import Row


class CriticRisk(RiskSource):
    """Scores this rank's rows with this rank's judge; involves no other rank.

    `prefetch` sends the rows of coming steps, so that the step seldom waits. A judgement fails at
    the critic's deadline, so a rank waits for at most ceil(queued / concurrency) deadlines.
    """

    name = "critic"
    looks_ahead = True
    sum_names = ("risk_failed",)

    def __init__(
        self,
        critic: Critic,
        *,
        announces: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """`announces` is true on the rank that prints warnings; `tokenizer` decodes rows that come
        as tokens only."""
        self._critic = critic
        self._tokenizer = tokenizer
        self._announces = announces
        self._was_failing = False
        self._asked: dict[bytes, Future[Verdict]] = {}
        self._judged: dict[bytes, Verdict] = {}
        self._failed = 0
        self.notes: dict[int, str] = {}

    @region(CRITIC)
    def prefetch(self, rows: Iterable[Row]) -> None:
        """Sends rows that are not judged yet; returns at once."""
        for row in rows:
            key = self._key(row)
            if key is not None and key not in self._judged and key not in self._asked:
                self._asked[key] = self._critic.submit(self._messages(row))

    def _key(self, row: Row) -> bytes | None:
        """SHA-256 of the conversation; None where there is none to judge."""
        if row.is_anchor or not row.id:
            return None
        if row.messages_json:
            return hashlib.sha256(row.messages_json.encode()).digest()
        if self._tokenizer is None or not row.prompt_ends:
            return None
        return bytes.fromhex(row_key(row.input_ids, row.loss_mask))

    def _messages(self, row: Row) -> list[dict[str, str]]:
        if row.messages_json:
            return json.loads(row.messages_json)
        assert self._tokenizer is not None
        return decoded_turns(row, self._tokenizer)

    @region(CRITIC)
    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """The judge's score of every row; a failed one follows the fail mode. Collectives: none.

        Raises:
            CriticUnavailable: a judgement failed and the fail mode is `stop`.
        """
        self.prefetch(rows)
        keys = [self._key(row) for row in rows]
        # A micro-batch can hold a row twice, where one epoch ends and the next begins.
        verdicts = {key: self._verdict(key) for key in {*keys} if key is not None}
        self.notes = notes = {}
        for index, key in enumerate(keys):
            if key is not None and verdicts[key].failed:
                notes[index] = f"judge failed: {verdicts[key].reason}"
            elif key is not None and verdicts[key].category:
                notes[index] = f"judge: {verdicts[key].category}"
        self._failed += sum(key is not None and verdicts[key].failed for key in keys)
        return [None if key is None else verdicts[key].score for key in keys]

    def _verdict(self, key: bytes) -> Verdict:
        if key in self._judged:
            return self._judged[key]
        verdict = self._asked.pop(key).result()
        if not verdict.failed:  # a failed one is asked again when the row comes back
            self._judged[key] = verdict
        return verdict

    def take_sums(self) -> dict[str, float]:
        """Number of this rank's rows whose judgement failed since the last call."""
        failed, self._failed = self._failed, 0
        return {"risk_failed": float(failed)}

    def end_step(self, total: Mapping[str, float]) -> dict[str, float | int]:
        """Number of rows whose judgement failed in the step, over all ranks."""
        failed = int(total["risk_failed"])
        if failed and not self._was_failing and self._announces:
            print(
                f"safereg: {failed} judgements of this step failed and count as `fail` says; the "
                "ledger says why, metrics.jsonl how many (risk_failed)",
                file=sys.stderr,
                flush=True,
            )
        self._was_failing = failed > 0  # warns again only after a step without failures
        return {"risk_failed": failed}


def decoded_turns(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The turns of a row of tokens: what is trained is the assistant's, the rest the user's.

    The text of a turn of the user has what its template writes around it, special tokens apart.
    """
    turns, begin = [], 0
    for end in row.prompt_ends:
        answered = end
        while answered < len(row.loss_mask) and row.loss_mask[answered]:
            answered += 1
        for role, ids in (
            ("user", row.input_ids[begin:end]),
            ("assistant", row.input_ids[end:answered]),
        ):
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            turns.append({"role": role, "content": text})
        begin = answered
    return turns
