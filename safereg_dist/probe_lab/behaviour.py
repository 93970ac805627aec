"""Labels from the aligned model's own behaviour: a prompt that it refuses counts as harmful.

No label and no judge model: a short greedy answer to each prompt, and the keyword judge's word on
whether it refuses. The labels are as good as the model's refusals are.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import CheckpointError, DataError
from safereg_dist.evaluate.generate import generate_answers
from safereg_dist.evaluate.judges import KeywordJudge
from safereg_dist.screen.progress import progress_bar
from safereg_dist.storage.atomic import write_atomically
from safereg_dist.storage.json_text import parse_json

ANSWER_TOKENS = 32
"""Refusals are said at once; the keyword judge reads the first hundred characters."""
_PER_FILE = 256


class Behaviour:
    """Which prompts the model refuses; in a folder, so that ranks share it and it can go on."""

    def __init__(self, folder: Path, prompts: Sequence[LabelledPrompt], fingerprint: str) -> None:
        self._folder = folder
        self._prompts = prompts
        said = json.dumps([fingerprint, ANSWER_TOKENS, [prompt.messages for prompt in prompts]])
        self._key = hashlib.sha256(said.encode()).hexdigest()
        self._num_files = -(-len(prompts) // _PER_FILE)

    def answer(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        progress: bool = True,
    ) -> None:
        """Answers this rank's prompts, but for those answered before. Collectives: none.

        Raises:
            DataError: a prompt and its answer do not fit into the model.
            CheckpointError: the folder cannot be written.
        """
        judge = KeywordJudge()
        mine = range(rank, self._num_files, world_size)
        for number in progress_bar(mine, desc="the model's own answers", shown=progress):
            if self._read(number) is not None:
                continue
            chunk = list(self._chunk(number))
            answers = generate_answers(
                model,
                tokenizer,
                chunk,
                max_new_tokens=ANSWER_TOKENS,
                batch_size=batch_size,
                progress=False,
            )
            # An empty answer is no refusal for a label, though the judge counts it as one.
            refused = [
                bool(answer.text) and judge.is_refusal(prompt, answer.text)
                for prompt, answer in zip(chunk, answers, strict=True)
            ]
            content = json.dumps({"key": self._key, "refused": refused})
            write_atomically(self._path(number), content)

    def labelled(self) -> list[LabelledPrompt]:
        """The prompts, labelled by what the model did; after a barrier behind `answer`.

        Raises:
            CheckpointError: answers are missing.
            DataError: the model refused all of them or none.
        """
        refused: list[bool] = []
        for number in range(self._num_files):
            part = self._read(number)
            if part is None:
                raise CheckpointError(
                    f"expected the model's answers in {self._path(number)}, found none or others: "
                    "run the same command again"
                )
            refused += part
        if len(set(refused)) < 2:
            raise DataError(
                f"the model refused {sum(refused)} of {len(refused)} prompts: its behaviour tells "
                "no two kinds apart; give prompts of both kinds and an aligned model, or labels"
            )
        return [
            replace(prompt, label="harmful" if no else "benign")
            for prompt, no in zip(self._prompts, refused, strict=True)
        ]

    def _chunk(self, number: int) -> Sequence[LabelledPrompt]:
        return self._prompts[number * _PER_FILE : (number + 1) * _PER_FILE]

    def _path(self, number: int) -> Path:
        return self._folder / f"refused-{number:05d}.json"

    def _read(self, number: int) -> list[bool] | None:
        try:
            found = parse_json(self._path(number).read_bytes())
        except (OSError, ValueError):
            return None
        return found["refused"] if found["key"] == self._key else None
