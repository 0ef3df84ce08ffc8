"""The model, the rows and the adapter that all cells of a problem begin with; each made once, by ours.

python -m distlora.bench.step.rows JOB       (JOB as JSON; `compare.prepare` runs it)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from distlora.bench.checkpoints import write_random_checkpoint
from distlora.bench.machine import made_here
from distlora.bench.processes import own_stdout
from distlora.bench.rows import packed, random_rows
from distlora.bench.step.cells import installed
from distlora.checkpoint.files import write_files
from distlora.config import Config
from distlora.config.file import build
from distlora.data.loader import PackedRows, StepLoader
from distlora.data.prepare import prepare
from distlora.parallel import Ranks
from distlora.training.publish import weight_files
from distlora.training.setup import start_model


def write_rows(rows: PackedRows, file: Path) -> None:
    tensors = {name: torch.from_numpy(np.array(getattr(rows, name))) for name in ("tokens", "flags")}
    safetensors.torch.save_file(tensors, file)


def read_rows(file: Path) -> PackedRows:
    tensors = safetensors.torch.load_file(file)
    return packed(tensors["tokens"].numpy(), tensors["flags"].numpy())


def real_rows(config: Config, steps: int) -> PackedRows:
    """The rows of a run's first steps, in its order."""
    rows = PackedRows.open(prepare(config), "train")
    batch = config.train.global_batch
    loader = StepLoader(rows, global_batch=batch, micro_batch=batch, rank=0, world=1, seed=0, shuffle=True)
    places = np.concatenate([loader.rows_of_ranks(step).reshape(-1) for step in range(steps)])
    return rows.take(places[places >= 0])


def write_adapter(config: Config, folder: Path) -> None:
    """An adapter in PEFT's format as a run of ours starts, which adds nothing: A random, B zero."""
    model, backend, _ = start_model(config, Ranks(0, 1, torch.device("cpu"), None))
    folder.mkdir(parents=True)
    write_files(folder, weight_files(model, config), backend)


def config_of(job: Mapping[str, Any], seed: int) -> Config:
    data = {"path": job["data"] or "none", "sequence_length": job["length"]}
    data |= {"cache_dir": job["cache_dir"]} if job["data"] else {}
    return build(
        Config,
        {
            "model": {"path": job["model"]},
            "data": data,
            "adapter": {"r": job["r"], "target_modules": "all-linear"},
            "quant": {"method": "none"},
            "train": {"seed": seed, "global_batch": job["rows"]},
            "run_dir": "none",
        },
    )


PACKAGES = ("transformers", "peft", "bitsandbytes", "accelerate")
"""Whose versions are behind the figures."""


def main() -> None:
    job = json.loads(sys.argv[1])
    with own_stdout():
        make(job)
    print(json.dumps(made_here(*filter(installed, PACKAGES))), flush=True)


def make(job: Mapping[str, Any]) -> None:
    """The files of a problem that are not there yet."""
    folder = Path(job["folder"])
    if job["settings"]:
        write_random_checkpoint(Path(job["model"]), job["settings"], num_shards=1)
    config = config_of(job, seed=0)
    rows = (
        real_rows(config, job["steps"])
        if job["data"]
        else random_rows(job["rows"] * job["steps"], job["length"], job["vocabulary"])
    )
    write_rows(rows, folder / f"rows_{job['length']}.safetensors")
    for seed in job["seeds"]:
        adapter = folder / f"adapter_{seed}"
        if not adapter.exists():
            write_adapter(config_of(job, seed), adapter)


if __name__ == "__main__":
    main()
