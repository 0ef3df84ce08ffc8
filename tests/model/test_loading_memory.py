"""Check the host memory of loading a 0.4B checkpoint, or its cached shards, beyond the shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distlora.architecture.safetensors_headers import read_headers
from distlora.config import Config
from distlora.config.file import build
from distlora.planner import plan_of
from distlora.planner.model import model_in
from support.measured import LLAMA_700M, write_random_checkpoint
from support.measured_load import Figures, measure
from support.plan_inputs import cpu_machine
from support.tiers import ci

RANKS = 2
MIB = 2**20
MODEL = LLAMA_700M | {"num_hidden_layers": 6}

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: reads RssAnon from /proc")


def write_model(folder: Path) -> int:
    """Write the model and return its number of parameters."""
    parameters = write_random_checkpoint(folder, MODEL, num_shards=4)
    assert parameters > 400e6
    return parameters


def check_memory(by_rank: list[Figures], folder: Path) -> None:
    """Check that the peak stays within the planner's prediction for loading."""
    largest_slice = max(segment.num_bytes for segment in read_headers(folder).values()) / RANKS
    config = build(Config, {"model": {"path": str(folder)}, "data": {"path": "none"}, "run_dir": "none"})
    planned = plan_of(config, model_in(folder), cpu_machine(RANKS)).host.loading
    assert planned == largest_slice + 64e6
    for rank, figures in enumerate(by_rank):
        over = figures.peak_bytes - figures.kept_bytes
        assert over <= planned, (
            f"rank {rank} took {over / MIB:.0f} MiB over its shard of {figures.kept_bytes / MIB:.0f}"
        )


@pytest.mark.parametrize("backend", [ci("fsdp2"), pytest.param("zero3", marks=pytest.mark.slow)])
def test_loading_peak_is_shard_plus_largest_slice_and_64_mb(tmp_path: Path, backend: str) -> None:
    """Measure while the cache is written: nothing may wait in memory to be written."""
    parameters = write_model(tmp_path / "model")
    by_rank = measure(tmp_path / "model", world=RANKS, backend=backend, cache=tmp_path / "cache")
    check_memory(by_rank, tmp_path / "model")
    for figures in by_rank:
        # Half of 131M bf16 weights of embedding and head, half of 270M at 4.127 bits, and 14 MB of fp32 adapters.
        assert figures.kept_bytes < 0.54 * parameters


@pytest.mark.ci
def test_keeping_shipped_bytes_takes_no_more_than_quantizing(tmp_path: Path) -> None:
    """Of 0.4B weights, 270M in block FP8; nothing is dequantized but what a chunk's check needs."""
    parameters = write_model(tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full([-(-size // 128) for size in tensors[name].shape], 0.5)
        safetensors.torch.save_file(tensors, file)
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    by_rank = measure(tmp_path / "model", world=RANKS, quant="keep")
    check_memory(by_rank, tmp_path / "model")
    for figures in by_rank:
        # Half of 131M bf16 weights, half of 270M at 8 bits, and 14 MB of fp32 adapters.
        assert figures.kept_bytes < 0.71 * parameters


@pytest.mark.slow
def test_start_from_cache_reads_2_percent_over_its_shard(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    measure(tmp_path / "model", world=RANKS, cache=tmp_path / "cache")
    by_rank = measure(tmp_path / "model", world=RANKS, cache=tmp_path / "cache")
    check_memory(by_rank, tmp_path / "model")
    for figures in by_rank:
        assert figures.from_cache
        assert figures.base_bytes < figures.read_bytes <= 1.02 * figures.base_bytes
