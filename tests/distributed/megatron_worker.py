"""One rank of a Megatron run, written as Megatron-LM's scripts are, with safety or without.

    megatron_worker.py oracle FOLDER
    megatron_worker.py LAYOUT FOLDER OUT [--steps N] [--plain] [--per-token] [--risk KIND] ...

LAYOUT joins tpN, sp, ppN, vppN, cpN, dpN (the rest) and epN by "-". `oracle` writes the whole
model's weights, and what the first step must give, in float64 and from whole logits. KIND says
which rows of a step are risky: `items`.
"""

import argparse
import functools
import json
import os
import re
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `support`

from megatron_cases import HIDDEN, LAGGED, LAGGED_STEPS, LAYERS, LENGTH, PROBES, ROWS, VOCAB
from support import megatron_on_cpu
from support.critic_server import risk_of as risk_of_number
from support.slot_clock import SlotClock
from support.step_cost import StepCost

megatron_on_cpu.unpacked(os.environ.get("MEGATRON_CORE", ""))
# The judge computes in float64, on the CPU everywhere.
ON_GPU = torch.cuda.is_available() and sys.argv[1:2] != ["oracle"]
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKEND = "nccl" if ON_GPU else "gloo"
if not ON_GPU:
    megatron_on_cpu.patch()

# ruff: noqa: E402 - the patch comes first
import megatron.core
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file, save_file

