"""A model of 1.5 billion parameters, made on the spot, trained by the command that a user types, and the memory that
all its processes take together.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch

from distlora import wire
from distlora.bench.checkpoints import LLAMA_1B5, write_random_checkpoint
from distlora.config import AdapterConfig
from distlora.families import read_config
from distlora.shapes import ModelShapes, shapes_of
from small_models import read_metrics, tokenizer, write_text_file

DISTLORA = Path(sys.executable).with_name("distlora")
MIB = 2**20
RANK, TOKENS, ROWS, STEPS = 8, 64, 4, 3
"""Of the adapters, of a row, of a step over all ranks, of the run."""

GIVE_BACK = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"), "131072")
"""glibc's own settings: what is freed is given back. The launcher's for CPU workers keep it for speed, and then a
worker's heap, fragmented, was 2.3 to 3.3 GB in this model's second step on 2 ranks (2026-11-25)."""

WORKER_IMPORTS = 400 * MIB
"""Anonymous memory of a worker before it has built anything: torch, transformers, gloo and its threads."""
LAUNCHER = 400 * MIB
"""The launcher and torchrun's agent, which imports torch."""


@dataclass(slots=True)
class Sampled:
    """The anonymous memory of a process and all its descendants while it runs, in bytes."""

    peak: int = 0
    """Most of all together."""
    workers: dict[int, int] = field(default_factory=dict)
    """Most of each worker by itself, by pid."""

    def look(self, root: psutil.Process) -> None:
        total = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                nbytes = anonymous_bytes(process.pid)
                words = process.cmdline()
                is_worker = ("-m", "distlora_launcher.worker_entry") in itertools.pairwise(words)
            except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
                continue
            total += nbytes
            if is_worker:
                self.workers[process.pid] = max(nbytes, self.workers.get(process.pid, 0))
        self.peak = max(self.peak, total)


def anonymous_bytes(pid: int) -> int:
    """RssAnon; 0 for a process that is gone but not yet forgotten."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def predicted_worker_bytes(shapes: ModelShapes, ranks: int) -> int:
    """Most anonymous memory of one worker: what it imports, its shard, adapters with gradients and moments, what is
    gathered, and the largest of what the phases of a step and a save take beside."""
    held = wire.held_bytes(shapes, ranks, quantized=True, itemsize=2)
    config = AdapterConfig(r=RANK, target_modules="all-linear")
    adapters = sum(each.numel for block in shapes.adapters(config) for each in block)
    block = wire.block_bytes(shapes.block, ranks, quantized=True, itemsize=2)
    matrix = 2 * shapes.vocabulary * shapes.hidden
    tokens = TOKENS * ROWS // ranks
    # FSDP2 copies out of an all-gather's result. The head and what is gathered ahead of it are there together; then the
    # logits in fp32, their softmax, gradient and copy.
    of_head = 2 * matrix + 4 * 4 * tokens * shapes.vocabulary
    # The embedding likewise, before any block.
    gathered = max(3 * block + of_head, 2 * matrix)
    boundaries = 2 * shapes.num_layers * tokens * shapes.hidden
    # Dequantized for a product, and the products' own buffers.
    dense = 4 * max(weight.numel for weight in shapes.block) * 2
    saved = 12 * adapters  # Copies of A and B and their moments, on rank 0.
    return WORKER_IMPORTS + held + 16 * adapters + max(gathered + boundaries + dense, saved + block)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder, 3 GB, which is gone after the module's tests."""
    folder = tmp_path_factory.mktemp("large") / "model"
    write_random_checkpoint(folder, LLAMA_1B5, num_shards=16)
    tokenizer().save_pretrained(folder)
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def losses_by_ranks() -> dict[int, list[float]]:
    """Of the runs so far."""
    return {}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: reads RssAnon from /proc")
@pytest.mark.parametrize("ranks", [2, 4])
def test_one_and_a_half_billion_parameters_train_in_what_is_predicted(
    model: Path, tmp_path: Path, losses_by_ranks: dict[int, list[float]], ranks: int
) -> None:
    shapes = shapes_of(read_config(model), model / "config.json")
    assert shapes.numel > 1.5e9
    per_worker = predicted_worker_bytes(shapes, ranks)
    predicted = ranks * per_worker + LAUNCHER
    write_text_file(tmp_path / "text.jsonl")
    command = [
        *(str(DISTLORA), "train", f"model.path={model}", f"data.path={tmp_path / 'text.jsonl'}", "recipe=qlora"),
        *(f"cluster.gpus_per_node={ranks}", f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"),
        *(f"data.sequence_length={TOKENS}", "data.eval_fraction=0", f"adapter.r={RANK}", "tracker=none"),
        "quant.cache=false",
        *(f"train.max_steps={STEPS}", f"train.global_batch={ROWS}", f"train.micro_batch={ROWS // ranks}"),
    ]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    sampled, began = Sampled(), time.monotonic()
    with subprocess.Popen(command, **options, cwd=tmp_path, env=os.environ | GIVE_BACK) as run:
        root = psutil.Process(run.pid)
        root.nice(10)
        while run.poll() is None:
            sampled.look(root)
            time.sleep(0.05)
        assert run.stdout is not None
        said = run.stdout.read()
    assert run.returncode == 0, said
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == STEPS
    # Twice the ranks add the same rows' gradients in another order, in bf16.
    assert all(
        abs(loss / other - 1) < 1e-3
        for run in losses_by_ranks.values()
        for loss, other in zip(losses, run, strict=True)
    )
    losses_by_ranks[ranks] = losses
    adapter = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for tensor in adapter.values()), "an adapter was not trained"
    figures = {
        "seconds": round(time.monotonic() - began),
        "peak_mib": sampled.peak // MIB,
        "predicted_mib": predicted // MIB,
        "worker_mib": sorted(nbytes // MIB for nbytes in sampled.workers.values()),
        "predicted_worker_mib": per_worker // MIB,
        "loading": next((line for line in said.splitlines() if "NF4" in line), ""),
        "shard_mib": wire.held_bytes(shapes, ranks, quantized=True, itemsize=2) // MIB,
    }
    print(f"\n{ranks} ranks, {os.cpu_count()} cores: {json.dumps(figures)}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["gathered_bytes_per_step"] == 2 * shapes.num_layers * wire.block_bytes(
        shapes.block, ranks, quantized=True, itemsize=2
    ) + 2 * (2 * shapes.vocabulary * shapes.hidden + shapes.hidden)
    assert len(sampled.workers) == ranks
    assert sampled.peak <= 20e9
    # What was measured is 3 % over on 2 ranks and 19 % on 4 (distlora/loading/README.md); why is not known yet.
    assert sampled.peak <= 1.25 * predicted, figures
