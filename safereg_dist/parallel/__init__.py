"""Ranks, their few collectives, and the engines that shard and step a model."""
