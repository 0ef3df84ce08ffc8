"""Measure loading a bf16 checkpoint into NF4, ours with and without the cache, and transformers + bitsandbytes.

Each way loads the same folder on the CPU with two threads in all, in fresh processes that take turns; the page cache is
warm for all. Each rank of the peer holds the whole model, as its users have it.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.safetensors_headers import read_headers
from distlora.bench.host import PeakMemory, free_port, libraries_print_to_stderr, measurement_notes, run_each, set_rank
from distlora.bench.random_inputs import LLAMA_700M, write_random_checkpoint
from distlora.bench.requests import LoadBench
from distlora.config import Config
from distlora.config.file import build
from distlora.output.results import Results, Table, draw_bars, spread
from distlora.system.exit_codes import DONE
from distlora.system.progress import say
from distlora_kernels.nf4_cpu import has_bitsandbytes

THREADS, MIB = 2, 2**20
WANTED = {"cold": 1.5, "filling": 1.5, "cached": 5.0}
"""Required speed-up over the peer in one process with two threads, by way."""
SLACK_BYTES = 64e6
"""Buffers that loading may take, beside the largest tensor's slice and the weights that it fills."""


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
    from distlora.loading.load_base import load_base
    from distlora.model.adapters import adapter_parameters
    from distlora.model.build import build_model
    from distlora.parallel import Ranks, parallelize
    from distlora.parallel.ranks import open_store
    from distlora.training.setup import cache_settings

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
    adapters = sum(held[name] for name in adapter_parameters(model))
    figures = Figures(
        seconds,
        cpu,
        memory.peak,
        sum(held.values()),
        base_bytes=sum(held.values()) - adapters,
        read_bytes=loaded.bytes_read,
        from_cache=loaded.from_cache,
    )
    results.put((rank, figures))
    dist.barrier()
    dist.destroy_process_group()


def transformers_and_bitsandbytes(rank: int, threads: int, folder: Path, results: Any) -> None:
    """Load the whole model by from_pretrained with a BitsAndBytesConfig."""
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
    tensors = [each for p in packed for each in p.quant_state.as_dict().values() if isinstance(each, torch.Tensor)]
    tables = {each.data_ptr(): each.nbytes for each in tensors}  # Weights may share them.
    kept = sum(p.nbytes for p in model.parameters()) + sum(tables.values())
    results.put((rank, Figures(seconds, cpu, memory.peak, kept)))


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One load by one way on all its ranks."""

    round: int
    way: str
    """cold, filling, cached or peer."""
    ranks: int
    total: Figures
    """The last rank's seconds, the CPU seconds of all, the most bytes of a rank (of base weights the fewest)."""


NAMES = {
    "cold": "ours, no cache",
    "filling": "ours, filling the cache",
    "cached": "ours, from the cache",
    "peer": "transformers + bitsandbytes",
}


