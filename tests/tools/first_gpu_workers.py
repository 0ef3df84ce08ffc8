"""Measure in a process of its own for first_gpu.py: `python first_gpu_workers.py NAME JSON` prints figures as JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from distlora.architecture.shapes import ARCHITECTURES
from pretend_cuda import library
from support.measured import write_random_checkpoint
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


TRACE_ERROR = 0.001
"""Largest relative difference between the planned and the traced peak."""


def traced_step(folder: str, layers: int, tokens: int, checkpointing: str, fused: str, deterministic: str) -> Figures:
    """Trace the trainer's step with 8B's sizes on the pretended GPU. Returns a row, or what is missing for it."""
    if torch.version.cuda is not None:
        return {"missing": "the pretended GPU needs a CPU build of torch"}
    if library.build("g++") is None:
        return {"missing": "the pretended GPU needs g++"}
    train = {
        "checkpointing": checkpointing,
        "fused_kernels": fused,
        "deterministic_attention": deterministic == "true",
    }
    cell = {"model": "8b", "layers": layers, "ranks": 1, "tokens": tokens, "settings": {"train": train}}
    out = Path(folder, "traced.json")
    command = [sys.executable, "-m", "pretend_cuda.start", "trace_step", str(out), json.dumps(cell)]
    subprocess.run(command, env=os.environ | {"PRETEND_CUDA": "shapes"}, stdout=sys.stderr, check=True)
    seen = json.loads(out.read_text())
    peak, planned = seen["peak"]
    assert seen["waits"] == {}, f"the host waits in {seen['waits']}"
    assert abs(planned / peak - 1) <= TRACE_ERROR, f"peak {peak:,} bytes, planned {planned:,}"
    row = {
        **train,
        "tokens": tokens,
        "peak / planned, GB": f"{peak / 1e9:.3f} / {planned / 1e9:.3f}",
        "Triton launches per layer": f"{sum(seen['kernels'].values()) / layers:.1f}",
        "matrix products per layer": f"{sum(seen['operators'][name] for name in ('mm', 'addmm')) / layers:.1f}",
    }
    return {"row": row}


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


if __name__ == "__main__":
    functions = {"versions": versions, "traced_step": traced_step, "checkpoint": checkpoint}
    function = functions[sys.argv[1]]
    print(json.dumps(function(**json.loads(sys.argv[2]))))
