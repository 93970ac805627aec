"""Claimed: `engine.zero_stage` 1 and 2 train, resume and export; the reference is sharded beside a
policy that each rank holds whole; LoRA trains in them. Losses and gradients against float64 are
`test_stacks`'.

Exact: a resumed run gives the same bits; a gradient that is not finite on one rank moves no weight;
all ranks hold the same weights.
"""

import pytest
from support.launching import FINETUNE
from test_fsdp2 import folder, run_worker, train_and_resume  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]


def test_train_resume_and_export(folder, launch):  # noqa: F811
    own = ["engine.name=deepspeed", "engine.zero_stage=2"]
    again = train_and_resume(folder, launch, *own)
    exported = AutoModelForCausalLM.from_pretrained(again / "model")
    assert exported.lm_head.weight is exported.model.embed_tokens.weight

    done = launch(
        FINETUNE, folder / "run.yaml", *own, "engine.zero_stage=1", "lora={rank: 4}",
        "reference.model=null", "optimizer.lr=0.01", f"output_dir={folder / 'lora'}", ranks=2,
    )  # fmt: skip
    assert done.status == 0, done.output[-4000:]
    assert (folder / "lora" / "adapter" / "adapter_model.safetensors").is_file()


def test_skips_by_all_ranks_in_both_stages(folder, launch):  # noqa: F811
    found = run_worker(folder, launch, "stages", ranks=2)
    assert found[0] == found[1]
    for case, facts in found[0].items():
        assert facts["skipped"], case
        assert facts["sharded"] > 0, case
    for precision, rounding in (("fp32", 1e-6), ("bf16", 0.02)):  # sums in another order
        one, two = (found[0][f"{stage} {precision}"]["losses"] for stage in (1, 2))
        assert one == pytest.approx(two, rel=rounding)
