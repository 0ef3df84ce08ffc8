"""A model that is loaded and sharded, before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distlora.config.file import load_config
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks
from distlora.training import setup
from distlora.training.open_run import open_data

# --- ranks ---


def started(ranks: Ranks, run_dir: Path) -> tuple[CausalLM, Backend, Any]:
    config = load_config(run_dir)
    model, backend, _ = setup.start_run_model(config, ranks)
    loader, _ = open_data(run_dir, config.train, ranks)
    batch = loader.batch(0).micro_batches[0]
    return model, backend, (batch.input_ids, batch.position_ids, batch.labels)
