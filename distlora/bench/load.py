"""Loading a checkpoint into 4-bit: ours on two ranks, without the cache of quantized shards, filling it and from it,
beside transformers + bitsandbytes, in one run.

    python -m distlora.bench.load [--layers N] [--out FOLDER] [--json]        (`distlora bench load`)

Each side loads the same bf16 folder on the CPU with two threads in all; the page cache is warm for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distlora.bench.checkpoints import LLAMA_700M, write_random_checkpoint
from distlora.bench.machine import made_here
from distlora.bench.memory import PeakMemory
from distlora.bench.processes import free_port, own_stdout, run_each
from distlora.config import Config
from distlora.config_file import build
from distlora.pages.drawing import draw_bars
from distlora.pages.tables import Table
from distlora.pages.written import Results

RANKS, MIB = 2, 2**20


@dataclass(frozen=True, slots=True)
class Figures:
    seconds: float
    cpu_seconds: float
    """Of one process: what a machine that others use does not change much."""
    peak_bytes: int
    """Anonymous memory of one process over that at its start."""
    kept_bytes: int
    """What the process holds of the model when it is done."""
    base_bytes: int = 0
    """Of that, what is no adapter."""
    read_bytes: int = 0
    """As the reader counts them: headers and checksums, and what was hashed, too."""
    from_cache: bool = False
    """Whether nothing was quantized."""


def ours(rank: int, world: int, port: int, folder: Path, backend_name: str, cache: Path | None, results: Any) -> None:
    """One rank's part of loading `folder`."""
    from distlora.adapters import adapter_parameters
    from distlora.loading.weights import load_base
    from distlora.model import build_model
    from distlora.parallel import Ranks, parallelize
    from distlora.startup import cache_settings

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sections: dict[str, Any] = {"model": {"path": str(folder)}, "data": {"path": "none"}, "run_dir": "none"}
    sections["quant"] = {"cache": False} if cache is None else {"cache_dir": str(cache)}
    config = build(Config, sections | {"parallel": {"backend": backend_name}})
    if backend_name == "zero3":  # Imports do not count.
        from distlora.parallel import zero3

        zero3.start_deepspeed(torch.device("cpu"))
    model = build_model(config)
    dist.barrier()
    with PeakMemory() as memory:
        began, cpu = time.monotonic(), time.process_time()
        backend = parallelize(model, Ranks(rank, world, torch.device("cpu"), dist.group.WORLD), config)
        loaded = load_base(model, folder, backend, cache=cache_settings(config, backend, print))
        backend.watch_weights(model)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    held = {name: backend.local_rows(parameter)[0].nbytes for name, parameter in model.named_parameters()}
    adapters = sum(held[name] for name in adapter_parameters(model))
    figures = Figures(
        seconds,
        cpu,
        memory.peak,
        sum(held.values()),
        base_bytes=sum(held.values()) - adapters,
        read_bytes=loaded.bytes_read,
        from_cache=loaded.cached_weights == loaded.quantized_weights,
    )
    results.put((rank, figures))
    dist.barrier()
    dist.destroy_process_group()


def transformers_and_bitsandbytes(folder: Path, results: Any) -> None:
    """The peer: from_pretrained with a BitsAndBytesConfig, one process, the whole model."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(RANKS)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with PeakMemory() as memory:
        began, cpu = time.monotonic(), time.process_time()
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16, trust_remote_code=False
        )
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert packed, "the peer did not quantize: is bitsandbytes installed?"
    results.put((0, Figures(seconds, cpu, memory.peak, sum(p.nbytes for p in model.parameters()))))


def measure(folder: Path, *, world: int, backend: str = "fsdp2", cache: Path | None = None) -> list[Figures]:
    """Our figures, by rank; `backend` is parallel.backend. `cache`: where quantized shards are kept; None: nowhere."""
    port = free_port()
    return run_each(ours, [(rank, world, port, folder, backend, cache) for rank in range(world)])


def measure_peer(folder: Path) -> Figures:
    (figures,) = run_each(transformers_and_bitsandbytes, [(folder,)])
    return figures


def run(layers: int) -> Results:
    """Every start, one after the other."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        parameters = write_random_checkpoint(folder, LLAMA_700M | {"num_hidden_layers": layers}, num_shards=4)
        cache, found = Path(temporary) / "cache", {}
        found["distlora, no cache"] = cold = slowest(measure(folder, world=RANKS))
        found["distlora, filling the cache"] = slowest(measure(folder, world=RANKS, cache=cache))
        found["distlora, from the cache"] = second = slowest(measure(folder, world=RANKS, cache=cache))
        found["transformers + bitsandbytes"] = peer = measure_peer(folder)
    assert second.from_cache, "the second start did not find what the first one kept"
    beside = second.read_bytes / second.base_bytes - 1
    assert beside <= 0.02, f"the second start read {beside:.1%} beside its own bytes of the base"
    return results(found, parameters, cold=cold, second=second, peer=peer)


def results(found: Mapping[str, Figures], parameters: int, *, cold: Figures, second: Figures, peer: Figures) -> Results:
    lines = [["", "seconds", "CPU seconds", "MiB read", "peak anonymous MiB", "of the model, MiB"]]
    for name, row in found.items():
        read = f"{row.read_bytes / MIB:.0f}" if row.read_bytes else ""
        cells = [f"{row.seconds:.2f}", f"{row.cpu_seconds:.2f}", read]
        lines.append([name, *cells, f"{row.peak_bytes / MIB:.0f}", f"{row.kept_bytes / MIB:.0f}"])
    reading = [
        f"Beside ours {name}: theirs takes {peer.seconds / row.seconds:.1f} times as long and "
        f"{peer.peak_bytes / row.peak_bytes:.1f} times the memory a process."
        for name, row in (("without the cache", cold), ("from the cache", second))
    ]
    reading.append(
        f"The second start read its {second.base_bytes / MIB:.0f} MiB of the base and "
        f"{second.read_bytes / second.base_bytes - 1:.2%} beside them."
    )
    panels = [
        ("seconds", {name: row.seconds for name, row in found.items()}),
        ("peak anonymous MiB of a process", {name: row.peak_bytes / MIB for name, row in found.items()}),
    ]
    return Results(
        name="load",
        heading=f"Loading {parameters / 1e6:.0f}M parameters, bf16 to NF4 with double quantization",
        notes=made_here("transformers", "bitsandbytes"),
        tables=[Table(f"On {RANKS} threads in all; memory and CPU seconds of the process that needs most", lines)],
        rows=[{"start": name, "parameters": parameters} | dataclasses.asdict(row) for name, row in found.items()],
        reading=reading,
        draw=lambda path: draw_bars("Loading into 4 bits", panels, path),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LLAMA_700M["num_hidden_layers"], help="blocks of the model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with own_stdout():
        found = run(options.layers)
    found.show(out=options.out, as_json=options.json)


def slowest(by_rank: list[Figures]) -> Figures:
    """The figures of a start: the most of each that some rank needed."""
    return Figures(
        seconds=max(rank.seconds for rank in by_rank),
        cpu_seconds=max(rank.cpu_seconds for rank in by_rank),
        peak_bytes=max(rank.peak_bytes for rank in by_rank),
        kept_bytes=max(rank.kept_bytes for rank in by_rank),
        base_bytes=min(rank.base_bytes for rank in by_rank),
        read_bytes=max(rank.read_bytes for rank in by_rank),
        from_cache=all(rank.from_cache for rank in by_rank),
    )


if __name__ == "__main__":
    main()
