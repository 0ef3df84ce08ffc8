"""Measure loading a checkpoint on several ranks: seconds, memory and bytes read of each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import Config
from distlora.config.file import build
from distlora.loading.load_base import load_base
from distlora.model.adapters import adapter_parameters
from distlora.model.build import build_model
from distlora.parallel import Ranks, parallelize
from distlora.parallel.ranks import open_store
from distlora.training.setup import cache_settings
from distlora_kernels.nf4_cpu import has_bitsandbytes
from support.measured import PeakMemory, free_port, run_each, set_rank

THREADS = 2
"""Threads of all processes of a load."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Time and memory of one load in one process."""

    seconds: float
    cpu_seconds: float
    """CPU seconds of the process, which other work on the machine changes little."""
    peak_bytes: int
    """Peak anonymous memory over that at the start."""
    kept_bytes: int
    """Bytes of the model that the process holds when it is done."""
    base_bytes: int = 0
    """Bytes of the base weights among them."""
    read_bytes: int = 0
    """Bytes read, with headers, checksums and hashed bytes."""
    from_cache: bool = False
    """True if nothing was quantized."""


def ours(
    rank: int, world: int, port: int, folder: Path, backend_name: str, cache: Path | None, quant: str, results: Any
) -> None:
    """Load `folder` on one rank, on its part of the threads."""
    set_rank(rank, world, port)
    torch.set_num_threads(max(1, THREADS // world))
    dist.init_process_group("gloo", store=open_store(rank), rank=rank, world_size=world)
    sections: dict[str, Any] = {"model": {"path": str(folder)}, "data": {"path": "none"}, "run_dir": "none"}
    sections["quant"] = {"method": quant, **({"cache": False} if cache is None else {"cache_dir": str(cache)})}
    config = build(Config, sections | {"parallel": {"backend": backend_name}})
    if backend_name == "zero3":  # Imports do not count.
        from distlora.parallel import zero3

        zero3.start_deepspeed(torch.device("cpu"))
    import transformers.models.llama.modeling_llama  # noqa: F401

    has_bitsandbytes()
    dist.barrier()
    with PeakMemory() as memory:
        began, cpu = time.monotonic(), time.process_time()
        base = CheckpointFiles(folder)
        model = build_model(config.spec, base=base)
        backend = parallelize(model, Ranks(rank, world, torch.device("cpu"), dist.group.WORLD), config.parallel)
        loaded = load_base(model, base, backend, cache=cache_settings(config.spec, base, backend, print))
        backend.watch_weights(model)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    held = {name: backend.local_rows(parameter)[0].nbytes for name, parameter in model.named_parameters()}
    figures = Figures(
        seconds,
        cpu,
        memory.peak,
        sum(held.values()),
        base_bytes=sum(held.values()) - sum(held[name] for name in adapter_parameters(model)),
        read_bytes=loaded.bytes_read,
        from_cache=loaded.from_cache,
    )
    results.put((rank, figures))
    dist.barrier()
    dist.destroy_process_group()


def measure(
    folder: Path,
    *,
    world: int,
    backend: str = "fsdp2",
    cache: Path | None = None,
    quant: str = "nf4",
    environment: Mapping[str, str] | None = None,
) -> list[Figures]:
    """Return our figures by rank, with a folder of the quantized-weights cache or none.

    `environment` holds the variables that the launcher sets for workers.
    """
    port = free_port()
    arguments = [(rank, world, port, folder, backend, cache, quant) for rank in range(world)]
    return run_each(ours, arguments, environment=environment)
