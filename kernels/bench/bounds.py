"""Check the kernels' performance bounds on an H100-class GPU against the rows of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from . import dequantize, linear
from .table import FORWARD, TRAINING, Row

LARGE = 2**26
"""Fewest weights of a dequantization that is compared with a copy of 1 GiB."""
TRAINING_ROWS, DECODING_ROWS = 8192, 16
SHAPES = {(8192, 8192): 1.16, (8192, 28672): 1.12}
"""Most time of a training pass over the plain GEMMs', by (O, I): llama-70b/o and llama-70b/down."""


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return a line per bound: PASS, FAIL, or `not measured`."""
    return [*_dequantization(rows), *_training(rows), *_decoding(rows)]


def _dequantization(rows: Sequence[Row]) -> Iterator[str]:
    text = "dequantization reaches 85 % of the copy bandwidth"
    large = [
        row for row in rows if row.section == dequantize.SECTION and row.name == dequantize.OURS and _is_large(row)
    ]
    shares = [(row.shape, row.floor_share) for row in large if row.floor_share is not None]
    if not shares:
        yield _line(f"{text} (from 2^26 weights on)", None, "")
    for shape, share in shares:
        yield _line(f"{text}, {shape}", share >= 0.85, f"{share:.0%}")


def _is_large(row: Row) -> bool:
    out, features = row.shape.split("x")
    return int(out) * int(features) >= LARGE


def _training(rows: Sequence[Row]) -> Iterator[str]:
    for (out, features), most in SHAPES.items():
        where = f"{out}x{features}, M = {TRAINING_ROWS}, forward + backward"
        seconds = _seconds(rows, (out, features), TRAINING_ROWS, TRAINING)
        ours = seconds.get(linear.SCRATCH)

        for peer, text, limit, holds_below in (
            (linear.PLAIN, f"at most {most} x the plain GEMMs of forward and dX", most, True),
            (linear.PEFT, "at least 1.3 x faster than the PEFT sequence (fp32 adapter)", 1.3, False),
            (linear.UNSLOTH, "not slower than the Unsloth sequence", 1.0, False),
        ):
            other = seconds.get(peer)
            if ours is None or other is None:
                yield _line(f"{where}: {text}", None, "")
                continue
            ratio = ours / other if holds_below else other / ours
            yield _line(f"{where}: {text}", ratio <= limit if holds_below else ratio >= limit, f"{ratio:.2f} x")
        autocast = seconds.get(linear.PEFT_AUTOCAST)
        if ours is not None and autocast is not None:
            yield f"- no bound  {where}: over the PEFT sequence under autocast: {autocast / ours:.2f} x faster"


def _decoding(rows: Sequence[Row]) -> Iterator[str]:
    shape = (8192, 8192)
    text = f"{shape[0]}x{shape[1]}, M = {DECODING_ROWS}: fused reaches 60 % of the quantized weight's bandwidth"
    shares = [
        row.floor_share
        for row in _matching_rows(rows, shape, DECODING_ROWS, FORWARD)
        if row.name == linear.FUSED_ALONE and row.floor_share is not None
    ]
    if not shares:
        yield _line(text, None, "")
    for share in shares[:1]:
        yield _line(text, share >= 0.60, f"{share:.0%}")


def _matching_rows(rows: Sequence[Row], shape: tuple[int, int], num_rows: int, task: str) -> list[Row]:
    suffix = f"{shape[0]}x{shape[1]}"
    return [
        row
        for row in rows
        if row.section == linear.SECTION
        and row.num_rows == num_rows
        and row.task == task
        and row.shape.split(" ")[-1] == suffix
        and "+" not in row.shape
    ]


def _seconds(rows: Sequence[Row], shape: tuple[int, int], num_rows: int, task: str) -> dict[str, float]:
    return {row.name: row.seconds for row in _matching_rows(rows, shape, num_rows, task) if row.seconds is not None}


def _line(text: str, holds: bool | None, figure: str) -> str:
    if holds is None:
        return f"- not measured  {text}"
    return f"- {'PASS' if holds else 'FAIL'}  {text}: {figure}"
