"""The rows of a run: the section `data` of the configuration."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from safereg_dist.config.messages import first_mistake
from safereg_dist.config.section import ASIDE, NEWER, READ, Section
from safereg_dist.errors import ConfigError


class DataSet(Section):
    """One of several sets of training rows."""

    path: Annotated[str, READ]
    """JSONL, CSV or a Hugging Face dataset id."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the rows drawn, > 0, relative to the other sets' weights; null = no weights."""


class DataConfig(Section):
    """Rows to train on, as JSONL, CSV or a Hugging Face dataset id."""

    train: Annotated[str | tuple[DataSet, ...], READ]
    """Training rows in one of the forms of the README (`messages`, `prompt` and `response`, ...);
    optional `risk` and `id`. Or a list of such, each a path or a `path` and a `weight`. Without
    weights they are one set, and an epoch shows each row once. With weights each gives its share of
    any stretch of rows, a small one being repeated, and an epoch is as many rows as all have."""
    streaming: bool = Field(default=False, json_schema_extra=NEWER)
    """Read and tokenise training rows when they are needed, for sets larger than the disk; the run
    lasts `train.steps`. A row left out as too long leaves its place empty; ids are not compared."""
    shuffle_buffer: int = Field(default=10_000, ge=1, json_schema_extra=NEWER)
    """Rows of a rank among which the next is drawn, >= 1 (1 = in order); only with `streaming`."""
    validation: Annotated[str | None, READ] = None
    """Rows for the validation loss; null = none."""
    anchor: Annotated[str | None, READ] = None
    """Rows written by `safereg anchor build`; they carry only the divergence. null = none."""
    anchor_fraction: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        json_schema_extra={"remedy": "set data.anchor=null to train without anchor rows"},
    )
    """Share of anchor rows among all rows, in (0, 1); read only with `anchor`."""
    max_length: int = Field(default=1024, ge=2)
    """Longest sequence in tokens, >= 2."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """`drop`, `truncate` or `error` for longer sequences; always counted and reported."""
    chat_template: Annotated[str | None, READ] = None
    """File with a Jinja chat template; null = the tokenizer's own."""
    declared_poison: float = Field(default=0.0, ge=0.0, le=1.0, json_schema_extra=ASIDE)
    """Share of risky rows that you train on deliberately, in [0, 1]."""

    @field_validator("train", mode="before", json_schema_input_type=str | list[str | DataSet])
    @classmethod
    def _read_sets(cls, given: Any) -> Any:
        if isinstance(given, list | tuple):
            return tuple(_data_set(each, f"data.train[{i}]") for i, each in enumerate(given))
        if not isinstance(given, str):
            raise ConfigError(
                f"data.train must be a path or a list of paths, or of `path` and `weight`, got "
                f"{'null' if given is None else repr(given)}"
            )
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        weighted = [each.weight is not None for each in self.train_sets]
        if not weighted:
            raise ConfigError("data.train is an empty list: give one path or more")
        paths = [each.path for each in self.train_sets]
        if len(set(paths)) < len(paths):
            raise ConfigError(f"data.train must name each data set once, got {paths}")
        if any(weighted) and not all(weighted):
            raise ConfigError(
                f"data.train has a weight for {sum(weighted)} of {len(weighted)} data sets: give "
                "each one, or none"
            )
        return self

    @property
    def train_sets(self) -> tuple[DataSet, ...]:
        """The sets of training rows; a single path is one of them."""
        return (DataSet(path=self.train),) if isinstance(self.train, str) else self.train

    @property
    def train_names(self) -> str:
        """The paths of the sets of training rows, for messages."""
        return ", ".join(each.path for each in self.train_sets)

    @property
    def train_weights(self) -> list[float] | None:
        """The weight of each set of training rows; None without weights."""
        weights = [each.weight for each in self.train_sets if each.weight is not None]
        return weights or None


def _data_set(given: Any, where: str) -> DataSet:
    raw = {"path": given} if isinstance(given, str) else given
    if not isinstance(raw, dict | DataSet):
        raise ConfigError(f"{where} must be a path or a section of keys, got {given!r}")
    try:
        return DataSet.model_validate(raw)
    except ValidationError as err:
        raise ConfigError(first_mistake(err, DataSet, raw, where)) from err
