"""Measure in a process of its own for first_gpu.py: `python first_gpu_workers.py NAME JSON` prints figures as JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from distlora.architecture.shapes import ARCHITECTURES
from distlora.config import Config
from distlora.config.file import build
from distlora.parallel import join_ranks
from support.measured import write_random_checkpoint
from support.memory_steps import TrainingSteps
from support.small_models import SHAPES, tokenizer

Figures = dict[str, Any]


def versions() -> Figures:
    """Return the versions of the packages, and the GPU."""
    names = ("torch", "triton", "transformers", "numpy", "peft", "bitsandbytes", "liger_kernel", "hydra-core")
    installed = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "python": platform.python_version(), "cuda": torch.version.cuda, **installed}


def checkpoint(folder: str, dry: bool, layers: int) -> Figures:
    """Write a random checkpoint and text to train on; the folder appears when it is complete."""
    # As for the real shapes, the vocabulary is larger than the tokenizer's.
    settings = SHAPES | {"vocab_size": 1024} if dry else ARCHITECTURES["meta-llama/Llama-3.1-8B"]
    settings = {key: value for key, value in settings.items() if key != "model_type"} | {"num_hidden_layers": layers}
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    began = time.monotonic()
    parameters = write_random_checkpoint(partial, settings, num_shards=max(1, layers // 2))
    seconds = time.monotonic() - began
    tokenizer().save_pretrained(partial)
    words = [f"{a}{b}" for a in ("tor", "lin", "ker", "nel", "grad") for b in ("us", "em", "al", "ing", "ed")]
    source = random.Random(0)
    with (partial / "text.jsonl").open("w") as file:
        for _ in range(20 if dry else 40):
            text = " ".join(source.choices(words, k=60 if dry else 12_000))
            file.write(json.dumps({"text": text}) + "\n")
    partial.rename(folder)
    return {"parameters": parameters, "seconds": round(seconds, 1)}


def profile(folder: str, length: int, cache: str) -> Figures:
    """Time a training step alone, then under torch's profiler."""
    sections: dict[str, Any] = {
        "model": {"path": folder},
        "data": {"path": "none", "sequence_length": length},
        "adapter": {"r": 16, "target_modules": "all-linear"},
        "quant": {"cache_dir": f"{cache}/profiled"},
        "train": {"micro_batch": 1, "global_batch": 1},
    }
    ranks = join_ranks()
    steps = TrainingSteps([build(Config, {**sections, "run_dir": "none"})], ranks, in_slots=False)
    on_gpu = ranks.device.type == "cuda"
    settle = torch.cuda.synchronize if on_gpu else lambda: None
    for number in (0, 1, 1):
        settle()
        began = time.perf_counter()
        steps.run(number)
    settle()
    alone = (time.perf_counter() - began) * 1e3
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_gpu)]) as profiler:
        began = time.perf_counter()
        steps.run(1)
        settle()
        wall = (time.perf_counter() - began) * 1e3
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    # On the CPU, where a dry run is, operations that call no others stand for kernels.
    events = [e for e in profiler.events() if e.device_type == wanted and (on_gpu or not e.cpu_children)]
    events = [e for e in events if not e.is_user_annotation]  # A range on the GPU, around kernels.
    return {
        "alone_ms": alone,
        "wall_ms": wall,
        **busy([(e.name, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in events], wall),
    }


def busy(events: Sequence[tuple[str, float, float]], wall: float) -> Figures:
    """Return the busy share, the gaps and the 30 kernels with the most time of (name, start, end) in ms."""
    by_name: dict[str, list[float]] = {}
    total, gaps, last = 0.0, [0.0], None
    for name, start, end in sorted(events, key=lambda event: event[1]):
        by_name.setdefault(name, []).append(end - start)
        if last is not None and start > last:
            gaps.append(start - last)
        total += max(0.0, end - max(start, last or start))
        last = max(end, last or end)
    top = sorted(((name, len(each), sum(each)) for name, each in by_name.items()), key=lambda row: -row[2])[:30]
    return {
        "busy": total / wall,
        "busy_ms": total,
        "launches": len(events),
        "gap_ms": wall - total,
        "longest_ms": max(gaps),
        "top": top,
    }


if __name__ == "__main__":
    function = {"versions": versions, "checkpoint": checkpoint, "profile": profile}[sys.argv[1]]
    print(json.dumps(function(**json.loads(sys.argv[2]))))
