"""The order of a start, which decides what is ever in memory: build on meta, shard, fill the shards, start adapters."""

from __future__ import annotations

from distlora.adapters import reset_adapters
from distlora.config import Config
from distlora.loading.weights import Loaded, load_base
from distlora.model import CausalLM, build_model, materialize_buffers
from distlora.parallel import Backend, Ranks, parallelize


def start_model(config: Config, ranks: Ranks) -> tuple[CausalLM, Backend, Loaded]:
    """The model on this rank with the base's weights and adapters that add nothing yet.

    Raises UserError for a base that cannot be read or does not fit its config.json.
    """
    model = build_model(config)
    backend = parallelize(model, ranks, config)
    loaded = load_base(model, config.model.path, backend)
    materialize_buffers(model, ranks.device)
    reset_adapters(model.adapted_linears(), config.adapter, seed=config.train.seed)
    return model, backend, loaded
