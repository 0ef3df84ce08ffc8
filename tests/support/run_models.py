"""Build and shard a model by the settings of a run."""

from __future__ import annotations

from typing import Any

from distlora.config import Config
from distlora.model.build import CausalLM, build_model
from distlora.parallel import Backend, Ranks, parallelize


def build_run_model(config: Config, **options: Any) -> CausalLM:
    return build_model(config.spec, config.train, sequence_length=config.data.sequence_length, **options)


def parallelize_run(model: CausalLM, ranks: Ranks, config: Config) -> Backend:
    return parallelize(model, ranks, config.parallel, shard_degree=config.shard_degree(ranks.world))