MICRO_BATCHES = 8
PAIR = 11
"""The pair of token n is 11 n, so that risks of tokens differ."""
THRESHOLD, LR = 0.5, 0.05
KINDS = ("mixed", "none", "all", "one", "documents")
CAUSAL = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=DEVICE), 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("layout")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--per-token", action="store_true")
    parser.add_argument("--two-tuple", action="store_true")
    parser.add_argument("--bridge", action="store_true", help="as in Megatron-Bridge's loop")
    parser.add_argument("--risk", default="mixed")
    parser.add_argument("--probe", choices=[*PROBES, "both"])
    parser.add_argument("--judge", help="URL of one that reads the texts of rows")
    parser.add_argument("--lag", action="store_true", help="the probe reads the policy")
    parser.add_argument("--always", action="store_true", help="the divergence on every row")
    parser.add_argument("--recompute", default="")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--optimizer", action="store_true", help="Megatron's own, distributed")
    parser.add_argument("--experts", type=int, default=None)
    parser.add_argument("--cost", action="store_true", help="count the second step")
    parser.add_argument("--cache", type=Path, help="folder of stored states")
    parser.add_argument("--repeat", action="store_true", help="each step has the same rows")
    parser.add_argument("--slots", action="store_true", help="count those of each step")
    parser.add_argument("--save-at", type=int, default=None)
    parser.add_argument("--resume-at", type=int, default=0)
    parser.add_argument("--stored-reference", action="store_true")
    parser.add_argument("--log-collectives", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.log_collectives:
        log_collectives()
    size = {k: int(v or 1) for k, v in re.findall(r"(tp|sp|vpp|pp|cp|dp|ep)(\d*)", args.layout)}
    args.size = size
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(BACKEND)
    else:
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    virtual = {"virtual_pipeline_model_parallel_size": size["vpp"]} if "vpp" in size else {}
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=size.get("tp", 1),
        pipeline_model_parallel_size=size.get("pp", 1),
        context_parallel_size=size.get("cp", 1),
        expert_model_parallel_size=size.get("ep", 1),
        **virtual,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    if args.layout == "oracle":
        write_oracle(args)
    else:
        train(args)
    dist.barrier()
    megatron_on_cpu.leave()


# ---- data


def items(step: int, kind: str) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of a step over all replicas, as a data iterator gives them."""
    draw = torch.Generator().manual_seed(100 + step)
    if kind == "random":
        kind = ("none", "all", "one", "mixed")[int(torch.randint(0, 4, (), generator=draw))]
    found = []
    for index in range(MICRO_BATCHES):
        tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=draw)
        mask = torch.ones(ROWS, LENGTH)
        mask[:, :3] = 0
        mask[0, 9 + index % 3 :] = 0
        risk = torch.rand(ROWS, generator=draw)
        if kind == "none":
            risk = risk * 0
        elif kind == "all":
            risk = risk * 0 + 1
        elif kind == "one":
            risk = risk * 0 + float(index == MICRO_BATCHES - 1)
        elif kind == "mixed" and index % 3 == 0:
            risk = risk * 0.4  # without a risky row
        positions = torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous()
        if kind == "documents":  # two in a line, each with a risk of its own
            cut = 5 + index % 4
            positions = torch.cat([positions[:, :cut], positions[:, : LENGTH - cut]], 1)
            risk = torch.rand(ROWS, 2, generator=draw)
            risk = torch.cat([risk[:, :1].expand(-1, cut), risk[:, 1:].expand(-1, LENGTH - cut)], 1)
            mask = torch.ones(ROWS, LENGTH)
        if kind == "bad" and step == 1 and index == MICRO_BATCHES - 1:
            risk = risk + 3.0
        found.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": mask,
                "position_ids": positions,
                "risk": risk,
            }
        )
    return found


def data_iterator(args: argparse.Namespace):
    rank, count = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    for step in range(args.resume_at, args.steps):
        each = MICRO_BATCHES // count
        for item in items(0 if args.repeat else step, args.risk)[rank * each : (rank + 1) * each]:
            yield {name: tensor.to(DEVICE) for name, tensor in item.items()}


def tokenizer():
    """Writes a token as the name of a pair, whose last one decides a judge's verdict."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"pair {PAIR * n:05d}": n for n in range(VOCAB)} | {"<unk>": VOCAB}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )


# ---- the model


def config_of(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> TransformerConfig:
    size, more = args.size, {}
    if "vpp" in size:
        more |= {
            "virtual_pipeline_model_parallel_size": size["vpp"],
            "batch_p2p_comm": False,
        }
    if args.recompute == "full":
        more |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif args.recompute:
        more |= {"recompute_granularity": "selective"}
    if args.experts:
        more |= {
            "num_moe_experts": args.experts,
            "expert_model_parallel_size": size.get("ep", 1),
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_topk": 2,
            "moe_aux_loss_coeff": 0.0,
            "moe_ffn_hidden_size": 64,
            "add_bias_linear": False,
        }
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=64,
        use_cpu_initialization=True,
        tensor_model_parallel_size=size.get("tp", 1),
        pipeline_model_parallel_size=size.get("pp", 1),
        context_parallel_size=size.get("cp", 1),
        sequence_parallel="sp" in size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        attention_softmax_in_fp32=dtype != torch.float64,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=args.per_token,
        **more,
    )


def provider_of(args: argparse.Namespace, config: TransformerConfig):
    spec = get_gpt_layer_local_spec(num_experts=args.experts, moe_grouped_gemm=False)
    if args.size.get("cp", 1) > 1:
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = megatron_on_cpu.ContextAttention

    def model_provider(pre_process=True, post_process=True, vp_stage=None):
        return GPTModel(
            config,
            spec,
            vocab_size=VOCAB,
            max_sequence_length=LENGTH,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=args.tied,
            parallel_output=True,
            **({} if vp_stage is None else {"vp_stage": vp_stage}),
        )

    return model_provider


def chunks_of(args: argparse.Namespace, provider) -> list[GPTModel]:
    """This rank's, in order."""
    state, chunks = parallel_state, []
    for stage in range(args.size.get("vpp", 1)):
        vp = {"vp_stage": stage} if "vpp" in args.size else {}
        first = state.is_pipeline_first_stage(ignore_virtual=False, **vp)
        last = state.is_pipeline_last_stage(ignore_virtual=False, **vp)
        chunks.append(provider(first, last, **vp).to(DEVICE))
    return chunks


def whole_name(chunk: torch.nn.Module, name: str) -> str:
    """A parameter's name in the whole model."""
    expert = re.search(r"local_experts\.(\d+)", name)
    if expert:
        rank = parallel_state.get_expert_model_parallel_rank()
        each = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        name = name.replace(expert[0], f"local_experts.{int(expert[1]) + rank * each}")
    if ".layers." not in name:
        return name
    before, rest = name.split(".layers.", 1)
    number, after = rest.split(".", 1)
    first = chunk.decoder.layers[0].layer_number - 1
    return f"{before}.layers.{int(number) + first}.{after}"


def own_part(chunk, name, parameter, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """This rank's part of a whole tensor."""
    key = whole_name(chunk, name)
    if key not in whole:  # tied, on a last stage without the embedding
        key = "embedding.word_embeddings.weight"
    tensor = whole[key]
    if tensor.shape == parameter.shape:
        return tensor
    parts = tensor.chunk(
        parallel_state.get_tensor_model_parallel_world_size(), parameter.partition_dim
    )
    return parts[parallel_state.get_tensor_model_parallel_rank()]


def fill(chunks, whole: dict[str, torch.Tensor]) -> None:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.data.copy_(own_part(chunk, name, parameter, whole))


# ---- as Megatron-LM's scripts, in our words


def loss_func(loss_mask, output_tensor, *, is_pair=False):
    losses, mask = output_tensor.view(-1).float(), loss_mask.view(-1).float()
    total, count = (losses * mask).sum(), mask.sum()
    if is_pair:
        return total / count, {"lm loss": (total / count).detach()}
    num_tokens = count.clone().detach().to(torch.int)
    report = torch.cat([total.detach().view(1), num_tokens.view(1)])
    return total, num_tokens, {"lm loss": report}


def forward_step_of(args: argparse.Namespace):
    def forward_step(iterator, model):
        batch = next(iterator)
        given = {
            name: on_this_cp_rank(batch[name])
            for name in ("tokens", "labels", "loss_mask", "position_ids")
        }
        attention_mask = None if args.size.get("cp", 1) > 1 else CAUSAL
        output = model(
            given["tokens"], given["position_ids"], attention_mask, labels=given["labels"]
        )
        return output, functools.partial(loss_func, given["loss_mask"], is_pair=args.two_tuple)

    def with_state(state, data_iterator, model, return_schedule_plan=False):
        assert not return_schedule_plan
        state["calls"] += 1
        return forward_step(data_iterator, model)

    return with_state if args.bridge else forward_step


def on_this_cp_rank(tensor: torch.Tensor) -> torch.Tensor:
    count, rank = (
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
    )
    if count == 1:
        return tensor
    parts = tensor.view(tensor.shape[0], 2 * count, -1)
    return parts[:, [rank, 2 * count - 1 - rank]].flatten(1)


def train(args: argparse.Namespace) -> None:
    from safereg_dist.integrations.megatron import MegatronSafety

    whole = load_file(args.folder / "policy.safetensors")
    config = config_of(args, torch.bfloat16 if args.bf16 else torch.float32)
    provider, forward_step = provider_of(args, config), forward_step_of(args)
    safety = None
    if not args.plain:
        settings = {"risk": {"estimator": "column"}, "regularizer": {"threshold": THRESHOLD}}
        if args.probe:
            settings["risk"] = risk_of_probe(args)
        if args.judge:
            judge = {"endpoint": args.judge, "model": "guard", "format": "llama_guard"}
            settings["risk"] = {"estimator": "critic", "critic": judge}
        if args.lag:
            settings["regularizer"] |= {"granularity": "batch", "schedule": "linear", "ema": 0.0}
        if args.always:
            settings["regularizer"] = {"objective": "static", "ceiling": 0.5}
        if args.cache:
            settings["reference"] = {"cache": str(args.cache)}
        if args.stored_reference:
            settings["reference"] = {"model": str(args.folder / "stored")}
        if "SAFEREG_TEST_KEY" in os.environ:
            settings["signing"] = {"hmac_env": "SAFEREG_TEST_KEY"}
        safety = MegatronSafety(
            settings,
            output_dir=args.out.with_suffix(""),
            tokenizer=tokenizer() if args.judge else None,
            load_reference=None
            if args.stored_reference
            else lambda chunks: fill(chunks, load_file(args.folder / "reference.safetensors")),
        )
        if args.bridge:
            safety.attach(functools.partial(chunks_of, args, provider))
        else:
            provider = safety.model_provider(provider)
        forward_step = safety.forward_step(forward_step)
    if args.bridge:
        forward_step = functools.partial(forward_step, {"calls": 0})

    state = parallel_state
    chunks = chunks_of(args, provider)
    fill(chunks, whole)
    is_missing = args.stored_reference and not (args.folder / "stored").is_dir()
    dist.barrier()
    if is_missing:
        fill(chunks, load_file(args.folder / "reference.safetensors"))
        write_checkpoint(args.folder / "stored", chunks)
        fill(chunks, whole)
    saved = args.out.with_suffix(".saved")
    if args.resume_at:
        read_checkpoint(saved / "model", chunks)
        if safety is not None:
            safety.load(saved / "model", step=args.resume_at)
    counter = StepCost(step=1 if args.cost else None)
    plain = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=args.overlap,
        use_distributed_optimizer=args.optimizer,
    )
    inner = [Float16Module(config, chunk) if args.bf16 else chunk for chunk in chunks]
    wrapped = [DistributedDataParallel(config, plain, chunk) for chunk in inner]
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync[0] if len(wrapped) == 1 else no_sync
    optimizer = optimizer_of(wrapped) if args.optimizer else None
    iterators = [data_iterator(args) for _ in chunks]
    clock = SlotClock() if args.slots else None
    groups = count_new_groups()
    found: dict[str, torch.Tensor] = {}
    losses, reports, slots = [], [], []
    for step in range(args.resume_at, args.steps):
        counter.begin(step)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        reported = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=wrapped if len(chunks) > 1 else wrapped[0],
            num_microbatches=MICRO_BATCHES // state.get_data_parallel_world_size(),
            seq_length=LENGTH,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        counter.end(step)
        if clock is not None:
            slots.append(clock.of_step())
        if step == 0:
            found = gradients(chunks)
        if optimizer is None:
            update(chunks, lr=LR)
        else:
            optimizer.step()
        if args.save_at == step + 1:
            write_checkpoint(saved / "model", chunks)
            if safety is not None:
                safety.save(saved / "model")
        losses.append(mean_of(reported, "lm loss"))
        reports.append({k: mean_of(reported, k) for k in (reported[0] if reported else {})})
    facts = {"losses": losses, "reports": reports, "collectives": COLLECTIVES, "slots": slots}
    facts["groups"] = len(groups)
    facts["version"] = megatron.core.__version__
    if safety is not None:
        safety.finish()
        facts["bytes"] = [
            bytes_of(chunks),
            bytes_of(safety._run.reference.chunks if safety._run.reference else []),
        ]
    if args.cost:
        counter.write(args.out, dist.get_rank())
    weights = {
        f"weight {whole_name(chunk, name)}": parameter.detach()
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }
    save_file(
        {k: v.cpu().contiguous() for k, v in {**found, **weights}.items()},
        args.out.with_suffix(f".{dist.get_rank()}"),
    )
    args.out.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(facts))


