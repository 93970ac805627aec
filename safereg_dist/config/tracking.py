"""Who is told of a run's steps, and when they are a reason for an alarm: the section `tracking`."""

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from safereg_dist.config.checks import one_of
from safereg_dist.config.section import ASIDE, WRITTEN, Section
from safereg_dist.errors import ConfigError

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""What `tracking.to` may name: modules."""


class Band(Section):
    """Where a number of each step should be."""

    min: float | None = Field(default=None, json_schema_extra=ASIDE)
    """Smallest value that raises no alert; null = none, or what the section says."""
    max: float | None = Field(default=None, json_schema_extra=ASIDE)
    """Largest value that raises no alert; null = none, or what the section says."""
    steps: int = Field(default=3, ge=1, json_schema_extra=ASIDE)
    """Steps in a row outside the band that make an alert, >= 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ConfigError(
                f"a band of tracking.alerts has min {self.min} above max {self.max}, so that no "
                "value is inside: exchange them"
            )
        return self


class HeldBackBand(Band):
    """Share of a step's rows whose risk is at or above the threshold, anchors aside; `max` null:
    what chance makes of the share that was counted before the run, where it was."""


class DivergenceBand(Band):
    """Mean divergence of a step's active tokens, nats a token; both null: not watched."""


class CanaryBand(Band):
    """P(refuse) of `eval.canary`; a step is a look, and `min` null half of what the first saw."""

    steps: int = Field(default=2, ge=1, json_schema_extra=ASIDE)
    """Looks in a row outside the band that make an alert, >= 1."""


class NonFiniteBand(Band):
    """1 where a step's loss or gradient was not finite, else 0; `max: 1` does not watch it."""

    max: float | None = Field(default=0.0, json_schema_extra=ASIDE)
    """Largest value that raises no alert."""
    steps: int = Field(default=1, ge=1, json_schema_extra=ASIDE)
    """Steps in a row outside the band that make an alert, >= 1; three in a row end the run."""


class AlertsConfig(Section):
    """When a step is a reason for an alert: once each time that a number leaves its band."""

    held_back: HeldBackBand = HeldBackBand()
    divergence: DivergenceBand = DivergenceBand()
    canary_refusal: CanaryBand = CanaryBand()
    non_finite: NonFiniteBand = NonFiniteBand()
    stop: bool = Field(default=False, json_schema_extra=ASIDE)
    """After an alert the run saves and ends with status 75, as `safereg stop` has it do."""


class TrackingConfig(Section):
    """Who is told of a run's steps, beside `metrics.jsonl`, by the main rank."""

    to: tuple[str, ...] = Field(default=("tensorboard",), json_schema_extra=ASIDE)
    """A list of `tensorboard`, `wandb` and `mlflow` (extras of the same names); empty = none. Their
    own environment variables say where and as whom (WANDB_MODE, MLFLOW_TRACKING_URI)."""
    project: str = Field(default="safereg", json_schema_extra=ASIDE)
    """The project of W&B, the experiment of MLflow."""
    run_name: str | None = Field(default=None, json_schema_extra=ASIDE)
    """The run's name there; null = the last part of `output_dir`."""
    folder: Annotated[str | None, WRITTEN] = Field(default=None, json_schema_extra=ASIDE)
    """Where what they keep on this machine goes; null = the run folder."""
    alerts: AlertsConfig | None = Field(default=AlertsConfig(), json_schema_extra=ASIDE)
    """Bands of numbers to be told of leaving; null = none."""

    @field_validator("to", mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, list | tuple | None):
            raise ConfigError(f"tracking.to must be a list, as [tensorboard], got {given!r}")
        for name in given or ():
            one_of("tracking.to", name, TRACKERS)
        return given
