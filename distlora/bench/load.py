"""Loading a checkpoint into 4-bit: ours without the cache of quantized shards, filling it and from it, beside
transformers + bitsandbytes, in one run.

    python -m distlora.bench.load [--layers N] [--ranks 1,2] [--environment JSON] ...     (`distlora bench load`)

Each side loads the same bf16 folder on the CPU with two threads in all, in processes of its own that take turns; the
page cache is warm for all; ours have --environment, in which `distlora bench load` gives what the launcher gives to
workers. A peer's ranks hold the whole model each, as its users have it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distlora.architecture.safetensors_headers import read_headers
from distlora.bench.checkpoints import LLAMA_700M, write_random_checkpoint
from distlora.bench.machine import made_here
from distlora.bench.memory import PeakMemory
from distlora.bench.network import free_port
from distlora.bench.processes import own_stdout, run_each
from distlora.config import Config
from distlora.config.file import build
from distlora.output.figures import draw_bars
from distlora.output.result_files import Results
from distlora.output.tables import Table, spread
from distlora_kernels.nf4_cpu import has_bitsandbytes

THREADS, MIB = 2, 2**20
WANTED = {"cold": 1.5, "filling": 1.5, "cached": 5.0}
"""Times as fast as the peer in one process with two threads: what a start's own code and its cache are worth having
for."""
SLACK_BYTES = 64e6
"""Beside the largest tensor's slice, what loading may take over what it fills: its buffers."""


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
    """One rank's part of loading `folder`, on its share of the threads."""
    from distlora.loading.load_base import load_base
    from distlora.model.adapters import adapter_parameters
    from distlora.model.build import build_model
    from distlora.parallel import Ranks, parallelize
    from distlora.training.setup import cache_settings

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(max(1, THREADS // world))
    dist.init_process_group("gloo")
    sections: dict[str, Any] = {"model": {"path": str(folder)}, "data": {"path": "none"}, "run_dir": "none"}
    sections["quant"] = {"cache": False} if cache is None else {"cache_dir": str(cache)}
    config = build(Config, sections | {"parallel": {"backend": backend_name}})
    if backend_name == "zero3":  # Imports do not count.
        from distlora.parallel import zero3

        zero3.start_deepspeed(torch.device("cpu"))
    import transformers.models.llama.modeling_llama  # noqa: F401

    has_bitsandbytes()
    dist.barrier()
    with PeakMemory() as memory:
        began, cpu = time.monotonic(), time.process_time()
        model = build_model(config)
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


def transformers_and_bitsandbytes(rank: int, threads: int, folder: Path, results: Any) -> None:
    """The peer: from_pretrained with a BitsAndBytesConfig, the whole model."""
    import transformers.models.llama.modeling_llama  # noqa: F401  Imports do not count.

    from distlora.bench.peer_models import load_base

    has_bitsandbytes()
    torch.set_num_threads(threads)
    with PeakMemory() as memory:
        began, cpu = time.monotonic(), time.process_time()
        model = load_base(folder, device=torch.device("cpu"))
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert packed, "the peer did not quantize: is bitsandbytes installed?"
    results.put((rank, Figures(seconds, cpu, memory.peak, sum(p.nbytes for p in model.parameters()) + absmax(packed))))


def absmax(packed: Sequence[Any]) -> int:
    """Bytes of bitsandbytes' quantization states, of which weights may share tables."""
    tensors = [each for p in packed for each in p.quant_state.as_dict().values() if isinstance(each, torch.Tensor)]
    return sum({each.data_ptr(): each.nbytes for each in tensors}.values())


def measure(
    folder: Path,
    *,
    world: int,
    backend: str = "fsdp2",
    cache: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Figures]:
    """Our figures, by rank; `backend` is parallel.backend. `cache`: where quantized shards are kept; None: nowhere.
    `environment`: what the launcher gives to workers beside the user's."""
    port = free_port()
    arguments = [(rank, world, port, folder, backend, cache) for rank in range(world)]
    return run_each(ours, arguments, environment=environment)


def measure_peer(folder: Path, *, world: int) -> list[Figures]:
    """So many processes of the peer at once, each with its share of the threads."""
    return run_each(transformers_and_bitsandbytes, [(rank, max(1, THREADS // world), folder) for rank in range(world)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What took part in a round: a way to load on so many ranks, and what it took."""

    round: int
    way: str
    """cold, filling, cached; peer."""
    ranks: int
    seconds: float
    """Until the last rank was done."""
    cpu_seconds: float
    """Of all ranks."""
    peak_bytes: int
    """Anonymous memory of the process that took most, over that at its start."""
    kept_bytes: int
    """What a process holds of the model when it is done,"""
    base_bytes: int
    """and of that the base."""
    read_bytes: int
    """By the rank that read most."""


NAMES = {
    "cold": "ours, no cache",
    "filling": "ours, filling the cache",
    "cached": "ours, from the cache",
    "peer": "transformers + bitsandbytes",
}


def rounds_of(folder: Path, ranks: Sequence[int], rounds: int, environment: Mapping[str, str]) -> Iterator[Start]:
    """Every way on every number of ranks, in turns; ours with `environment` beside the user's."""
    for number in range(1, rounds + 1):
        for world in ranks:
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                for way, cache in {"cold": None, "filling": Path(temporary), "cached": Path(temporary)}.items():
                    _say(number, rounds, way, world)
                    by_rank = measure(folder, world=world, cache=cache, environment=environment)
                    assert all(each.from_cache == (way == "cached") for each in by_rank), f"{way} is not what it was"
                    yield start(number, way, by_rank)
            _say(number, rounds, "peer", world)
            yield start(number, "peer", measure_peer(folder, world=world))


def _say(number: int, rounds: int, way: str, world: int) -> None:
    ranks = f"{world} ranks" if world > 1 else "one process"
    print(f"round {number} of {rounds}: {NAMES[way]}, {ranks}", file=sys.stderr, flush=True)


def start(number: int, way: str, by_rank: Sequence[Figures]) -> Start:
    return Start(
        round=number,
        way=way,
        ranks=len(by_rank),
        seconds=max(rank.seconds for rank in by_rank),
        cpu_seconds=sum(rank.cpu_seconds for rank in by_rank),
        peak_bytes=max(rank.peak_bytes for rank in by_rank),
        kept_bytes=max(rank.kept_bytes for rank in by_rank),
        base_bytes=min(rank.base_bytes for rank in by_rank),
        read_bytes=max(rank.read_bytes for rank in by_rank),
    )


def results(starts: Sequence[Start], parameters: int, largest: int) -> Results:
    """`largest`: bytes of the largest tensor on disk."""
    cells: dict[tuple[int, str], list[Start]] = {}
    for each in starts:
        cells.setdefault((each.ranks, each.way), []).append(each)
    fewest = min(ranks for ranks, _ in cells)
    peers = cells[fewest, "peer"]
    lines = [["", "ranks", "seconds", "CPU s", "peer / it", "by CPU s", "MiB read", "peak MiB", "kept MiB", "over it"]]
    for (ranks, way), own in cells.items():
        ratios = [_ratios(own, peers, name) for name in ("seconds", "cpu_seconds")]
        first = max(own, key=lambda each: each.peak_bytes)
        lines.append(
            [
                NAMES[way],
                str(ranks),
                f"{_median(own, 'seconds'):.2f}",
                f"{_median(own, 'cpu_seconds'):.2f}",
                *("" if own is peers else spread(each) for each in ratios),
                f"{first.read_bytes / MIB:,.0f}" if first.read_bytes else "",
                f"{first.peak_bytes / MIB:,.0f}",
                f"{first.kept_bytes / MIB:,.0f}",
                f"{(first.peak_bytes - first.kept_bytes) / MIB:,.0f}",
            ]
        )
    names = {f"{NAMES[way]}, {ranks}": own for (ranks, way), own in cells.items()}
    panels = [
        ("seconds", {name: _median(own, "seconds") for name, own in names.items()}),
        ("peak anonymous MiB of a process", {name: own[0].peak_bytes / MIB for name, own in names.items()}),
    ]
    return Results(
        name="load",
        heading=f"Loading {parameters / 1e6:.0f}M parameters, bf16 to NF4 with double quantization",
        notes=made_here("transformers", "bitsandbytes", threads=THREADS),
        tables=[Table(f"{THREADS} threads in all; medians of {starts[-1].round} rounds; memory of one process", lines)],
        rows=[{"parameters": parameters} | dataclasses.asdict(each) for each in starts],
        reading=list(reading(cells, peers, largest)),
        draw=lambda path: draw_bars("Loading into 4 bits", panels, path),
    )


def reading(cells: Mapping[tuple[int, str], Sequence[Start]], peers: Sequence[Start], largest: int) -> Iterator[str]:
    """What was to hold, and whether it does."""
    for (ranks, way), own in cells.items():
        if way == "peer":
            continue
        clock, cpu = (statistics.median(_ratios(own, peers, name)) for name in ("seconds", "cpu_seconds"))
        yield (
            f"{NAMES[way]}, {_ranks(ranks)}: {clock:.1f} times as fast as the peer in one process with two threads, "
            f"{cpu:.1f} by CPU seconds ({_verdict(clock >= WANTED[way])}: {WANTED[way]:g})"
        )
    for (ranks, way), own in cells.items():
        over, bound = max(each.peak_bytes - each.kept_bytes for each in own), largest / ranks + SLACK_BYTES
        if way != "peer":
            yield (
                f"{NAMES[way]}, {_ranks(ranks)}: {over / MIB:.0f} MiB over what it fills ({_verdict(over <= bound)}: "
                f"{bound / MIB:.0f}, the largest slice and {SLACK_BYTES / 1e6:.0f} MB)"
            )
        if way == "cached":
            beside = own[0].read_bytes / own[0].base_bytes - 1
            yield (
                f"{NAMES[way]}, {_ranks(ranks)}: reads its {own[0].base_bytes / MIB:.0f} MiB of the base and "
                f"{beside:.2%} beside them ({_verdict(beside <= 0.02)}: 2%)"
            )


def _ratios(own: Sequence[Start], peers: Sequence[Start], name: str) -> list[float]:
    """The peer's over ours, round by round."""
    return [getattr(peer, name) / getattr(each, name) for each, peer in zip(own, peers, strict=True)]


def _median(own: Sequence[Start], name: str) -> float:
    return statistics.median(getattr(each, name) for each in own)


def _ranks(ranks: int) -> str:
    return f"{ranks} ranks" if ranks > 1 else "one process"


def _verdict(holds: bool) -> str:
    return "wanted" if holds else "MISSED, wanted"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LLAMA_700M["num_hidden_layers"], help="blocks of the model")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environment", type=json.loads, default={}, help="of ours beside the user's, as JSON")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with own_stdout(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        parameters = write_random_checkpoint(folder, LLAMA_700M | {"num_hidden_layers": options.layers}, num_shards=4)
        largest = max(segment.num_bytes for segment in read_headers(folder).values())
        ranks = [int(count) for count in options.ranks.split(",")]
        found = results(list(rounds_of(folder, ranks, options.rounds, options.environment)), parameters, largest)
    found.show(out=options.out, as_json=options.json)


if __name__ == "__main__":
    main()