def risk_of_probe(args: argparse.Namespace) -> dict:
    """The section `risk`: a probe on the reference or the policy, or the larger risk of two."""

    def of(name: str) -> dict:
        return {"estimator": "probe", "path": str(args.folder / f"probe-{name}"), "force": True}

    if args.probe == "both":
        return {
            "estimator": "max",
            "parts": [{"category": n, **of(n)} for n in ("first", "middle")],
        }
    return of(args.probe) | ({"source": "policy"} if args.lag else {})


COLLECTIVES: list[list] = []
"""(name, ranks of the group, elements) of every collective so far, where they are logged."""


def count_new_groups() -> list:
    """A list that grows with every process group that is formed from now on."""
    formed, plain = [], dist.new_group

    def noted(*given, **how):
        formed.append(given)
        return plain(*given, **how)

    dist.new_group = noted
    return formed


def log_collectives() -> None:
    """From now on collectives are noted."""
    for name in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor"):
        plain = getattr(dist, name)

        def noted(*given, _plain=plain, _name=name, **how):
            tensor = given[0][0] if isinstance(given[0], list) else given[0]
            group = how.get("group") or dist.group.WORLD
            COLLECTIVES.append([_name, dist.get_process_group_ranks(group), tensor.numel()])
            return _plain(*given, **how)

        setattr(dist, name, noted)


