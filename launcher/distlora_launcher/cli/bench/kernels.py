"""`distlora bench kernels`: measure the GPU kernels, or with --offline show their compiled code on any machine.

This process becomes the worker, which imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from distlora.config import UserError
from distlora.system.exit_codes import DONE
from distlora_kernels.offline import ARCHS
from distlora_launcher.cli.bench.worker import exec_worker
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.terminal.arguments import Parser

USAGE = """usage: distlora bench kernels [options of the benchmark]
       distlora bench kernels --offline [--only TEXT] [--arch N ...] [--json]

Measure the kernels on this machine's GPU, beside the plain bf16 product and other libraries;
`python -m distlora_kernels.bench --help` shows the options.

  --offline      run nothing: compile every kernel for four generations of GPUs and print registers, spills, shared
                 memory, instructions, width of loads and stores. Needs no GPU; takes a minute or two. The exit code is
                 1 if a kernel breaks one of its bounds
  --only TEXT    kernels with TEXT in their name
  --arch N ...   for these GPUs only: {archs}
  --json         print every figure as JSON"""


def main(arguments: list[str]) -> int:
    """Check the arguments and become the worker. Returns only for --help."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE.format(archs=", ".join(f"{arch} ({gpu.gpus})" for arch, gpu in ARCHS.items())))
        return DONE
    if "--offline" in arguments:
        check_offline(arguments)
        exec_worker("distlora_kernels.offline", [word for word in arguments if word != "--offline"])
    if gpu_count() == 0:
        raise UserError(
            "this machine has no GPU to measure the kernels on; `distlora bench kernels --offline` shows their "
            "compiled code without one"
        )
    exec_worker("distlora_kernels.bench", arguments)


def check_offline(arguments: Sequence[str]) -> None:
    """Raise UserError for an option that `python -m distlora_kernels.offline` does not have, or an unknown --arch."""
    parser = Parser("distlora bench kernels")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--arch", type=int, nargs="+")
    parser.add_argument("--json", action="store_true")
    for arch in parser.parse_args(arguments).arch or ():
        if arch not in ARCHS:
            parser.error(f"--arch {arch} is not known; known are {', '.join(map(str, ARCHS))}")
