"""`distlora bench kernels`: how fast the GPU kernels are here; with --offline, what they compile to, on any machine.

This process becomes the one that measures or compiles, which imports torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distlora.config import UserError
from distlora.system.exit_codes import DONE
from distlora_kernels.offline import ARCHS
from distlora_launcher.cli.bench.measuring import become
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.terminal.arguments import Parser

MEASURE, COMPILE = "distlora_kernels.bench", "distlora_kernels.offline"

USAGE = """usage: distlora bench kernels [options of the benchmark]
       distlora bench kernels --offline [--only TEXT] [--arch N ...] [--json]

Measure the GPU kernels on this machine's GPU, beside the plain bf16 product and what other libraries do;
`python -m distlora_kernels.bench --help` shows the options.

  --offline      run nothing: compile every kernel for four generations of GPUs and print what came of it: registers,
                 spills, shared memory, instructions, width of loads and stores. Needs no GPU; takes a minute or
                 two. The exit code is 1 if a kernel breaks a bound that it states
  --only TEXT    kernels with TEXT in their name
  --arch N ...   for these GPUs alone: {archs}
  --json         every figure, for a program to read"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the process that does it. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE.format(archs=", ".join(f"{arch} ({gpu.cards})" for arch, gpu in ARCHS.items())))
        return DONE
    if "--offline" in arguments:
        options = parse(arguments)
        flags = [] if options.only is None else [f"--only={options.only}"]
        flags += ["--json"] if options.json else []
        flags += ["--arch", *map(str, options.arch)] if options.arch else []
        become(COMPILE, flags)
    if gpu_count() == 0:
        raise UserError(
            "this machine shows no GPU to measure the kernels on; `distlora bench kernels --offline` shows what they "
            "compile to, without one"
        )
    become(MEASURE, arguments)


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