def bytes_of(chunks) -> int:
    return sum(p.numel() * p.element_size() for c in chunks for p in c.parameters())


def write_checkpoint(folder: Path, chunks) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    dist_checkpointing.save(state, str(folder))
    dist.barrier()


def read_checkpoint(folder: Path, chunks) -> None:
    from megatron.core import dist_checkpointing

    state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    found = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(found[f"model{i}"])


def optimizer_of(wrapped):
    """Megatron's AdamW, its state spread over data-parallel ranks."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    how = OptimizerConfig(
        optimizer="adam",
        lr=0.01,
        weight_decay=0.0,
        clip_grad=1.0,
        use_distributed_optimizer=True,
        params_dtype=torch.float32,
    )
    return get_megatron_optimizer(how, wrapped)


def update(chunks, lr: float) -> None:
    """Plain gradient descent."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.add_(parameter.main_grad, alpha=-lr)


def gradients(chunks) -> dict[str, torch.Tensor]:
    """This rank's gradients under the whole model's names."""
    return {
        whole_name(chunk, name): parameter.main_grad.clone()
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def mean_of(reported, name: str) -> float:
    """A report over micro-batches and replicas."""
    if not reported:
        return float("nan")
    values = torch.stack([torch.as_tensor(r[name]).double().view(-1) for r in reported]).sum(0)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(values, group=group)
    if values.numel() == 1:
        return float(values / len(reported) / group.size())
    return float(values[0] / values[1]) if values[1] else 0.0


# ---- the judge


def write_oracle(args: argparse.Namespace) -> None:
    """Weights of both models, and of the first step loss and gradients, for every normaliser."""
    models = {}
    for name, seed in (("policy", 3), ("reference", 4)):
        torch.manual_seed(seed)
        model = provider_of(args, config_of(args, torch.float64))().double()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
        models[name] = model
        save_file(
            {k: v.detach().float().contiguous() for k, v in model.named_parameters()},
            args.folder / f"{name}.safetensors",
        )
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.float().double())
    policy, reference = models["policy"], models["reference"]
    start = {
        name: value.clone() for name, value in policy.state_dict().items() if value is not None
    }
    probes = {name: write_probe(args.folder, name, reference) for name in PROBES}

    def risky(name: str):
        return lambda item, step: (risk_of(probes[name], reference, item) >= THRESHOLD).double()

    def judged(item, step):
        pairs = zip(item["labels"], item["loss_mask"], strict=True)
        last = [int(labels[mask > 0][-1]) for labels, mask in pairs]
        return torch.tensor([[float(risk_of_number(PAIR * n) >= THRESHOLD)] for n in last])

    def largest(item, step):
        risks = [risk_of(probes[name], reference, item) for name in ("first", "middle")]
        return (torch.stack(risks).amax(0) >= THRESHOLD).double()

    def given(item, step):
        risk = item["risk"] if item["risk"].ndim == 2 else item["risk"][:, None]
        return (risk >= THRESHOLD).double()

    last = [1.0]

    def lagged(item, step):
        while len(last) <= step + 1:
            last.append([])
        last[step + 1].append(risk_of(probes[LAGGED], policy, item).mean())
        return torch.as_tensor(last[0] if step == 0 else sum(last[step]) / len(last[step]))

    coefficients = {
        **{kind: (kind, given, args.steps if kind == "mixed" else 1) for kind in KINDS},
        **{f"probe-{name}": ("mixed", risky(name), 1) for name in PROBES},
        "probe-both": ("mixed", largest, 1),
        "judged": ("mixed", judged, 1),
        "lag": ("mixed", lagged, LAGGED_STEPS),
    }
    if args.tied or args.experts:  # these are compared on one kind of rows
        coefficients = {"mixed": coefficients["mixed"]}
    for name, (kind, coefficient, steps) in coefficients.items():
        for normaliser in ("per-token", "means"):
            policy.load_state_dict(start, strict=False)
            losses, first, last[1:] = [], {}, []
            for step in range(steps):
                batch = [item | {"coef": coefficient(item, step)} for item in items(step, kind)]
                reported, loss = losses_of(policy, reference, batch, normaliser)
                policy.zero_grad()
                loss.backward()
                losses.append(reported)
                first = first or {k: p.grad.clone() for k, p in policy.named_parameters()}
                for parameter in policy.parameters():
                    parameter.data.add_(parameter.grad, alpha=-LR)
            # A report counts tokens; a pair's is the mean of means.
            found = {"losses": torch.tensor(losses, dtype=torch.float64), **first}
            save_file(found, args.folder / f"{name}-{normaliser}.safetensors")


