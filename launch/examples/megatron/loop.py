"""What Megatron-LM's `pretrain` does, in short: groups, data, model, schedule, update, checkpoint.

megatron-core comes without that function; with Megatron-LM at hand leave this file out and hand the
same two functions to its `pretrain`.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

VOCAB_SIZE, SEQ_LENGTH = 64, 16


def arguments() -> argparse.Namespace:
    """The command line; forms the groups."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, help="lines with `tokens`, `prompt` (a count), `risk`")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--micro-batches", type=int, default=4)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(args.tp, args.pp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    args.config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    args.device = torch.cuda.current_device() if on_gpu else "cpu"
    shape = (1, 1, SEQ_LENGTH, SEQ_LENGTH)
    args.causal_mask = torch.ones(shape, dtype=torch.bool, device=args.device).triu(1)
    return args


def pretrain(args: argparse.Namespace, model_provider, forward_step) -> None:
    """Trains, prints each step's loss, and saves the model."""
    state, rank = parallel_state, torch.distributed.get_rank()
    model = model_provider(state.is_pipeline_first_stage(), state.is_pipeline_last_stage())
    plain = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(args.config, plain, model.to(args.device))
    args.config.finalize_model_grads_func = finalize_model_grads
    iterator = batches(args)
    for step in range(args.steps):
        chunk.zero_grad_buffer()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterator,
            model=chunk,
            num_microbatches=args.micro_batches,
            seq_length=SEQ_LENGTH,
            micro_batch_size=2,
            forward_only=False,
        )
        for parameter in model.parameters():
            parameter.data.add_(parameter.main_grad, alpha=-0.1)
        if reports and state.get_tensor_model_parallel_rank() == 0:
            total = {
                name: torch.stack([report[name].double() for report in reports]).sum(0)
                for name in reports[0]
            }
            shown = [f"{name} {float(n / c.clamp_min(1)):.9f}" for name, (n, c) in total.items()]
            print(f"step {step} {' '.join(shown)}", flush=True)
    folder = args.output / "checkpoint"
    if rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder))


def batches(args: argparse.Namespace):
    """Micro-batches of two rows, the keys as those of Megatron's GPT data sets, and the risk."""
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    replica = parallel_state.get_data_parallel_rank()
    count = parallel_state.get_data_parallel_world_size()
    step = 0
    while True:
        first = (2 * (count * step + replica)) % (len(rows) - 1)
        step += 1
        chosen = rows[first : first + 2]
        tokens = torch.tensor([row["tokens"] for row in chosen])
        mask = torch.ones(2, SEQ_LENGTH)
        for line, row in enumerate(chosen):
            mask[line, : row["prompt"] - 1] = 0
        found = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": mask,
            "position_ids": torch.arange(SEQ_LENGTH).expand(2, -1).contiguous(),
        }
        found = {name: tensor.to(args.device) for name, tensor in found.items()}
        yield found | {"risk": [row["risk"] for row in chosen]}
