"""`distlora bench kernels`: how fast the GPU kernels are here; with --offline, what they compile to, on any machine.
`distlora bench methods` is in methods/, `distlora bench comm` in comm.py.

For kernels, load and memory this process becomes the one that measures or compiles, which imports torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from distlora.command_line import DONE
from distlora.config import UserError, nearest
from distlora_kernels.offline import ARCHS
from distlora_launcher.arguments import Parser, numbers
from distlora_launcher.checks import gpu_count
from distlora_launcher.demo.run import made_base

SUBJECTS = ("kernels", "methods", "comm", "load", "memory", "packed")
MEASURE, COMPILE, LOAD = "distlora_kernels.bench", "distlora_kernels.offline", "distlora.bench.load"
MEMORY = "distlora.bench.against_plan"
PACKED = "distlora.bench.packed"
MODELS = ("10M", "100M", "0.5B", "1.5B")
"""Sizes of the random Llamas whose memory is measured."""

USAGE = """usage: distlora bench kernels [options of the benchmark]
       distlora bench kernels --offline [--only TEXT] [--arch N ...] [--json]
       distlora bench methods [--out FOLDER] [--quick] ...
       distlora bench comm [setting=value ...] [--ranks N,N] [--measure] ...
       distlora bench load [--layers N]
       distlora bench memory [--models 10M,100M] [--ranks 1,2] [--json]
       distlora bench packed [--base FOLDER] [--trials 1,2,4,8] [--lengths 16,64] [--ranks 1,2] [--json]

methods: compare adapter methods on the demo's base and data; `distlora bench methods --help` says more.

comm: what a step moves between ranks, beside PEFT with accelerate's FSDP2; `distlora bench comm --help` says more.

load: what a start takes on this machine's CPU, for a random model of 0.76 billion parameters on two ranks: quantizing
its checkpoint, keeping the shards, and reading them again, beside transformers + bitsandbytes.

memory: what a training step has in memory, planned and measured by kind, of random Llamas of 10M, 100M, 0.5B and 1.5B
parameters on so many ranks of this machine, in each mode; from a minute for the smallest on a CPU to half an hour.

packed: a step of so many trials of a sweep on one base, with micro-batches of one row of so many tokens, beside one
trial's and all of them one after the other: time, bytes gathered; on the demo's base, or on the model in FOLDER. A few
minutes.

kernels: measure the GPU kernels on this machine's GPU, beside the plain bf16 product and what other libraries do;
`python -m distlora_kernels.bench --help` shows the options.

  --offline      run nothing: compile every kernel for four generations of GPUs and print what came of it: registers,
                 spills, shared memory, instructions, width of loads and stores. Needs no GPU; takes a minute or
                 two. The exit code is 1 if a kernel breaks a bound that it states
  --only TEXT    kernels with TEXT in their name
  --arch N ...   for these GPUs alone: {archs}
  --json         every figure, for a program to read"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the process that does it. Returns for --help alone."""
    if not arguments or (arguments[0] not in ("methods", "comm") and {"-h", "--help"} & set(arguments)):
        print(usage())
        return DONE
    if arguments[0] == "methods":
        from distlora_launcher.methods import main as compare_methods

        return compare_methods(arguments[1:])
    if arguments[0] == "comm":
        from distlora_launcher.comm import main as compare_traffic

        return compare_traffic(arguments[1:])
    if arguments[0] == "load":
        parser = Parser("distlora bench load", help="distlora bench --help")
        parser.add_argument("--layers", type=int)
        layers = parser.parse_args(arguments[1:]).layers
        if layers is not None and layers < 1:
            parser.error(f"--layers={layers} is no number of blocks; write 1 or more")
        become(LOAD, [] if layers is None else [f"--layers={layers}"])
    if arguments[0] == "memory":
        become(MEMORY, memory_arguments(arguments[1:]))
    if arguments[0] == "packed":
        become(PACKED, packed_arguments(arguments[1:]))
    if arguments[0] != "kernels":
        raise UserError(
            f"distlora bench: there is nothing named {arguments[0]!r} to measure"
            f"{nearest(arguments[0], SUBJECTS)}; write distlora bench followed by {', '.join(SUBJECTS)}"
        )
    if "--offline" in arguments:
        options = parse(arguments[1:])
        flags = [] if options.only is None else [f"--only={options.only}"]
        flags += ["--json"] if options.json else []
        flags += ["--arch", *map(str, options.arch)] if options.arch else []
        become(COMPILE, flags)
    if gpu_count() == 0:
        raise UserError(
            "this machine shows no GPU to measure the kernels on; `distlora bench kernels --offline` shows what they "
            "compile to, without one"
        )
    become(MEASURE, arguments[1:])


def usage() -> str:
    """`distlora bench --help`."""
    return USAGE.format(archs=", ".join(f"{arch} ({gpu.cards})" for arch, gpu in ARCHS.items()))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of --offline. UserError for an unknown flag, with the nearest, and for an arch that is not known."""
    parser = Parser("distlora bench kernels")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--arch", type=int, nargs="+")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    for arch in options.arch or ():
        if arch not in ARCHS:
            parser.error(f"--arch {arch} is not known; known are {', '.join(map(str, ARCHS))}")
    return options


def memory_arguments(arguments: Sequence[str]) -> list[str]:
    """The options of `distlora bench memory`, for the process that measures. UserError for a size or a number of ranks
    that cannot be."""
    parser = Parser("distlora bench memory", help="distlora bench --help")
    parser.add_argument("--models", default="10M,100M")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    for name in options.models.split(","):
        if name not in MODELS:
            parser.error(f"--models={name} is no size that is known{nearest(name, MODELS)}; write {', '.join(MODELS)}")
    ranks, gpus = numbers("--ranks", options.ranks), gpu_count()
    if 0 < gpus < max(ranks):
        parser.error(f"--ranks={max(ranks)} are more than the {gpus} GPUs that this machine shows; write fewer")
    return [
        f"--models={options.models}",
        f"--ranks={','.join(map(str, ranks))}",
        *(["--json"] if options.json else []),
    ]


def packed_arguments(arguments: Sequence[str]) -> list[str]:
    """The options of `distlora bench packed`, for the process that measures. UserError for what is no number, and where
    there is no base."""
    parser = Parser("distlora bench packed", help="distlora bench --help")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--trials", default="1,2,4,8")
    parser.add_argument("--lengths", default="16,64")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    base = made_base() if options.base is None else options.base.expanduser()
    if not (base / "config.json").is_file():
        parser.error(f"--base {base} holds no model (no config.json); leave it out for the demo's")
    words = [str(base)]
    for name in ("trials", "lengths", "ranks"):
        words.append(f"--{name}={','.join(map(str, numbers(f'--{name}', getattr(options, name))))}")
    return [*words, *(["--json"] if options.json else [])]


def become(module: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m module arguments`."""
    sys.stdout.flush()
    # In Triton's interpreter there would be nothing to compile or to measure.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment | {"PYTHONSAFEPATH": "1"})
