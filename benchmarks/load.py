"""Time loading a random Llama of 0.76 billion bf16 parameters into NF4, beside transformers + bitsandbytes, on the CPU.

    python benchmarks/load.py [--ranks 1,2] [--rounds 3]        five minutes on two idle cores

Measured are a load without the quantized-weights cache, one that fills it and one from it, on each number of ranks.
Each is a fresh process (or one per rank) on two threads in all; the ways take turns, and the page cache is warm. Every
rank of the peer holds the whole model, as its users have it. Bounds are printed with whether they are met.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distlora.architecture.safetensors_headers import read_headers
from distlora.results.record import Table
from distlora.system.progress import say
from distlora_kernels.nf4_cpu import has_bitsandbytes
from distlora_launcher.launch.workers import ON_CPU
from measuring import libraries_print_to_stderr, load_base, measurement_notes, number, numbers, parser_of, show, spread
from support.measured import LLAMA_700M, PeakMemory, run_each, write_random_checkpoint
from support.measured_load import THREADS, Figures, measure

MIB = 2**20
NAMES = {
    "cold": "ours, no cache",
    "filling": "ours, filling the cache",
    "cached": "ours, from the cache",
    "peer": "transformers + bitsandbytes",
}
WANTED = {"cold": 1.5, "filling": 1.5, "cached": 5.0}
"""Required speed-up over the peer in one process with two threads, by way."""
SLACK_BYTES = 64e6
"""Buffers that loading may take, beside the largest tensor's slice and the weights that it fills."""


def transformers_and_bitsandbytes(rank: int, threads: int, folder: Path, results: Any) -> None:
    """Load the whole model by from_pretrained with a BitsAndBytesConfig."""
    import transformers.models.llama.modeling_llama  # noqa: F401  Imports do not count.

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


def total(by_rank: Sequence[Figures]) -> Figures:
    """Return the last rank's seconds, the CPU seconds of all, the most bytes of a rank, of base weights the fewest."""
    return Figures(
        max(rank.seconds for rank in by_rank),
        sum(rank.cpu_seconds for rank in by_rank),
        max(rank.peak_bytes for rank in by_rank),
        max(rank.kept_bytes for rank in by_rank),
        base_bytes=min(rank.base_bytes for rank in by_rank),
        read_bytes=max(rank.read_bytes for rank in by_rank),
    )


Loads = dict[tuple[int, str], list[Figures]]
"""Figures of each round by (ranks, way)."""


def all_loads(folder: Path, ranks: Sequence[int], rounds: int) -> Loads:
    """Measure every way on every number of ranks, in turns."""
    environment = {name: value for name, value in ON_CPU.items() if name not in os.environ}
    loads: Loads = {}
    for turn, world in itertools.product(range(1, rounds + 1), ranks):
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            for way, name in NAMES.items():
                say(f"round {turn} of {rounds}: {name}, {_ranks(world)}")
                if way == "peer":
                    arguments = [(rank, max(1, THREADS // world), folder) for rank in range(world)]
                    by_rank = run_each(transformers_and_bitsandbytes, arguments)
                else:
                    cache = None if way == "cold" else Path(temporary)
                    by_rank = measure(folder, world=world, cache=cache, environment=environment)
                    used = all(each.from_cache == (way == "cached") for each in by_rank)
                    assert used, f"the cache was not used as {way} requires"
                loads.setdefault((world, way), []).append(total(by_rank))
    return loads


def table_and_verdicts(loads: Loads, largest: int) -> tuple[Table, list[str]]:
    """Return the table, and each bound with whether it is met; `largest`: bytes of the largest tensor on disk."""
    peers = loads[min(ranks for ranks, _ in loads), "peer"]
    rows = [["", "ranks", "seconds", "CPU s", "peer / it", "by CPU s", "MiB read", "peak MiB", "kept MiB", "over it"]]
    verdicts = []
    for (ranks, way), turns in loads.items():
        clock = [peer.seconds / each.seconds for each, peer in zip(turns, peers, strict=True)]
        cpu = [peer.cpu_seconds / each.cpu_seconds for each, peer in zip(turns, peers, strict=True)]
        most = max(turns, key=lambda each: each.peak_bytes)
        over = most.peak_bytes - most.kept_bytes
        seconds = (statistics.median(getattr(each, name) for each in turns) for name in ("seconds", "cpu_seconds"))
        line = [NAMES[way], str(ranks), *(f"{each:.2f}" for each in seconds)]
        line += ["", ""] if turns is peers else [spread(clock), spread(cpu)]
        line.append(f"{most.read_bytes / MIB:,.0f}" if most.read_bytes else "")
        rows.append([*line, *(f"{each / MIB:,.0f}" for each in (most.peak_bytes, most.kept_bytes, over))])
        if way == "peer":
            continue
        name, bound = f"{NAMES[way]}, {_ranks(ranks)}", largest / ranks + SLACK_BYTES
        verdicts.append(
            f"{name}: {statistics.median(clock):.1f} times as fast as the peer in one process with two threads, "
            f"{statistics.median(cpu):.1f} by CPU seconds ({_verdict(statistics.median(clock) >= WANTED[way])}: "
            f"{WANTED[way]:g})"
        )
        verdicts.append(
            f"{name}: {over / MIB:.0f} MiB over the weights ({_verdict(over <= bound)}: {bound / MIB:.0f}, the largest "
            f"slice and {SLACK_BYTES / 1e6:.0f} MB)"
        )
        if way == "cached":
            beside = most.read_bytes / most.base_bytes - 1
            verdicts.append(
                f"{name}: reads its {most.base_bytes / MIB:.0f} MiB of the base and {beside:.2%} beside them "
                f"({_verdict(beside <= 0.02)}: 2%)"
            )
    heading = f"{THREADS} threads in all; medians of {len(peers)} rounds; memory of one process"
    return Table(heading, rows[0], rows[1:]), verdicts


def _ranks(ranks: int) -> str:
    return f"{ranks} ranks" if ranks > 1 else "one process"


def _verdict(holds: bool) -> str:
    return "met, bound" if holds else "MISSED, bound"


def main() -> int:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=number, default=14, help="decoder layers of the model (%(default)s)")
    parser.add_argument("--ranks", type=numbers, default=(1, 2), help="numbers of processes (1,2)")
    parser.add_argument("--rounds", type=number, default=3, help="turns of each way to load (%(default)s)")
    options = parser.parse_args()
    with libraries_print_to_stderr(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        parameters = write_random_checkpoint(folder, LLAMA_700M | {"num_hidden_layers": options.layers}, num_shards=4)
        largest = max(segment.num_bytes for segment in read_headers(folder).values())
        table, verdicts = table_and_verdicts(all_loads(folder, options.ranks, options.rounds), largest)
    show(
        f"Loading {parameters / 1e6:.0f}M parameters, bf16 to NF4 with double quantization",
        [table],
        measurement_notes("transformers", "bitsandbytes", threads=THREADS),
        sentences=verdicts,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
