"""Check the kernels beside library GEMMs and other libraries' sequences, time them, and print Markdown.

    PYTHONPATH=kernels:. python -m bench [dequantize|linear|formats|skinny|elementwise ...] [--shapes ..] [--m ..]
    python -m distlora_kernels.bench ...             the same, where distlora is installed

All shapes and M take some minutes. For the bounds: --shapes llama-70b/o,llama-70b/down --m 16,8192

Exit status: 0; 1 if a variant gives a wrong result; 2 if it cannot run.
"""

import argparse
import contextlib
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

from distlora_kernels.dispatch import interpreted

from . import elementwise, linear, problem, products
from .table import FORWARD, TRAINING, Rates, Row, legend, markdown, measure_rates

SECTIONS = ("dequantize", "linear", "formats", "skinny", "elementwise")
_PACKAGES = ("torch", "triton", "bitsandbytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit status."""
    options = _options(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "error: no CUDA device, and this benchmark times kernels on one. Without a GPU, "
            "`python -m distlora_kernels.offline` compiles the kernels and counts their instructions, and here "
            "`--device cpu --shapes 192x128 --m 16` checks every row and times nothing.",
            file=sys.stderr,
        )
        return 2
    if device.type == "cuda":
        # With its index, as tensors have it: the scratch is kept per device.
        device = torch.device("cuda", torch.cuda.current_device())
        # As in distlora's workers: sums of split GEMMs in fp32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    with interpreted() if _interprets(device) else contextlib.nullcontext():
        rates = measure_rates(device) if device.type == "cuda" and not options.check else None
        rows: list[Row] = []
        began = time.monotonic()
        for row in _rows(options, device, rates):
            rows.append(row)
            figure = row.fault or ("right" if row.seconds is None else f"{row.seconds * 1e6:.1f} us")
            where = f"{row.section}, {row.shape}{f', M={row.num_rows}' if row.num_rows else ''}"
            print(f"{time.monotonic() - began:5.0f} s  {where}, {row.task}: {row.name}: {figure}", file=sys.stderr)
            if options.markdown is not None:
                # After each row, so that an interrupted run keeps its figures.
                options.markdown.write_text(_report(rows, device, rates))
        print(_report(rows, device, rates))
    wrong = [row for row in rows if row.fault]
    if wrong:
        print(f"error: {len(wrong)} of {len(rows)} rows are wrong; see WRONG in the table", file=sys.stderr)
    return 1 if wrong else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; all by default")
    models = sorted({group.name.partition("/")[0] for group in problem.GROUPS})
    parser.add_argument(
        "--shapes",
        type=_argument(problem.groups_named),
        default=problem.GROUPS,
        help=f"{', '.join(models)}, one of their groups (llama-70b/down), or OxI+OxI (linears of one input)",
    )
    parser.add_argument(
        "--m",
        type=_argument(_counts),
        default=problem.ROWS,
        help="numbers of rows (1,16,64,128,256,512,2048,8192)",
    )
    parser.add_argument("--r", type=int, default=16, help="adapter rank (%(default)s)")
    parser.add_argument("--markdown", type=Path, help="also write the report to this file, after each row")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu checks without timing")
    parser.add_argument("--check", action="store_true", help="check on the GPU too without timing, as for a sanitizer")
    options = parser.parse_args(arguments)
    for section in options.sections:
        if section not in SECTIONS:
            parser.error(f"no section {section!r}; there are {', '.join(SECTIONS)}")
    options.sections = options.sections or list(SECTIONS)
    return options


def _argument(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Show the message of a ValueError, which argparse hides."""

    def parsed(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _counts(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"{text!r} is not a list of numbers, 1,16,64")
    return tuple(int(part) for part in text.split(","))


def _interprets(device: torch.device) -> bool:
    """Return whether the kernels run in Triton's interpreter, as in tests; else the CPU runs torch implementations."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _rows(options: argparse.Namespace, device: torch.device, rates: Rates | None) -> Iterator[Row]:
    if "dequantize" in options.sections:
        yield from products.dequantize_rows(options.shapes, device, rates)
    if "linear" in options.sections:
        yield from linear.rows(options.shapes, options.m, options.r, device, rates)
    if "formats" in options.sections:
        yield from linear.rows(options.shapes, options.m, options.r, device, rates, problem.BLOCK_FORMATS)
    if "skinny" in options.sections:
        yield from products.skinny_rows(options.shapes, options.m, options.r, device, rates)
    if "elementwise" in options.sections:
        yield from elementwise.rows(options.shapes, options.m, device, rates)


def _report(rows: Sequence[Row], device: torch.device, rates: Rates | None) -> str:
    lines = [f"{_device_name(device)}, {time.strftime('%Y-%m-%d')}, {_versions()}, commit {_commit()}.", ""]
    if rates is not None:
        lines += [f"Copy bandwidth {rates.bandwidth / 1e12:.2f} TB/s, bf16 GEMM {rates.gemm / 1e12:.0f} TFLOP/s.", ""]
    lines += [legend(device), "", markdown(rows)]
    if rates is not None:
        lines += ["Bounds, for an H100-class GPU:", "", *verdicts(rows)]
    return "\n".join(lines) + "\n"


MOST_OVER_PLAIN = {"8192x8192": 1.16, "8192x28672": 1.12}
"""Most time of a training pass over the plain GEMMs', by O x I: llama-70b/o and llama-70b/down."""


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return a line per bound of the README's table: PASS, FAIL, or `not measured`."""
    lines = []
    large = {  # From 2^26 weights on, which a copy of 1 GiB compares with.
        row.shape: row.floor_share
        for row in rows
        if (row.task, row.name) == (products.TO_BF16, products.OURS)
        and math.prod(map(int, row.shape.split("x"))) >= 2**26
    }
    for shape, share in (large or {"from 2^26 weights on": None}).items():
        lines.append(_verdict(f"dequantization reaches 85 % of the copy bandwidth, {shape}", share, least=0.85))
    for shape, most in MOST_OVER_PLAIN.items():
        seconds = {row.name: row.seconds for row in _linear_rows(rows, shape, 8192, TRAINING)}
        ours, where = seconds.get(linear.SCRATCH), f"{shape}, M = 8192, forward + backward"
        for peer, text, least in (
            (linear.PLAIN, f"at most {most} x the plain GEMMs of forward and dX", 1 / most),
            (linear.PEFT, "at least 1.3 x faster than the PEFT sequence (fp32 adapter)", 1.3),
            (linear.UNSLOTH, "not slower than the Unsloth sequence", 1.0),
        ):
            other = seconds.get(peer)
            speedup = None if ours is None or other is None else other / ours
            lines.append(_verdict(f"{where}: {text}", speedup, least=least))
    shares = [r.floor_share for r in _linear_rows(rows, "8192x8192", 16, FORWARD) if r.name == linear.FUSED_ALONE]
    text = "8192x8192, M = 16: fused reaches 60 % of the quantized weight's bandwidth"
    return [*lines, _verdict(text, next(iter(shares), None), least=0.60)]


def _linear_rows(rows: Sequence[Row], shape: str, num_rows: int, task: str) -> list[Row]:
    """Return the rows of one linear alone."""
    found = [row for row in rows if (row.section, row.num_rows, row.task) == (linear.SECTION, num_rows, task)]
    return [row for row in found if row.shape.split(" ")[-1] == shape and "+" not in row.shape]


def _verdict(text: str, measured: float | None, *, least: float) -> str:
    if measured is None:
        return f"- not measured  {text}"
    return f"- {'PASS' if measured >= least else 'FAIL'}  {text}: {measured:.2f} (at least {least:.2f})"


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU ({platform.machine()})"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB)"


def _versions() -> str:
    versions = []
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    cuda = f"CUDA {torch.version.cuda}, " if torch.version.cuda else ""
    return f"Python {platform.python_version()}, {cuda}{', '.join(versions)}"


def _commit() -> str:
    """Return the commit of this file's checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return finished.stdout.strip() if finished.returncode == 0 else "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
