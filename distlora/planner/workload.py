"""The workload of a run: what its steps compute, on which sequences, how it is stored and sharded. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distlora.architecture.shapes import KEEP, ModelShapes
from distlora.architecture.tokens import trained_indices
from distlora.config import AdapterConfig, Config, OptimConfig, ParallelConfig, TrainConfig, UserError
from distlora.rewards.models import classifier_weights, reward_adapter

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of an element, by train.dtype."""


def padded(shape: Sequence[int], ranks: int) -> int:
    """Return the numbers in a tensor whose rows are filled up to a multiple of the ranks."""
    return ranks * -(-shape[0] // ranks) * math.prod(shape[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The planner's input: the steps of one run, or of several trials trained together on one base."""

    adapter: AdapterConfig
    """Settings that all adapters share."""
    adapters: tuple[AdapterConfig, ...]
    """The adapter of each trial; a run alone has one."""
    parallel: ParallelConfig
    gpus_per_node: int
    expert_degree: int
    """Ranks that divide the experts of each layer; 1: every rank gathers all."""
    format: str | None
    """Format of large weights of the decoder layers, unless `ModelShapes.formats` has another; None: all are dense;
    KEEP: as `ModelShapes.kept`."""
    dense_layers: int
    """Number of first decoder layers with a dense copy of them."""
    keeps_shards: bool
    """True if the quantized shards are cached on disk."""
    new_tokens: tuple[str, ...]
    sequence_length: int
    """Tokens per packed sequence."""
    image_max_pixels: int
    """data.image_max_pixels; 0: no bound but the processor's."""
    train: TrainConfig
    """Settings of a step; of trials trained together, `micro_batch` and `global_batch` are those of all."""
    optim: OptimConfig
    reward_adapters: int
    """Reward models on the run's base."""
    reward_weights: int
    """Weights of reward models with a base of their own, which each rank holds whole."""
    steps: int | None
    """Steps of the whole run; None if unknown."""
    checkpoints_kept: int
    """Most checkpoints on disk at once: the newest, the best, and the one being written."""
    results_kept: int
    """2 if RUN/best is kept beside the result."""

    @classmethod
    def of(cls, config: Config, ranks: int | None = None) -> Workload:
        """Return the workload of a run on so many ranks (None: the config's)."""
        train, data = config.train, config.data
        steps = train.max_steps
        if steps is None and config.plan.tokens is not None:
            steps = math.ceil(config.plan.tokens / (train.global_batch * data.sequence_length))
        rewards = {place: reward_adapter(Path(place)) for place in data.reward_models.values()}
        holds_out = data.eval_fraction > 0 or data.held_out_source is not None
        return cls(
            adapter=config.adapter,
            adapters=(config.adapter,),
            parallel=config.parallel,
            gpus_per_node=config.cluster.gpus_per_node,
            expert_degree=config.expert_degree(ranks or config.cluster.ranks),
            format=KEEP if config.quant.method == KEEP else config.quant.default_format,
            dense_layers=config.quant.num_dense,
            keeps_shards=config.quant.keeps_shards,
            new_tokens=tuple(config.model.new_tokens),
            sequence_length=data.sequence_length,
            image_max_pixels=data.image_max_pixels,
            train=train,
            optim=config.optim,
            reward_adapters=sum(each is not None for each in rewards.values()),
            reward_weights=sum(classifier_weights(place) for place, each in rewards.items() if each is None),
            steps=steps,
            checkpoints_kept=train.keep + (1 if holds_out and train.evaluates else 0) + 1,
            results_kept=2 if holds_out and train.keeps_best(config.adapter.method) else 1,
        )

    def token_formats(self, shapes: ModelShapes) -> tuple[str | None, str | None]:
        """Return the formats of embedding and LM head; None for a dense one."""
        if self.format != KEEP or self.adapter.token_settings(self.new_tokens):
            return None, None
        return shapes.kept_tokens

    @property
    def itemsize(self) -> int:
        """Bytes of an element of train.dtype."""
        return DTYPE_BYTES[self.train.dtype]

    def trained_rows(self, shapes: ModelShapes) -> dict[str, tuple[int, ...]]:
        """Return the trained ids of embedding and LM head by matrix; new tokens count as ids after the last."""
        ids = range(shapes.vocabulary, shapes.vocabulary + len(self.new_tokens))
        return trained_indices(self.adapter, tied=shapes.tied, new=tuple(ids))

    @property
    def tokens_at_once(self) -> int:
        """Tokens that a rank runs at once: those of a micro-batch."""
        return self.train.micro_batch * self.sequence_length

    @property
    def resident_layers(self) -> int:
        """Number of first decoder layers that are gathered once, if the base is sharded; `auto` counts as none."""
        resident = self.parallel.resident_blocks
        return max(self.dense_layers, 0 if resident == "auto" else resident)

    @property
    def has_experts_apart(self) -> bool:
        """True if experts are divided over the ranks, or gathered on demand, and not with their layers."""
        return self.expert_degree > 1 or self.parallel.experts == "on_demand"

    def shard_degree(self, ranks: int) -> int:
        """Return the number of ranks, of `ranks` in all, that one replica of the base is sharded over."""
        degree = self.parallel.shard_degree
        if degree is None:
            return ranks
        return self.gpus_per_node if degree == "node" else degree

    def alone(self) -> list[Workload]:
        """Return the workload of each trial with its adapter only."""
        return [replace(self, adapter=adapter, adapters=(adapter,)) for adapter in self.adapters]


def trained_together(trials: Sequence[Workload]) -> Workload:
    """Return the workload of a step in which a rank runs a micro-batch of each trial, all on one base.

    Settings that may differ between trials and that no plan depends on are those of the first. Raises UserError if the
    trials differ in their micro-batches.
    """
    if len(trials) == 1:
        return trials[0]
    first, number = trials[0], len(trials)
    if len({trial.train.micro_batch for trial in trials}) > 1:
        raise UserError(
            "trials trained together run side by side, so train.micro_batch is the same for all; leave it out of "
            "the sweep, or set sweep.packed=1"
        )
    return replace(
        first,
        adapter=replace(first.adapter, lora_dropout=max(trial.adapter.lora_dropout for trial in trials)),
        adapters=tuple(trial.adapter for trial in trials),
        train=replace(
            first.train,
            micro_batch=number * first.train.micro_batch,
            global_batch=number * max(trial.train.global_batch for trial in trials),
        ),
    )
