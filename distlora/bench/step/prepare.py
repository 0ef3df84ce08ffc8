"""Write the model, the sequences and the adapters that all cells of a problem start from.

    python -m distlora.bench.step.prepare REQUEST      (requests.StepInputs)

Prints the notes of the measurement as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from distlora.bench.machine import measurement_notes
from distlora.bench.processes import libraries_print_to_stderr
from distlora.bench.random_inputs import packed, random_rows, write_random_checkpoint
from distlora.bench.requests import StepInputs, from_argument
from distlora.bench.step.cells import installed
from distlora.checkpoint.files import write_files
from distlora.config import Config
from distlora.config.file import build
from distlora.data.loader import StepLoader
from distlora.data.prepare import prepare
from distlora.data.rows import PackedRows
from distlora.parallel import Ranks
from distlora.training.publish import weight_files
from distlora.training.setup import start_run_model


def write_rows(rows: PackedRows, file: Path) -> None:
    """Write packed sequences to a safetensors file."""
    tensors = {name: torch.from_numpy(np.array(getattr(rows, name))) for name in ("tokens", "flags")}
    safetensors.torch.save_file(tensors, file)


def read_rows(file: Path) -> PackedRows:
    """Read the sequences of write_rows."""
    tensors = safetensors.torch.load_file(file)
    return packed(tensors["tokens"].numpy(), tensors["flags"].numpy())


def real_rows(config: Config, steps: int) -> PackedRows:
    """Return the sequences of a run's first steps, in its order."""
    rows = PackedRows.open(prepare(config.model, config.data, config.train), "train")
    batch = config.train.global_batch
    loader = StepLoader(rows, global_batch=batch, micro_batch=batch, rank=0, world=1, seed=0, shuffle=True)
    places = np.concatenate([loader.rows_of_ranks(step).reshape(-1) for step in range(steps)])
    return rows.take(places[places >= 0])


def write_adapter(config: Config, folder: Path) -> None:
    """Write a new adapter in PEFT's format: A random, B zero."""
    model, backend, _ = start_run_model(config, Ranks(0, 1, torch.device("cpu"), None))
    folder.mkdir(parents=True)
    write_files(folder, weight_files(model, config.spec), backend)


def config_of(request: StepInputs, seed: int) -> Config:
    """Return the settings of a run that makes the sequences and an adapter."""
    data: dict[str, Any] = {"path": request.data or "none", "sequence_length": request.length}
    data |= {"cache_dir": request.cache_dir} if request.data else {}
    return build(
        Config,
        {
            "model": {"path": request.model},
            "data": data,
            "adapter": {"r": request.r, "target_modules": "all-linear"},
            "quant": {"method": "none"},
            "train": {"seed": seed, "global_batch": request.rows},
            "run_dir": "none",
        },
    )


PACKAGES = ("transformers", "peft", "bitsandbytes", "accelerate")
"""Packages whose versions are noted."""


def main() -> None:
    """Run the worker: measure as the request says, and print."""
    request = from_argument(StepInputs)
    with libraries_print_to_stderr():
        make(request)
    print(json.dumps(measurement_notes(*filter(installed, PACKAGES))), flush=True)


def make(request: StepInputs) -> None:
    """Write the files of a problem that are missing."""
    folder = Path(request.folder)
    if request.settings is not None:
        write_random_checkpoint(Path(request.model), json.loads(request.settings), num_shards=1)
    if request.vocabulary is None:
        rows = real_rows(config_of(request, seed=0), request.steps)
    else:
        rows = random_rows(request.rows * request.steps, request.length, request.vocabulary)
    write_rows(rows, folder / f"rows_{request.length}.safetensors")
    for seed in request.seeds:
        adapter = folder / f"adapter_{seed}"
        if not adapter.exists():
            write_adapter(config_of(request, seed), adapter)


if __name__ == "__main__":
    main()
