"""Claimed: the bytes that `safereg plan --engine megatron` says a rank receives are those of
Megatron's own schedules and of the safety path in them, stage by stage.

The judge counts at torch's collectives, on 2 CPU ranks. Exact but for less than 300 bytes of
numbers that are summed for reports. It sees collectives of one rank, which are added here, and none
inside the fused head's operator, which are taken away.
"""

import json
from pathlib import Path

import pytest
from support.launching import Launcher

from safereg_dist.plan.megatron.stages import parameters
from safereg_dist.plan.megatron.traffic import stage_traffic
from safereg_dist.plan.settings import Settings
from safereg_dist.plan.shape import ModelShape, Module

pytest.importorskip("megatron.core")

WORKER = Path(__file__).with_name("megatron_worker.py")
LAYOUTS = {
    "tp2": {"tensor_parallel": 2, "sequence_parallel": False},
    "tp2-sp": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "pp2-vpp2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
}
HIDDEN, WIDTH, LAYERS, MICRO_BATCHES = 32, 64, 4, 8
TRAINED = 159 / 256
"""Of the worker's tokens: its masks leave 6, 7 or 8 of one row and 13 of the other."""
EXTRA = 300
RECEIVED = {
    "all_reduce": 1.0,
    "all_gather": 0.5,
    "reduce_scatter": 0.5,
    "broadcast": 1.0,
    "recv": 1,
}
"""Of a payload, what one of two ranks receives; of a broadcast, the one that does not send."""


def module(layer: int | None, matrix: int, vector: int, split: int) -> Module:
    numels = tuple(n for n in (matrix, vector) if n)
    part = "final" if layer is None else "layers"
    return Module(
        layer=layer, part=part, numels=numels, used=sum(numels), products=matrix, split=split
    )


def worker_shape() -> ModelShape:
    """The worker's model: layer norms and biases, an MLP without a gate, all heads have keys."""
    h, w = HIDDEN, WIDTH
    modules = []
    for layer in range(LAYERS):
        modules += [
            module(layer, 0, 4 * h, 0),  # two layer norms, weights and biases
            module(layer, 3 * h * h, 3 * h, 3 * h * h + 3 * h),
            module(layer, h * h, h, h * h),
            module(layer, h * w, w, h * w + w),
            module(layer, w * h, h, w * h),
        ]
    return ModelShape(
        model_type="gpt",
        hidden_size=h,
        num_layers=LAYERS,
        vocab_size=64,
        attention_width=h,
        key_value_width=h,
        mlp_width=w,
        num_chosen=1,
        num_heads=4,
        keeps_scores=False,
        is_tied=False,
        modules=(*modules, module(None, 0, 2 * h, 0)),
    )


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    """Bytes that each rank of a run received in its second step."""
    folder = tmp_path_factory.mktemp("measured")
    launch = Launcher(folder)
    assert launch(WORKER, "oracle", folder).status == 0

    def of(layout, *how):
        out = folder / f"{layout}{'-'.join(how)}"
        result = launch(WORKER, layout, folder, out, "--steps", 2, "--cost", *how, ranks=2)
        assert result.status == 0, result.output
        found = [json.loads(out.with_suffix(f".cost-{rank}.json").read_text()) for rank in (0, 1)]
        return [sum(map(received, own["bytes"].values())) for own in found]

    return of


def received(payloads: dict[str, int]) -> float:
    return sum(RECEIVED.get(kind, 0) * size for kind, size in payloads.items())


def planned(layout: str, arm: str, rank: int) -> float:
    """Bytes that a rank receives, as the judge sees them."""
    settings = Settings(
        world_size=2,
        engine="megatron",
        precision="fp32",
        seq_length=16,
        micro_batch=2,
        grad_accum=MICRO_BATCHES,
        response_share=TRAINED,
        risky_fraction=1.0,
        arm=arm,
        distributed_optimizer=False,
        vocab_multiple=32,
        **LAYOUTS[layout],
    )
    stage = rank if layout.startswith("pp") else 0
    shape, batches = worker_shape(), MICRO_BATCHES * (arm == "routed")
    moved = stage_traffic(shape, settings, stage, active=batches, run=batches)
    alone = 4 * sum(parameters(shape, settings, stage).values())  # gradients, of one replica
    tokens = MICRO_BATCHES * 2 * 16
    if layout.startswith("pp") and stage == 1 and arm == "sft":
        alone += 3 * 4 * tokens  # the plain loss's sums over a vocabulary that is whole
    inside = 0.0
    if layout.startswith("tp") and arm == "routed":
        inside = (9 if layout == "tp2-sp" else 9 + HIDDEN) * 4 * TRAINED * tokens
    return sum(part.total for part in moved.values()) + alone - inside


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_a_plain_step(layout, count):
    for rank, found in enumerate(count(layout, "--plain")):
        assert 0 <= found - planned(layout, "sft", rank) < EXTRA


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_a_step_whose_rows_are_all_risky(layout, count):
    for rank, found in enumerate(count(layout, "--risk", "all")):
        if layout.startswith("tp") and rank == 0:
            continue  # it sends the broadcast
        assert 0 <= found - planned(layout, "routed", rank) < EXTRA