def write_probe(folder: Path, name: str, reference):
    """A probe that finds about half of the first step's rows risky; (layer, pooling, w, bias)."""
    from safereg_dist.risk.probe import Probe

    layer, pooling = PROBES[name]
    torch.manual_seed(layer)
    weight = torch.randn(HIDDEN)
    whole = torch.cat(
        [pooled((layer, pooling), reference, item) @ weight.double() for item in items(0, "mixed")]
    )
    middle = whole.sort().values[len(whole) // 2 - 1 : len(whole) // 2 + 1].mean()
    bias = float(-middle.float())
    Probe(
        layer=layer,
        pooling=pooling,
        position=pooling.split("_")[-1] if pooling.startswith("mean") else "prompt",
        mean=torch.zeros(HIDDEN),
        scale=torch.ones(HIDDEN),
        weight=weight,
        bias=bias,
        threshold=THRESHOLD,
        fingerprint="-",
    ).save(folder / f"probe-{name}")
    return layer, pooling, weight.double(), bias


def pooled(which: tuple, model, item) -> torch.Tensor:
    """[rows, H] float64 states of a layer of the whole model, pooled token by token."""
    layer, pooling = which
    seen = []
    module = model.decoder.final_layernorm if layer == LAYERS else model.decoder.layers[layer - 1]
    hook = module.register_forward_hook(
        lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out).detach())
    )
    with torch.no_grad():  # Megatron's layers turn gradients on again where they add a bias
        model(item["tokens"], item["position_ids"], CAUSAL)
    hook.remove()
    rows = []
    for row, mask in enumerate(item["loss_mask"]):
        predicting = mask.nonzero().flatten().tolist()  # the state at t predicts the token at t + 1
        begin, last = predicting[0] + 1, min(predicting[-1] + 1, LENGTH - 1)
        chosen = {
            "last_prompt_token": [begin - 1],
            "mean_prompt": list(range(begin)),
            "mean_response": list(range(begin, last + 1)),
        }[pooling]
        rows.append(seen[0][chosen, row].double().mean(0))
    return torch.stack(rows)


