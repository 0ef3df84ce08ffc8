"""How long a training step takes on this machine, beside what the planner says of it at rates that are measured here.

    python -m distlora.bench.step_time [--threads 1] [--repeats 6] [--blocks 2]               (`distlora bench time`)

A random Llama on one process, in fp32 and bf16 on a CPU, bf16 on a GPU. Rates and steps take turns: a product of
matrices of the model's own shape, a copy, a step. On a CPU seconds are this process' own, which other work on the
machine changes less than the clock's; on a GPU a step is also planned from the card's data sheet.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distlora.bench.checkpoints import write_random_checkpoint
from distlora.bench.machine import found_by
from distlora.bench.traffic import our_step
from distlora.config import Config
from distlora.config.file import build
from distlora.config.gpus import card_named
from distlora.model.build import DTYPES
from distlora.parallel import Ranks
from distlora.planner.machine import Found, machine_of
from distlora.planner.model import PlannedModel, model_in
from distlora.planner.speed.timing import StepTime, step_time
from distlora.training.optimizers import build_optimizer
from distlora.training.setup import start_model

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816},
    "cuda": {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336},
}
"""On a GPU those of Llama 3 8B."""
CASES: dict[str, tuple[tuple[str, str, str, int, int], ...]] = {
    # (dtype, base, checkpointing, tokens of a row, rows)
    "cpu": (
        ("fp32", "none", "none", 512, 2),
        ("fp32", "nf4", "selective", 512, 2),
        ("bf16", "none", "none", 512, 2),
        ("bf16", "nf4", "block", 512, 2),
        ("bf16", "nf4", "block", 2048, 1),
    ),
    "cuda": (
        ("bf16", "none", "none", 4096, 2),
        ("bf16", "nf4", "selective", 4096, 2),
        ("bf16", "nf4", "block", 4096, 2),
        ("bf16", "nf4", "block", 512, 1),
    ),
}
RANK, PRODUCTS, COPIED_BYTES = 16, 4, 2**27


@dataclass(frozen=True, slots=True)
class Rates:
    """Operations and bytes a second."""

    products: float
    copies: float


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of this process on a CPU, of the clock on a GPU."""
    if device.type == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def product(config: Config, sizes: dict[str, Any], device: torch.device) -> tuple[Callable[[], object], float]:
    """(some products of a step's rows with a weight of the MLP, their operations)."""
    rows = config.tokens_at_once
    inner, hidden, dtype = sizes["intermediate_size"], sizes["hidden_size"], DTYPES[config.train.dtype]
    left, weight = (torch.randn(n, hidden, device=device, dtype=dtype) for n in (rows, inner))
    out = torch.empty(rows, inner, device=device, dtype=dtype)

    def run() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, weight.T, out=out)

    return run, PRODUCTS * 2.0 * rows * inner * hidden


def copy(device: torch.device) -> tuple[Callable[[], object], float]:
    """(some copies, the bytes that they read and write)."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        for _ in range(PRODUCTS):
            target.copy_(source)

    return run, PRODUCTS * 2.0 * COPIED_BYTES


def measure(config: Config, sizes: dict[str, Any], device: torch.device, repeats: int) -> tuple[Rates, float]:
    """(what the machine does, seconds of a step), medians of runs that take turns."""
    model, backend, _ = start_model(config, Ranks(0, 1, device, None))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    backend.reduce_gradients_of(list(trained.values()), config.parallel.bucket_mb)
    optimizer, ok = build_optimizer(trained, config.optim), torch.ones((), dtype=torch.bool, device=device)

    def step() -> None:
        backend.zero_gradients()
        our_step(model, backend, config, 1)
        optimizer.step(config.optim.lr, ok)

    products, operations = product(config, sizes, device)
    copies, nbytes = copy(device)
    of_products, of_copies, of_step = medians((products, copies, step), device, repeats)
    return Rates(operations / of_products, nbytes / of_copies), of_step


def medians(runs: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each, which take turns, after one turn in which kernels are chosen and memory is taken."""
    for run in runs:
        run()
    turns = [[seconds(run, device) for run in runs] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def planned(config: Config, model: PlannedModel, here: Found, rates: Rates | None) -> StepTime:
    """At these rates, or at those that the card's maker says."""
    if rates is not None:
        products, copies = rates.products / 1e12, rates.copies / 1e9
        given = dataclasses.replace(config.card, tflops=products, memory_gb_per_second=copies)
        config = dataclasses.replace(config, card=given)
    found = step_time(config, model, machine_of(config, found=here))
    assert found is not None, "every rate is given"
    return found


def config_of(folder: Path, case: tuple[str, str, str, int, int]) -> Config:
    dtype, base, checkpointing, length, rows = case
    sections: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": {"path": "none", "sequence_length": length},
        "adapter": {"r": RANK, "target_modules": "all-linear"},
        "quant": {"method": base, "cache": False},
        "train": {"dtype": dtype, "checkpointing": checkpointing, "micro_batch": rows, "global_batch": rows},
        "run_dir": "none",
    }
    return build(Config, sections)


def report(device: torch.device, *, blocks: int, repeats: int) -> Iterator[str]:
    here = found_by(device)
    by_sheet = any(card_named(name) is not None for name, _ in here.devices or ())
    yield (
        f"| {device.type}, {torch.get_num_threads()} threads, torch {torch.__version__} | TFLOP/s | GB/s | measured, s "
        f"| predicted, s | ratio |{' by the data sheet, s | ratio |' if by_sheet else ''}"
    )
    yield "|---" * (8 if by_sheet else 6) + "|"
    heads = {"num_hidden_layers": blocks, "num_attention_heads": 16, "num_key_value_heads": 4}
    sizes = SIZES[device.type] | heads | {"tie_word_embeddings": False, "max_position_embeddings": 8192}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_random_checkpoint(folder, sizes, num_shards=1)
        for case in CASES[device.type]:
            config, model = config_of(folder, case), model_in(folder)
            rates, measured = measure(config, sizes, device, repeats)
            cells = [f"{rates.products / 1e12:,.3g}", f"{rates.copies / 1e9:,.0f}", f"{measured:.3f}"]
            for each in (rates, None) if by_sheet else (rates,):
                predicted = planned(config, model, here, each).seconds
                cells += [f"{predicted:.3f}", f"{predicted / measured:.2f}"]
            dtype, base, checkpointing, length, rows = case
            yield f"| {dtype}, {base}, {checkpointing}, {rows} x {length} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for line in report(device, blocks=options.blocks, repeats=options.repeats):
        print(line, flush=True)


if __name__ == "__main__":
    main()
