"""Several trials as one run, for the planner: their rows side by side, each with its own adapter, gradients,
moments; the base, what is gathered of it and what is dequantized once. Imports no torch.

All that a plan asks of a config it asks of these settings alike; what is trained it asks of `adapters`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from distlora.config import AdapterConfig, Config, UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig(Config):
    """The step of a pack whose slots are all in use. What trials may have each to itself and no plan asks for is
    the first one's."""

    trials: tuple[Config, ...]
    """As each is set."""

    @property
    def adapters(self) -> tuple[AdapterConfig, ...]:
        return tuple(trial.adapter for trial in self.trials)


def together(trials: Sequence[Config]) -> Config:
    """The settings of a step of these trials, which is the trial's own where there is one. A rank runs a micro-batch of
    each at once; where one has fewer of them in a step than another, its rows are empty."""
    if len(trials) == 1:
        return trials[0]
    first, number = trials[0], len(trials)
    if len({trial.train.micro_batch for trial in trials}) > 1:
        raise UserError(
            "trials of a pack run their rows side by side, so train.micro_batch is the same for all; leave it out of "
            "the sweep, or set sweep.packed=1"
        )
    train = dataclasses.replace(
        first.train,
        micro_batch=number * first.train.micro_batch,
        global_batch=number * max(trial.train.global_batch for trial in trials),
    )
    dropout = max(trial.adapter.lora_dropout for trial in trials)
    values = {item.name: getattr(first, item.name) for item in dataclasses.fields(Config)}
    values |= {"train": train, "adapter": dataclasses.replace(first.adapter, lora_dropout=dropout)}
    return PackConfig(**values, trials=tuple(trials))


def one_of(config: Config) -> Config:
    """A trial as it is set: of a pack its first."""
    return config.trials[0] if isinstance(config, PackConfig) else config


def each_alone(config: Config) -> tuple[Config, ...]:
    """The trials of a pack; a run alone is its own."""
    return config.trials if isinstance(config, PackConfig) else (config,)