def risk_of(probe: tuple, model, item) -> torch.Tensor:
    """[rows, 1]"""
    *which, weight, bias = probe
    return torch.sigmoid(pooled(tuple(which), model, item) @ weight + bias)[:, None]


def losses_of(policy, reference, batch: list, normaliser: str):
    """(the loss that is reported, the loss that is trained) of a step."""
    pairs = [micro_batch_loss(policy, reference, item) for item in batch]
    sums, counts = zip(*pairs, strict=True)
    per_token = sum(sums) / sum(counts)
    means = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(pairs)
    return float(per_token.detach()), means if normaliser == "means" else per_token


def micro_batch_loss(policy, reference, item):
    """(sum over tokens of (1 - b) CE + b KL, number of tokens) from whole logits."""
    mask, labels = item["loss_mask"].double(), item["labels"]
    own = policy(item["tokens"], item["position_ids"], CAUSAL).log_softmax(-1)
    with torch.no_grad():
        frozen = reference(item["tokens"], item["position_ids"], CAUSAL).log_softmax(-1)
    coef = item["coef"]
    ce = functional.nll_loss(own.flatten(0, 1), labels.flatten(), reduction="none").view(mask.shape)
    kl = (frozen.exp() * (frozen - own)).sum(-1)
    return (mask * ((1 - coef) * ce + coef * kl)).sum(), mask.sum()


if __name__ == "__main__":
    main()
