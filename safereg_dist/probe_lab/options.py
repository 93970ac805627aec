"""The options of a fit or a sweep, checked before anything runs."""

from dataclasses import dataclass, replace
from pathlib import Path

from safereg_dist.errors import ConfigError
from safereg_dist.probe_lab.calibration import CALIBRATIONS
from safereg_dist.risk.probe import KINDS, POOLINGS_OF

DEFAULT_POOLING = {"prompt": "last_prompt_token", "response": "mean_response"}
"""By position. The end-of-turn token of an answer says less than the mean over the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabOptions:
    """Options of `safereg probe fit` and `safereg probe sweep`."""

    layers: list[int] | None = None
    """Layers to try, 1 to the model's last; None = all."""
    recall: float = 0.95
    """Share of harmful prompts to be flagged, in (0, 1)."""
    position: str = "prompt"
    """`prompt` or `response`."""
    pooling: str | None = None
    """One of `POOLINGS_OF[position]`; None = `DEFAULT_POOLING`."""
    every_pooling: bool = False
    """True collects all poolings of the position in the one pass (a sweep)."""
    kinds: tuple[str, ...] | None = None
    """Kinds of probes to try; None = linear, or direction where `self_supervised`."""
    calibration: str = "temperature"
    """`temperature` or `isotonic`."""
    background: int = 200
    """Number of built-in off-distribution negatives; 0 = none."""
    background_file: Path | None = None
    """More benign rows, for the fit and for the background's false positives."""
    self_supervised: bool = False
    """Labels from the model's own refusals."""
    held_out_fraction: float = 0.2
    """Share of the rows in the calibration part, and in the hold-out; below 0.5."""
    seed: int = 0
    batch_size: int = 32
    """Rows of one forward."""
    work: Path | None = None
    """Folder of the hidden states, kept; None = a hidden one beside the output, removed after a
    fit that succeeds, so that the same command goes on where it was killed. On several nodes all of
    them must see it."""
    device: str | None = None
    """None takes the first GPU where there is one, else the CPU."""
    progress: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.recall < 1:
            raise ConfigError(f"--recall must lie in (0, 1), got {self.recall}: 0.95 is usual")
        if self.position not in POOLINGS_OF:
            raise ConfigError(f"--position must be prompt or response, got {self.position!r}")
        self._check_one_of("--pooling", self.chosen_pooling, POOLINGS_OF[self.position])
        self._check_one_of("--calibration", self.calibration, CALIBRATIONS)
        for kind in self.chosen_kinds or ("",):
            self._check_one_of("--kind", kind, KINDS)
        if not 0 < self.held_out_fraction < 0.5:
            raise ConfigError(
                f"held_out_fraction must lie in (0, 0.5), got {self.held_out_fraction}: "
                "calibration and hold-out take as much each, the rest is fitted on"
            )
        if self.layers is not None and not self.layers:
            raise ConfigError("--layers names no layer: give numbers as 1,2,4, or `all`")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.self_supervised and self.position != "prompt":
            raise ConfigError(
                "--self-supervised labels prompts by whether the model refuses them, so it has no "
                "response position: drop --position, or give labels"
            )

    @property
    def chosen_kinds(self) -> tuple[str, ...]:
        """The kinds in the options, or the default."""
        if self.kinds is None:
            return ("direction",) if self.self_supervised else ("linear",)
        return tuple(dict.fromkeys(self.kinds))

    @property
    def chosen_pooling(self) -> str:
        """The pooling in the options, or the position's default."""
        return self.pooling or DEFAULT_POOLING[self.position]

    @property
    def collected_poolings(self) -> tuple[str, ...]:
        """The poolings to collect: the chosen one, or in a sweep all of the position."""
        return POOLINGS_OF[self.position] if self.every_pooling else (self.chosen_pooling,)

    def at(self, position: str) -> "LabOptions":
        """The options for one of two positions, with its own pooling and folder."""
        asked = None if self.pooling is None else self.pooling.split("_")[0]
        names = [name for name in POOLINGS_OF[position] if asked and name.startswith(asked)]
        return replace(
            self,
            position=position,
            pooling=next(iter(names), None),
            work=None if self.work is None else self.work / position,
        )

    def checked_layers(self, last: int) -> list[int]:
        """The layers to try in a model with `last` layers.

        Raises:
            ConfigError: there is no such layer.
        """
        if self.layers is None:
            return list(range(1, last + 1))
        wrong = [layer for layer in self.layers if not 1 <= layer <= last]
        if wrong:
            raise ConfigError(f"the model has layers 1 to {last}, --layers asks for {wrong[0]}")
        return sorted(set(self.layers))

    def _check_one_of(self, flag: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ConfigError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")