def rounds_of(folder: Path, ranks: Sequence[int], rounds: int, environment: Mapping[str, str]) -> Iterator[Start]:
    """Yield every way on every number of ranks, in turns; ours with `environment` beside the user's."""
    for number in range(1, rounds + 1):
        for world in ranks:
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                for way, cache in {"cold": None, "filling": Path(temporary), "cached": Path(temporary)}.items():
                    say(f"round {number} of {rounds}: {NAMES[way]}, {_ranks(world)}")
                    by_rank = measure(folder, world=world, cache=cache, environment=environment)
                    assert all(each.from_cache == (way == "cached") for each in by_rank), (
                        f"the cache was not used as {way} requires"
                    )
                    yield start(number, way, by_rank)
            say(f"round {number} of {rounds}: {NAMES['peer']}, {_ranks(world)}")
            arguments = [(rank, max(1, THREADS // world), folder) for rank in range(world)]
            yield start(number, "peer", run_each(transformers_and_bitsandbytes, arguments))


def start(number: int, way: str, by_rank: Sequence[Figures]) -> Start:
    """Combine the figures of all ranks."""
    total = Figures(
        seconds=max(rank.seconds for rank in by_rank),
        cpu_seconds=sum(rank.cpu_seconds for rank in by_rank),
        peak_bytes=max(rank.peak_bytes for rank in by_rank),
        kept_bytes=max(rank.kept_bytes for rank in by_rank),
        base_bytes=min(rank.base_bytes for rank in by_rank),
        read_bytes=max(rank.read_bytes for rank in by_rank),
    )
    return Start(round=number, way=way, ranks=len(by_rank), total=total)


def results(starts: Sequence[Start], parameters: int, largest: int) -> Results:
    """Return the tables and verdicts; `largest` is the size of the largest tensor on disk, in bytes."""
    cells: dict[tuple[int, str], list[Start]] = {}
    for each in starts:
        cells.setdefault((each.ranks, each.way), []).append(each)
    fewest = min(ranks for ranks, _ in cells)
    peers = cells[fewest, "peer"]
    lines = [["", "ranks", "seconds", "CPU s", "peer / it", "by CPU s", "MiB read", "peak MiB", "kept MiB", "over it"]]
    for (ranks, way), loads in cells.items():
        ratios = [_ratios(loads, peers, name) for name in ("seconds", "cpu_seconds")]
        first = max((each.total for each in loads), key=lambda total: total.peak_bytes)
        line = [NAMES[way], str(ranks), *(f"{_median(loads, name):.2f}" for name in ("seconds", "cpu_seconds"))]
        line += ["" if loads is peers else spread(each) for each in ratios]
        line.append(f"{first.read_bytes / MIB:,.0f}" if first.read_bytes else "")
        for nbytes in (first.peak_bytes, first.kept_bytes, first.peak_bytes - first.kept_bytes):
            line.append(f"{nbytes / MIB:,.0f}")
        lines.append(line)
    names = {f"{NAMES[way]}, {ranks}": loads for (ranks, way), loads in cells.items()}
    panels = [
        ("seconds", {name: _median(loads, "seconds") for name, loads in names.items()}),
        ("peak anonymous MiB per process", {name: loads[0].total.peak_bytes / MIB for name, loads in names.items()}),
    ]
    return Results(
        name="load",
        heading=f"Loading {parameters / 1e6:.0f}M parameters, bf16 to NF4 with double quantization",
        notes=measurement_notes("transformers", "bitsandbytes", threads=THREADS),
        tables=[Table(f"{THREADS} threads in all; medians of {starts[-1].round} rounds; memory of one process", lines)],
        rows=[_flat(each, parameters) for each in starts],
        reading=list(reading(cells, peers, largest)),
        draw=lambda path: draw_bars("Loading into 4 bits", panels, path),
    )


def reading(cells: Mapping[tuple[int, str], Sequence[Start]], peers: Sequence[Start], largest: int) -> Iterator[str]:
    """Yield each bound and whether it holds."""
    for (ranks, way), loads in cells.items():
        if way == "peer":
            continue
        clock, cpu = (statistics.median(_ratios(loads, peers, name)) for name in ("seconds", "cpu_seconds"))
        yield (
            f"{NAMES[way]}, {_ranks(ranks)}: {clock:.1f} times as fast as the peer in one process with two threads, "
            f"{cpu:.1f} by CPU seconds ({_verdict(clock >= WANTED[way])}: {WANTED[way]:g})"
        )
    for (ranks, way), loads in cells.items():
        over, bound = (
            max(each.total.peak_bytes - each.total.kept_bytes for each in loads),
            largest / ranks + SLACK_BYTES,
        )
        if way != "peer":
            yield (
                f"{NAMES[way]}, {_ranks(ranks)}: {over / MIB:.0f} MiB over the weights ({_verdict(over <= bound)}: "
                f"{bound / MIB:.0f}, the largest slice and {SLACK_BYTES / 1e6:.0f} MB)"
            )
        if way == "cached":
            total = loads[0].total
            beside = total.read_bytes / total.base_bytes - 1
            yield (
                f"{NAMES[way]}, {_ranks(ranks)}: reads its {total.base_bytes / MIB:.0f} MiB of the base and "
                f"{beside:.2%} beside them ({_verdict(beside <= 0.02)}: 2%)"
            )


def _flat(start: Start, parameters: int) -> dict[str, Any]:
    total = dataclasses.asdict(start.total)
    del total["from_cache"]
    return {"parameters": parameters, "round": start.round, "way": start.way, "ranks": start.ranks} | total


def _ratios(loads: Sequence[Start], peers: Sequence[Start], name: str) -> list[float]:
    """Return the peer's figure over ours, by round."""
    return [getattr(b.total, name) / getattr(a.total, name) for a, b in zip(loads, peers, strict=True)]


def _median(loads: Sequence[Start], name: str) -> float:
    return statistics.median(getattr(each.total, name) for each in loads)


def _ranks(ranks: int) -> str:
    return f"{ranks} ranks" if ranks > 1 else "one process"


def _verdict(holds: bool) -> str:
    return "met, bound" if holds else "MISSED, bound"


def main(request: LoadBench) -> int:
    """Run the worker: measure as the request says, and print."""
    with libraries_print_to_stderr(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        parameters = write_random_checkpoint(folder, LLAMA_700M | {"num_hidden_layers": request.layers}, num_shards=4)
        largest = max(segment.num_bytes for segment in read_headers(folder).values())
        starts = list(rounds_of(folder, request.ranks, request.rounds, request.environment))
        report = results(starts, parameters, largest)
    report.show(out=None if request.out is None else Path(request.out), as_json=request.json)
    return DONE
