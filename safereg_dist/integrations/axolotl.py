"""axolotl with the step inside: a plugin, in the YAML alone.

    plugins: [safereg_dist.integrations.axolotl.SafeRegPlugin]
    safereg:
      risk: {estimator: lookup, path: scored.jsonl}

axolotl's prompt strategies keep no column but tokens and labels, so a row's risk is looked up by
its texts. Sample packing works where axolotl keeps packed rows apart.
"""

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
from datasets import Dataset, concatenate_datasets
from pydantic import BaseModel
from transformers import Trainer

from safereg_dist.errors import ConfigError
from safereg_dist.integrations.anchors import with_anchors
from safereg_dist.integrations.trainer import SafeRegMixin
from safereg_dist.integrations.yaml_section import read_section


class SafeRegArgs(BaseModel):
    """What the plugin adds to axolotl's YAML."""

    safereg: dict[str, Any] | str | None = None
    """The sections `reference`, `risk`, `regularizer`, `data` and `train`, or a file of them."""


class SafeRegPlugin(BasePlugin):
    """Pulls risky rows toward a frozen reference; see `docs/stacks/axolotl.md`."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Checks the YAML before anything is loaded.

        Raises:
            ConfigError: settings, or a kind of run that cannot work.
        """
        read_section(cfg.get("safereg"), stack="axolotl", model=str(cfg.get("base_model") or "-"))
        for key in ("rl", "reward_model", "process_reward_model", "trainer_cls"):
            if cfg.get(key):
                raise ConfigError(
                    f"{key}={cfg[key]} trains with another loss or trainer than supervised "
                    "fine-tuning: leave it out, or leave out the plugin"
                )

    def get_input_args(self) -> str:
        """Where axolotl finds the keys that the plugin adds."""
        return f"{__name__}.SafeRegArgs"

    def get_trainer_cls(self, cfg: Any) -> type[Trainer]:
        """axolotl's trainer around the step."""
        if cfg.sample_packing and not cfg.attn_decontaminates_packing:
            raise ConfigError(
                f"sample_packing with attn_implementation={cfg.attn_implementation} lets a row see "
                "the rows packed before it, and the reference would not: set attn_implementation "
                "to flash_attention_2, flex_attention or sdpa, or sample_packing to false"
            )
        return _trainer_class(read_section(cfg.safereg, stack="axolotl", model=cfg.base_model))

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Raises ConfigError where another plugin's trainer was taken."""
        if not isinstance(trainer, SafeRegMixin):
            raise ConfigError(
                f"another plugin's trainer ({type(trainer).__name__}) was taken, which does not "
                "regularise: list this plugin first, or leave the other out"
            )


def _trainer_class(settings: dict[str, Any]) -> type[Trainer]:
    from axolotl.core.trainers.base import AxolotlTrainer  # type: ignore[import-not-found]

    # axolotl's trainer comes first: it counts tokens, then asks the next class for the loss.
    class SafeRegAxolotlTrainer(AxolotlTrainer, SafeRegMixin, Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, safereg=settings, **kwargs)
            # axolotl turns it off, and then each loss would be divided by the micro-batches again.
            self.model_accepts_loss_kwargs = True

        def _packs_rows(self) -> bool:
            return bool(self.args.sample_packing)

        def _with_anchors(self, data: Mapping[str, Any], tokenizer: Any) -> Dataset:
            if not isinstance(self.train_dataset, Dataset):
                raise ConfigError(
                    "data.anchor needs a data set with a length under axolotl: set streaming to "
                    "false, or leave data.anchor out"
                )
            data = {"max_length": self.args.max_seq_length, **data}
            return _with_anchor_rows(self.train_dataset, data, tokenizer, seed=self.args.seed)

    return SafeRegAxolotlTrainer


def _with_anchor_rows(own: Dataset, data: dict[str, Any], tokenizer: Any, *, seed: int) -> Dataset:
    """`own` with anchor rows in their places, as one data set with axolotl's columns."""
    places = with_anchors(range(len(own)), data, tokenizer, seed=seed)
    order, anchors = [], []
    for place in range(len(places)):
        found = places[place]
        order.append(found if isinstance(found, int) else len(own) + len(anchors))
        if not isinstance(found, int):
            anchors.append(_anchor(found, own.column_names))
    if not anchors:
        return own
    marked = own.add_column("is_anchor", [False] * len(own))
    extra = Dataset.from_list(anchors, features=marked.features)
    return concatenate_datasets([marked, extra]).select(order)


def _anchor(feature: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """An anchor row with axolotl's columns; those that it does not know are empty."""
    length = len(feature["input_ids"])
    known = {**feature, "position_ids": list(range(length)), "length": length}
    return {"is_anchor": True, **{name: known.get(name) for name in columns}}
