"""Claimed: what a Trainer and the step cannot do together is one clear line at the start.

Each case names the key or the argument that is to change; nothing trains first. A missing risk is
found with the first window, since data sets may be streams.
"""

from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from support.builders import VOCAB, tiny_model, word_tokenizer
from support.trainer_runs import (
    SMALL,
    arguments,
    dataset,
    features,
    settings,
    trainer,
    write_reference,
)
from trl import SFTConfig

from safereg_dist.errors import CheckpointError, ConfigError, DataError, GroupError
from safereg_dist.integrations.checks import check_trainer
from safereg_dist.integrations.trl import SafeRegSFTTrainer


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_reference(tmp_path_factory.mktemp("reference"))


def make(tmp_path, reference, **how):
    return trainer(tmp_path, **{"safereg": settings(reference), **how})


def sft(tmp_path, reference, **changes):
    args = arguments(tmp_path, SFTConfig, max_length=32, **changes)
    return SafeRegSFTTrainer(
        model=tiny_model(**SMALL),
        args=args,
        train_dataset=dataset(8),
        processing_class=word_tokenizer(),
        safereg=settings(reference),
    )


# ---- the loss


def test_a_loss_of_ones_own(tmp_path, reference):
    with pytest.raises(ConfigError, match="compute_loss_func"):
        make(tmp_path, reference, compute_loss_func=lambda outputs, labels, **_: outputs.loss)


def test_label_smoothing(tmp_path, reference):
    with pytest.raises(ConfigError, match=r"label_smoothing_factor=0\.1"):
        make(tmp_path, reference, args={"label_smoothing_factor": 0.1})


def test_another_loss_of_trl(tmp_path, reference):
    with pytest.raises(ConfigError, match="loss_type=dft"):
        sft(tmp_path, reference, loss_type="dft")


def test_wrapped_packing(tmp_path, reference):
    with pytest.raises(ConfigError, match="packing_strategy=wrapped"):
        sft(tmp_path, reference, packing=True, packing_strategy="wrapped")


def test_adapters_on_the_head(tmp_path, reference):
    how = LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="LoRA's target_modules"):
        make(tmp_path, reference, model=get_peft_model(tiny_model(**SMALL), how))


# ---- the reference


def test_a_reference_with_another_vocabulary(tmp_path, reference):
    with pytest.raises(ConfigError, match=f"vocabulary {VOCAB}, the policy .* {VOCAB + 8}:"):
        make(tmp_path, reference, model=tiny_model(vocab=VOCAB + 8, **SMALL))


def test_a_reference_with_another_tokenizer(tmp_path, reference):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["new"])
    with pytest.raises(ConfigError, match="tokenizers of the reference"):
        make(tmp_path, reference, processing_class=tokenizer)


# ---- ranks and parallelism


def test_one_rank_where_two_were_launched(tmp_path, reference, monkeypatch):
    made = make(tmp_path, reference)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GroupError, match="accelerate trains with 1"):
        check_trainer(made)


def test_data_parallel(tmp_path, reference):
    made = make(tmp_path, reference)
    made.args._n_gpu = 2
    with pytest.raises(ConfigError, match="one process drives 2 GPUs"):
        check_trainer(made)


@pytest.mark.parametrize("name", ["tp", "cp", "sp"])
def test_axes_that_split_rows_or_the_head(tmp_path, reference, name):
    made = make(tmp_path, reference)
    setattr(made, f"get_{name}_size", lambda: 2)
    with pytest.raises(ConfigError, match="parallelism of size 2"):
        check_trainer(made)


def test_the_first_version_of_fsdp(tmp_path, reference, monkeypatch):
    made = make(tmp_path, reference)
    plugin = SimpleNamespace(fsdp_version=1)
    monkeypatch.setattr(made.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ConfigError, match="set fsdp_version=2"):
        check_trainer(made)


# ---- settings and data


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": {"name": "fsdp2"}}, r"settings hold 'engine', .* leave it out \(read here:"),
        ({"regulariser": {}}, r"unknown key 'regulariser': did you mean 'regularizer'\? \(valid"),
        ({"risk": {"estimator": "guess"}}, r"risk\.estimator"),
        ({"reference": {"cache": "states"}}, r"reference\.cache"),
        ({"data": {"anchor": "rows.jsonl"}}, "processing_class"),
        ("missing.yaml", r"missing\.yaml"),
    ],
)
def test_settings(tmp_path, reference, given, message):
    whole = settings(reference) | given if isinstance(given, dict) else given
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, reference, safereg=whole)


def test_a_typo_is_said_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match=r"'risk\.estimatr': did you mean 'estimator'"):
        SafeRegSFTTrainer(model="no/such/model", safereg={"risk": {"estimatr": "column"}})


def test_a_data_set_without_a_risk_column(tmp_path, reference):
    with pytest.raises(DataError, match=r"needs a column `risk` in train_dataset, which has input"):
        make(tmp_path, reference, train_dataset=dataset(8, risk=False))


def test_settings_that_lie_flat(tmp_path, reference):
    with pytest.raises(
        ConfigError, match=r"unknown key 'estimator': did you mean 'risk.estimator'"
    ):
        make(tmp_path, reference, safereg={"estimator": "column"})


def test_a_row_without_risk(tmp_path, reference):
    rows = features(16)
    rows[5]["risk"] = float("nan")
    args = {"train_sampling_strategy": "sequential"}
    with pytest.raises(DataError, match="'row-5' has no risk"):
        make(tmp_path, reference, train_dataset=rows, args=args).train()


def test_a_checkpoint_that_is_not_there(tmp_path, reference):
    with pytest.raises((CheckpointError, ValueError), match="checkpoint"):
        make(tmp_path, reference).train(resume_from_checkpoint=True)
