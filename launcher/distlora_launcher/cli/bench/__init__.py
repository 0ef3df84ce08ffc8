"""`distlora bench NAME ...`: measure this node beside the plan and beside other libraries.

`step`, `methods` and `layer` run in this process, which imports no torch; the others become a worker process with their
request.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from distlora.bench.requests import CheckpointBench, LoadBench, MemoryBench
from distlora.config import nearest, require
from distlora.system.command_worker import encode_call
from distlora_launcher.compose.checks import check_writable, gpu_count
from distlora_launcher.launch.workers import ENTRY, ON_CPU
from distlora_launcher.terminal.arguments import call_main, read, subject

BENCHES = {
    "step": "a training step beside PEFT + bitsandbytes, Trainer and FSDP2: speed, memory, traffic, losses",
    "load": "loading and quantizing a checkpoint, with and without the cache, beside transformers + bitsandbytes",
    "checkpoint": "a save and a resume beside PEFT, Trainer and accelerate: bytes, seconds",
    "memory": "the memory of a training step by category, planned and measured",
    "layer": "the products, bytes and launches of a decoder layer on a GPU, counted, and its time over bare matmuls",
    "methods": "adapter methods and full fine-tuning on a base and data: losses, memory, time",
}
WORKERS: dict[str, tuple[str, type[LoadBench] | type[CheckpointBench] | type[MemoryBench]]] = {
    "load": ("distlora.bench.load:main", LoadBench),
    "checkpoint": ("distlora.bench.checkpoint:main", CheckpointBench),
    "memory": ("distlora.bench.memory:main", MemoryBench),
}
MODELS = ("10M", "100M", "0.5B", "1.5B")
"""Sizes of the random Llamas of `distlora bench memory`."""


def main(arguments: list[str]) -> int:
    """Run the named benchmark. Returns its exit code, or does not return where it becomes a worker."""
    require(
        arguments[:1] != ["kernels"],
        "`distlora bench kernels` is no longer a command; in a checkout of the repository write python "
        "benchmarks/gpu_kernels.py, or python tests/tools/compiled_kernels.py where there is no GPU",
    )
    name, rest = subject("bench", arguments, BENCHES), arguments[1:]
    if name not in WORKERS:
        return call_main(f"{__name__}.{name}", rest)
    worker, kind = WORKERS[name]
    request = read(kind, f"distlora bench {name}", rest)
    check_counts(request)
    if isinstance(request, LoadBench):
        environment = {name: value for name, value in ON_CPU.items() if name not in os.environ}
        request = dataclasses.replace(request, environment=environment)
    elif isinstance(request, MemoryBench):
        check_gpus(request.ranks)
        for model in request.models:
            near = nearest(model, MODELS)
            require(model in MODELS, f"--models={model} is not a known size{near}; write {', '.join(MODELS)}")
    exec_worker(ENTRY, [encode_call(worker, dataclasses.replace(request, out=output_folder(request.out)))])


def check_counts(request: Any) -> None:
    """Raise UserError for a number below 1."""
    for item in dataclasses.fields(request):
        value, flag = getattr(request, item.name), item.name.replace("_", "-")
        is_good = not isinstance(value, int) or isinstance(value, bool) or value > 0
        require(is_good, f"--{flag}={value} is not a positive number; write --{flag} 1 or more")


def output_folder(out: str | None) -> str | None:
    """Return the absolute folder of --out. UserError if it cannot be written to."""
    if out is None:
        return None
    folder = Path(out).expanduser().absolute()
    check_writable(folder, "--out")
    return str(folder)


def check_gpus(ranks: Sequence[int]) -> None:
    """Raise UserError if a number of ranks exceeds the GPUs of this node."""
    gpus = gpu_count()
    require(
        gpus == 0 or max(ranks) <= gpus,
        f"--ranks={max(ranks)} exceeds the {gpus} GPUs of this node; write --ranks {gpus} or fewer",
    )


def exec_worker(module: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m module arguments`, in the user's environment."""
    sys.stdout.flush()
    # In Triton's interpreter there is nothing to compile or to measure.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment | {"PYTHONSAFEPATH": "1"})
