"""The predicted cost of a run in a Megatron layout: tensor, pipeline, context and data parallel."""
