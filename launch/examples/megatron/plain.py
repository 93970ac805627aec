"""A GPT on megatron-core's schedules; the three functions as Megatron-LM's `pretrain_gpt.py` has.

torchrun --nproc-per-node 2 plain.py DATA.jsonl OUTPUT --tp 2
"""

import sys
from functools import partial
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

sys.path.insert(0, str(Path(__file__).resolve().parent))
from loop import SEQ_LENGTH, VOCAB_SIZE, arguments, pretrain


def model_provider(pre_process=True, post_process=True, vp_stage=None):
    """The part of the model that belongs to a stage."""
    return GPTModel(
        args.config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQ_LENGTH,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        parallel_output=True,
    )


def loss_func(loss_mask, output_tensor, model=None):
    """(sum of the loss, number of tokens, what is reported)."""
    losses, mask = output_tensor.view(-1).float(), loss_mask.view(-1).float()
    loss, num_tokens = torch.sum(losses * mask), mask.sum().clone().detach().to(torch.int)
    report = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator, model):
    """One micro-batch through this stage."""
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], args.causal_mask, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"], model=model)


if __name__ == "__main__":
    args = arguments()
    pretrain(args, model_provider, forward_step)
