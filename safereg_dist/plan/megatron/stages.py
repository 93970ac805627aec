"""What each rank of a Megatron layout holds: layers of its stage, and its part of their parameters.

Tensor parallelism divides matrices, biases before a sum and the vocabulary, padded; norms are whole
on each rank. The first stage has the embedding, the last the final norm and the head; of a model
that ties them, over several stages, the last has a copy.
"""

from safereg_dist.errors import ConfigError
from safereg_dist.plan.pipeline import Pipeline
from safereg_dist.plan.settings import Settings, divisors, near
from safereg_dist.plan.shape import ModelShape

PARTS = ("embedding", "layers", "final norm", "head")


def check_layout(shape: ModelShape, settings: Settings) -> None:
    """Raises ConfigError for a model or a batch that the layout does not divide."""
    if shape.active_parameters != shape.parameters:
        raise ConfigError(
            f"--engine megatron plans dense models, got a {shape.model_type} with experts: how "
            "expert parallelism spreads them is not planned; use --engine deepspeed"
        )
    key_heads = shape.key_value_width * shape.num_heads // shape.attention_width
    _divides("--tensor-parallel", settings.tensor_parallel, shape.num_heads, "attention heads")
    _divides("--tensor-parallel", settings.tensor_parallel, key_heads, "key heads")
    _check_layers(shape, settings)
    context = 2 * settings.context_parallel if settings.context_parallel > 1 else 1
    _multiple("--seq-length", settings.seq_length, context, "2 x --context-parallel (zigzag)")
    spread = settings.context_parallel * sequence_ranks(settings)
    _multiple("--seq-length", settings.seq_length, spread, "the ranks that share a row")
    if settings.virtual_pipeline > 1:
        stages = settings.pipeline_parallel
        _multiple("--grad-accum", settings.grad_accum, stages, "--pipeline-parallel (interleaved)")


def sequence_ranks(settings: Settings) -> int:
    """Tensor-parallel ranks over which states between products are spread."""
    return settings.tensor_parallel if settings.sequence_parallel else 1


def pipeline_of(settings: Settings) -> Pipeline:
    """The schedule of a step; a backward that recomputes takes a slot more."""
    return Pipeline(
        stages=settings.pipeline_parallel,
        chunks=settings.virtual_pipeline,
        micro_batches=settings.grad_accum,
        backward=3 if settings.activation_checkpointing else 2,
    )


def padded_vocab(shape: ModelShape, settings: Settings) -> int:
    """Rows of the embedding over all tensor-parallel ranks."""
    step = settings.vocab_multiple * settings.tensor_parallel
    return -(-shape.vocab_size // step) * step


def layers_at(shape: ModelShape, settings: Settings, place: int) -> int:
    """Layers of a chunk; `place` counts chunks in the order of the model."""
    places = settings.pipeline_parallel * settings.virtual_pipeline
    if not settings.ends_as_layers:
        return shape.num_layers // places
    return (shape.num_layers + 2) // places - (place == 0) - (place == places - 1)


def places_of(settings: Settings, stage: int) -> range:
    """The places of a stage's chunks."""
    stages = settings.pipeline_parallel
    return range(stage, stages * settings.virtual_pipeline, stages)


def layers_of(shape: ModelShape, settings: Settings, stage: int) -> int:
    """Layers of a stage."""
    return sum(layers_at(shape, settings, place) for place in places_of(settings, stage))


def parameters(shape: ModelShape, settings: Settings, stage: int) -> dict[str, int]:
    """Elements on each rank of a stage, by `PARTS`."""
    tensor, last = settings.tensor_parallel, settings.pipeline_parallel - 1
    layer = [module for module in shape.modules if module.layer == 0]
    split = sum(module.split for module in layer)
    each = split // tensor + sum(module.numel for module in layer) - split
    table = padded_vocab(shape, settings) // tensor * shape.hidden_size
    has_head = stage == last and not (shape.is_tied and last == 0)
    found = (
        table if stage == 0 else 0,
        each * layers_of(shape, settings, stage),
        shape.part("final") if stage == last else 0,
        table if has_head else 0,
    )
    return dict(zip(PARTS, found, strict=True))


def whole_elements(shape: ModelShape, settings: Settings, stage: int) -> int:
    """Elements of a stage that each of its tensor-parallel ranks has: those of norms."""
    layer = sum(module.numel - module.split for module in shape.modules if module.layer == 0)
    final = shape.part("final") if stage == settings.pipeline_parallel - 1 else 0
    return layer * layers_of(shape, settings, stage) + final


def _check_layers(shape: ModelShape, settings: Settings) -> None:
    places = settings.pipeline_parallel * settings.virtual_pipeline
    counted = shape.num_layers + (2 if settings.ends_as_layers else 0)
    if counted % places:
        hint = "add --ends-as-layers, or " if (shape.num_layers + 2) % places == 0 else ""
        raise ConfigError(
            f"--pipeline-parallel {settings.pipeline_parallel} x --virtual-pipeline "
            f"{settings.virtual_pipeline} does not divide {counted} layers: {hint}choose chunks "
            f"among {divisors(counted)}"
        )
    if settings.ends_as_layers and (places == 1 or counted // places < 2):
        raise ConfigError(
            f"--ends-as-layers leaves a stage without layers: expected 2 to {counted // 2} "
            f"chunks, got {places}: leave it out or take fewer"
        )


def _divides(name: str, value: int, total: int, what: str) -> None:
    if total % value:
        raise ConfigError(
            f"{name} {value} does not divide the model's {total} {what}: choose one of "
            f"{divisors(total)}"
        )


def _multiple(name: str, value: int, step: int, what: str) -> None:
    if value % step:
        raise ConfigError(
            f"{name} must be a multiple of {step} = {what}, got {value}: the nearest are "
            f"{near(value, step)}"
        )
