"""The steps that every fit shares: reads and checks rows, loads the model, collects its states.

The order: all checks; the model's own answers, if they give the labels; one pass over all rows.
After that one rank continues alone.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from safereg_dist.config import DataConfig
from safereg_dist.data import load_tokenizer
from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import ConfigError, ProbeError
from safereg_dist.evaluate.generate import load_model
from safereg_dist.models.architecture import read_architecture
from safereg_dist.models.fingerprint import model_fingerprint
from safereg_dist.parallel.comm import Ranks
from safereg_dist.probe_lab.background import background_prompts
from safereg_dist.probe_lab.behaviour import Behaviour
from safereg_dist.probe_lab.collect import BATCHES_PER_SHARD, collect_states, positions_of
from safereg_dist.probe_lab.options import LabOptions
from safereg_dist.probe_lab.rows import (
    ProbedRow,
    check_labels,
    read_background,
    read_examples,
    tokenize_examples,
)
from safereg_dist.probe_lab.split import REGIONS, SplitRows, check_enough, split_rows
from safereg_dist.probe_lab.store import Manifest, StateStore, digest_rows
from safereg_dist.screen.progress import say


def alone(device: str | None) -> Ranks:
    """This process as the only rank, on the given device or the first GPU."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Ranks(rank=0, world_size=1, local_rank=0, device=chosen, dp_group=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The inputs read before any model is loaded."""

    model_dir: Path
    data_file: Path
    options: LabOptions
    layers: list[int]
    max_length: int | None
    tokenizer: PreTrainedTokenizerBase
    examples: list[LabelledPrompt]
    """Rows of the file; labels may be missing if the model's behaviour gives them."""
    background: list[LabelledPrompt]
    """The user's background rows."""
    parts: "Parts | None"
    """None until the model's behaviour has given the labels."""

    @property
    def has_labels(self) -> bool:
        """True where the file labels every row, and not all alike."""
        return len({e.label == "harmful" for e in self.examples}) == 2 and all(
            e.label is not None for e in self.examples
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All rows, background last, and which part each belongs to."""

    rows: SplitRows
    probed: list[ProbedRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """States on disk, and the rows they belong to."""

    sources: Sources
    rows: SplitRows
    store: StateStore
    out: Path
    """Folder of the results."""
    work: Path
    """Folder of intermediate files."""
    device: torch.device
    """Device of the fits."""

    def clean_up(self) -> None:
        """Removes the intermediate files, unless the user named a folder for them."""
        if self.sources.options.work is None:
            shutil.rmtree(self.work, ignore_errors=True)

    def facts(self) -> dict[str, Any]:
        """What `probe.json` and `sweep.json` say about where figures come from."""
        sources, options = self.sources, self.sources.options
        return {
            "model": str(sources.model_dir),
            "template_sha256": self.store.manifest.template_sha256,
            "data_sha256": hashlib.sha256(sources.data_file.read_bytes()).hexdigest(),
            "labels": "behaviour" if options.self_supervised else "data",
            "required_recall": options.recall,
            "calibration": options.calibration,
            "calibration_positives": int(self.rows.calibration_positives.sum()),
            "background": int(self.rows.background.sum()),
            "rows": {part: int(self.rows.where(part).sum()) for part in REGIONS},
            "groups": len(set(self.rows.group.tolist())),
            "seed": options.seed,
        }


def read_sources(model_dir: Path, data_file: Path, options: LabOptions) -> Sources:
    """Reads and checks everything but the model's weights.

    Raises:
        ConfigError, DataError: no such model or layer, no template, rows that cannot be used.
    """
    architecture = read_architecture(Path(model_dir)).get_text_config()
    examples = read_examples(Path(data_file), options.position)
    if not options.self_supervised:
        check_labels(examples, data_file)
    own = options.background_file
    background = [] if own is None else read_background(own, options.position)
    sources = Sources(
        model_dir=Path(model_dir),
        data_file=Path(data_file),
        options=options,
        layers=options.checked_layers(architecture.num_hidden_layers),
        max_length=positions_of(architecture),
        tokenizer=load_tokenizer(str(model_dir), DataConfig(train=str(data_file))),
        examples=examples,
        background=background,
        parts=None,
    )
    if options.self_supervised:  # fails now, not after hours of answers
        _tokenize(sources, [*examples, *background])
        return sources
    return replace(sources, parts=_deal(sources, examples))


def collect(
    model_dir: Path,
    data_file: Path,
    out_dir: Path,
    positions: Sequence[str],
    options: LabOptions,
    *,
    ranks: Ranks,
) -> list[Collected]:
    """The states at each position, collected by all ranks; an empty list on all but the first.

    Of two positions, each has its own output folder and its own rows on one model. No collective
    follows: the other ranks may exit, and the first one continues alone.

    Raises:
        ConfigError, DataError, ProbeError: see `read_sources`; a state that is not finite.
    Collectives: a few `raise_together`; as many on every rank.
    """
    options = replace(options, progress=options.progress and ranks.is_main)
    several = len(positions) > 1
    asked = [options.at(position) for position in positions] if several else [options]
    outs = [Path(out_dir) / position for position in positions] if several else [Path(out_dir)]
    with ranks.together():
        _check_place(Path(out_dir))
        sources = [read_sources(model_dir, data_file, each) for each in asked]
        say("probe: loads the model, reads its states of the prompts, then fits")
        model, _ = load_model(model_dir, device=ranks.device, progress=options.progress)
        fingerprint = model_fingerprint(model)
    collected = [
        _collect_one(model, fingerprint, source, out, ranks)
        for source, out in zip(sources, outs, strict=True)
    ]
    return collected if ranks.is_main else []


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ProbeError(f"cannot write to {out}: it is a file; choose a writable folder for --out")


def _collect_one(
    model: Any, fingerprint: str, sources: Sources, out: Path, ranks: Ranks
) -> Collected:
    options = sources.options
    work = options.work or out.with_name(f".{out.name}.states")
    parts = sources.parts or _deal_by_behaviour(model, fingerprint, sources, work, ranks)
    with ranks.together():
        store = StateStore(work / "states", _manifest(model, fingerprint, sources, parts.probed))
        if ranks.is_main:
            store.prepare(replace_stale=options.work is None)
    with ranks.together():
        collect_states(
            model,
            parts.probed,
            store,
            batch_size=options.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            progress=options.progress,
        )
    return Collected(
        sources=sources, rows=parts.rows, store=store, out=out, work=work, device=ranks.device
    )


def _deal_by_behaviour(
    model: Any, fingerprint: str, sources: Sources, work: Path, ranks: Ranks
) -> Parts:
    """The parts, by labels that the model's own behaviour gives.

    Collectives: two `raise_together`.
    """
    options = sources.options
    behaviour = Behaviour(work / "answers", sources.examples, fingerprint)
    with ranks.together():
        behaviour.answer(
            model,
            sources.tokenizer,
            batch_size=options.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            progress=options.progress,
        )
    with ranks.together():
        parts = _deal(sources, behaviour.labelled())
    return parts


def _deal(sources: Sources, labelled: list[LabelledPrompt]) -> Parts:
    """Splits all rows, and checks that there are enough for the required recall."""
    options = sources.options
    made = background_prompts(
        sources.tokenizer,
        labelled,
        count=options.background,
        seed=options.seed,
        answered=options.position == "response",
    )
    negatives = [*made, *sources.background]
    rows = split_rows(
        labelled, negatives, options.held_out_fraction, options.seed, progress=options.progress
    )
    behaved = options.self_supervised
    check_enough(rows, options.recall, options.held_out_fraction, by_behaviour=behaved)
    return Parts(rows=rows, probed=_tokenize(sources, [*labelled, *negatives]))


def _tokenize(sources: Sources, examples: list[LabelledPrompt]) -> list[ProbedRow]:
    return tokenize_examples(
        sources.tokenizer, examples, sources.options.position, max_length=sources.max_length
    )


def _manifest(model: Any, fingerprint: str, sources: Sources, probed: list[ProbedRow]) -> Manifest:
    config = model.config.get_text_config()
    template = sources.tokenizer.chat_template
    if not isinstance(template, str):
        raise ConfigError(
            "expected one chat template, found several by name: save the one to use with the "
            "tokenizer (chat_template.jinja)"
        )
    options = sources.options
    return Manifest(
        fingerprint=fingerprint,
        dtype=str(model.dtype),
        template_sha256=hashlib.sha256(template.encode()).hexdigest(),
        rows_sha256=digest_rows(probed),
        num_rows=len(probed),
        position=options.position,
        poolings=options.collected_poolings,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        rows_per_shard=options.batch_size * BATCHES_PER_SHARD,
    )
