"""Loading a checkpoint into 4-bit: ours on two ranks beside transformers + bitsandbytes, in one run.

    python -m distlora.bench.load [--layers N]        (make bench-load)

Each side quantizes the same bf16 folder on the CPU with two threads in all; the page cache is warm for both.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from distlora.bench.checkpoints import LLAMA_700M, write_random_checkpoint
from distlora.bench.memory import PeakMemory
from distlora.config import Config
from distlora.config_file import build

RANKS = 2


@dataclass(frozen=True, slots=True)
class Figures:
    seconds: float
    peak_bytes: int
    """Anonymous memory of one process over that at its start."""
    kept_bytes: int
    """What the process holds of the model when it is done."""


def ours(rank: int, world: int, port: int, folder: Path, backend_name: str, results: Any) -> None:
    """One rank's part of loading `folder`."""
    from distlora.loading.weights import load_base
    from distlora.model import build_model
    from distlora.parallel import Ranks, parallelize

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sections: dict[str, Any] = {"model": {"path": str(folder)}, "data": {"path": "none"}, "run_dir": "none"}
    config = build(Config, sections | {"parallel": {"backend": backend_name}})
    if backend_name == "zero3":  # Imports do not count.
        from distlora.parallel import zero3

        zero3.start_deepspeed(torch.device("cpu"))
    model = build_model(config)
    dist.barrier()
    with PeakMemory() as memory:
        began = time.monotonic()
        backend = parallelize(model, Ranks(rank, world, torch.device("cpu"), dist.group.WORLD), config)
        load_base(model, folder, backend)
        backend.watch_weights(model)
        seconds = time.monotonic() - began
    kept = sum(backend.local_rows(parameter)[0].nbytes for name, parameter in model.named_parameters())
    results.put((rank, Figures(seconds, memory.peak, kept)))
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
        began = time.monotonic()
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16, trust_remote_code=False
        )
        seconds = time.monotonic() - began
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert packed, "the peer did not quantize: is bitsandbytes installed?"
    results.put((0, Figures(seconds, memory.peak, sum(p.nbytes for p in model.parameters()))))


def measure(folder: Path, *, world: int, backend: str = "fsdp2") -> list[Figures]:
    """Our figures, by rank; `backend` is parallel.backend."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return _collect(ours, [(rank, world, port, folder, backend) for rank in range(world)])


def measure_peer(folder: Path) -> Figures:
    return _collect(transformers_and_bitsandbytes, [(folder,)])[0]


def _collect(target: Any, arguments: list[tuple[Any, ...]]) -> list[Figures]:
    """Run `target` once for each of `arguments` in fresh processes; their figures, by rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=target, args=(*values, results)) for values in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{target.__name__} failed with exit code {process.exitcode}; its error is above")
    return [figures for _, figures in sorted(results.get() for _ in processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=LLAMA_700M["num_hidden_layers"], help="decoder blocks of the model"
    )
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        parameters = write_random_checkpoint(folder, LLAMA_700M | {"num_hidden_layers": layers}, num_shards=4)
        print(
            f"Loading {parameters / 1e6:.0f}M parameters, bf16 to NF4 with double quantization, on {RANKS} threads.\n"
        )
        by_rank, peer = measure(folder, world=RANKS), measure_peer(folder)
    mib = 2**20
    print("| | seconds | peak anonymous MiB a process | of the model, MiB a process |\n|--|--|--|--|")
    slowest = max(by_rank, key=lambda figures: figures.seconds)
    largest = max(by_rank, key=lambda figures: figures.peak_bytes)
    mine = Figures(slowest.seconds, largest.peak_bytes, largest.kept_bytes)
    for name, row in ((f"distlora, {RANKS} ranks", mine), ("transformers + bitsandbytes, one process", peer)):
        print(f"| {name} | {row.seconds:.1f} | {row.peak_bytes / mib:.0f} | {row.kept_bytes / mib:.0f} |")
    time_ratio, memory_ratio = peer.seconds / mine.seconds, peer.peak_bytes / mine.peak_bytes
    print(f"\nTheirs takes {time_ratio:.1f} times as long and {memory_ratio:.1f} times the memory a process.")


if __name__ == "__main__":
    main()
