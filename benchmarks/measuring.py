"""Arguments, reports and other libraries' models, for several benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from distlora.results.record import Record, Table
from distlora_kernels import processor

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # For support.measured, which tests share.


def parser_of(module_doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a script's docstring."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=module_doc, formatter_class=form, allow_abbrev=False)


def numbers(text: str) -> tuple[int, ...]:
    """Parse positive numbers separated by commas, as the type of an argument."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers; write for example 1,2")
    return tuple(map(int, text.split(",")))


def number(text: str) -> int:
    """Parse a positive number, as the type of an argument."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def names_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return the type of an argument that takes some of the known names, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return tuple(text.split(","))

    return parse


def show(heading: str, tables: Sequence[Table], notes: str, *, sentences: Sequence[str] = ()) -> None:
    """Print the results as Markdown."""
    print(Record(title=heading, findings=sentences, tables=tables, notes=notes).markdown(), flush=True)


def spread(values: Sequence[float]) -> str:
    """Format the median with minimum and maximum, `1.15 (1.14-1.30)`; one value by itself."""
    middle = f"{statistics.median(values):.2f}"
    return f"{middle} ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else middle


def measurement_notes(*packages: str, threads: int | None = None) -> str:
    """Return the date, device, threads, load, commit, and versions of torch and the installed ones of `packages`.

    `threads` counts those of the measured processes; None for those of this process.
    """
    threads = threads or torch.get_num_threads()
    found = [name for name in ("torch", *packages) if any(importlib.metadata.distributions(name=name))]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)
    used = f"{threads} threads" if threads > 1 else "1 thread"
    load = f"{os.getloadavg()[0]:.1f}"
    return f"{datetime.date.today()}, {_device()}, {os.cpu_count()} cores, {used}, load {load}; {_commit()}; {versions}"


def _device() -> str:
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return f"{found.name} (sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB)"
    flags = sorted({"avx512_bf16", "amx_bf16"} & processor.features())
    return " ".join([processor.name(), *flags, f"(path {processor.path()})"])


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=8", "HEAD"]
    with contextlib.suppress(FileNotFoundError):
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode == 0:
            return f"commit {finished.stdout.strip()}"
    return "commit unknown"


@contextlib.contextmanager
def libraries_print_to_stderr() -> Iterator[None]:
    """Redirect stdout to stderr, in this process and its children: stdout is for figures only."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


Storage = Literal["bf16", "uint8"]
"""How 4-bit weights lie in memory: as bf16, which FSDP2 can shard, or as bitsandbytes' default, uint8."""


def load_base(
    folder: Path | str,
    storage: Storage = "uint8",
    *,
    device: torch.device | None = None,
    auto_class: str = "AutoModelForCausalLM",
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """Load transformers' model of a folder in NF4 with double quantization, onto `device` if it is given."""
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.bfloat16 if storage == "bf16" else torch.uint8,
    )
    return getattr(transformers, auto_class).from_pretrained(
        folder,
        quantization_config=config,
        device_map=None if device is None else {"": device},
        dtype=dtype,
        trust_remote_code=False,
    )


def fsdp2_accelerator() -> Any:
    """Return an Accelerator in bf16 with FSDP2, which it silently replaces by DistributedDataParallel on a CPU."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16", fsdp_plugin=plugin)


def trained(model: Any) -> list[torch.Tensor]:
    """Return the parameters that have gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def describe(model: Any) -> str:
    """Return the model's class and how many of its tensors are sharded."""
    parameters = list(model.parameters())
    sharded = sum(isinstance(parameter, DTensor) for parameter in parameters)
    return f"{type(model).__name__}, {sharded} of {len(parameters)} tensors sharded"
