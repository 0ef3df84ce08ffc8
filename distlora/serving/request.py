"""Define the request that the launcher hands to the workers of `distlora serve`. Imports no torch."""

from dataclasses import dataclass

from distlora.config import ModelSpec, ParallelConfig, TrainConfig
from distlora.config.serve import ServeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeRequest:
    """A service on one base, complete: the worker checks nothing again."""

    spec: ModelSpec
    """The base and how it is stored; the adapter's rank and targets are each client's own."""
    train: TrainConfig
    """Settings of the computation: train.dtype, train.checkpointing, train.kernels."""
    parallel: ParallelConfig
    shard_degree: int
    """Ranks that shard one replica of the base."""
    context: int
    """Most tokens of a sequence (data.sequence_length)."""
    serve: ServeConfig
    """With serve.names and serve.tokenizer set, and serve.folder absolute."""
