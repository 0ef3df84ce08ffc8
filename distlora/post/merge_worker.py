"""Merge a base and an adapter into one model on disk, a few rows at a time, and measure what rounding keeps of dW.

Besides these rows, memory holds the adapter's factors of one weight and one quantized weight's absmax per 64 weights.
The folder appears completely or not at all. With the base W, the sum M = W + dW and its stored form Q, kept = 1 -
||M - Q|| / ||dW||: 1 if all of dW survives, 0 if the error is as large as dW (as for Q = W), negative if it is larger.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlora.loading.tensor_files import new_folder
from distlora.post.merge import (
    SHIPPED,
    MergeRequest,
    Onto,
    Receipt,
    changes,
    check_mergeable,
    check_shipped,
    loss_in_words,
)
from distlora.post.merged_folder import (
    Clock,
    Cursor,
    Outputs,
    Say,
    check_space,
    copy_companions,
    each,
    merged_config,
    plan_files,
)
from distlora.post.merged_parameters import Parameter, is_changed, open_adapter, parameters_of, pieces
from distlora.post.trained import Trained, versions
from distlora.post.weights import open_base
from distlora.results.record import Record
from distlora.system import atomic_io
from distlora.system.atomic_io import sha256
from distlora.system.progress import ProgressLines
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from distlora.weights.reader import Reader
from distlora.weights.writer import Files, write_index
from distlora_kernels import reference
from distlora_kernels.formats import nf4

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Storage dtypes of a merged model."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
AGAIN = "nf4"
"""The name of quantizing the merged model again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeChange:
    """The change of one tensor or several, as sums of squares."""

    base: float
    """||W||^2."""
    delta: float
    """||dW||^2."""
    merged: float
    """||M||^2."""
    lost: Mapping[str, float]
    """||M - Q||^2 by storage form; NF4 only for weights that would be quantized."""

    def as_json(self) -> dict[str, Any]:
        """Return the change for merge.json; `kept` is without forms that overflow, and empty if nothing was added."""
        finite = {name: lost for name, lost in self.lost.items() if self.delta and math.isfinite(lost)}
        change: dict[str, Any] = {
            "ratio": math.sqrt(self.delta / self.base) if self.base else 0.0,
            "kept": {name: 1 - math.sqrt(lost / self.delta) for name, lost in finite.items()},
            "base_norm": math.sqrt(self.base),
        }
        if SHIPPED in self.lost:
            change["error"] = math.sqrt(self.lost[SHIPPED] / self.merged) if self.merged else 0.0
        return change


def _sum_of(changes: Sequence[MergeChange], forms: Sequence[str]) -> MergeChange:
    sums = {name: sum(getattr(change, name) for change in changes) for name in ("base", "delta", "merged")}
    return MergeChange(**sums, lost={form: sum(change.lost[form] for change in changes) for form in forms})


class Measure:
    """Accumulates the change of one tensor over its pieces in flat order.

    ||M - NF4(M)||^2 needs one pass: the codes follow from a block's absmax alone; the second quantization level, which
    needs the mean over all blocks, only scales a block's levels. With a block's absmax a, its double-quantized value
    a', levels l and r = M - l a:

    sum (M - l a')^2 = sum r^2 - 2 (a' - a) sum r l + (a' - a)^2 sum l^2

    Memory holds an absmax and three sums per 64 weights.
    """

    def __init__(self, numel: int, *, quantized: bool) -> None:
        self._numel, self._quantized = numel, quantized
        self._base = self._delta = self._merged = 0.0
        self._lost = {"fp32": 0.0, "bf16": 0.0, "fp16": 0.0}
        self._rest = torch.empty(0)
        """Merged weights behind the last whole group."""
        self._absmax: list[Tensor] = []
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, base: Tensor, merged: Tensor) -> None:
        """Add a chunk of the base and of the merged weights."""
        self._base += _square(base)
        self._delta += _square(merged - base)
        self._merged += _square(merged)
        for name in ("bf16", "fp16"):
            self._lost[name] += _square(merged - merged.to(DTYPES[name]))
        if self._quantized:
            self._rest = torch.cat([self._rest, merged.reshape(-1)])
            whole = len(self._rest) // nf4.GROUP * nf4.GROUP
            if whole:
                self._quantize(self._rest[:whole])
                self._rest = self._rest[whole:].clone()

    def result(self) -> MergeChange:
        """Return the change over all chunks."""
        lost = self._lost | ({AGAIN: self._lost_by_nf4()} if self._quantized else {})
        return MergeChange(base=self._base, delta=self._delta, merged=self._merged, lost=lost)

    def _lost_by_nf4(self) -> float:
        if len(self._rest):
            self._quantize(self._rest)
        absmax, sums = torch.cat(self._absmax), torch.cat(self._sums, dim=1).double()
        num_blocks = -(-self._numel // nf4.BLOCK)
        mean = nf4.absmax_offset(nf4.absmax_group_sums(absmax), num_blocks)
        offset = torch.tensor(mean, dtype=torch.float32)
        stored = nf4.quantize_absmax(absmax, offset, num_blocks)
        change = (reference.dequantize_absmax(*stored, offset) - absmax).double().view(-1)
        change[num_blocks:] = 0.0
        squares, crossed, levels = sums
        return float((squares - 2 * change * crossed + change.square() * levels).sum())

    def _quantize(self, flat: Tensor) -> None:
        codes, absmax = nf4.quantize_blocks(flat)
        size = (len(codes) * nf4.GROUP,)
        padded = flat if len(flat) == size[0] else torch.cat([flat, flat.new_zeros(size[0] - len(flat))])
        levels = nf4.NF4_ABSMAX.dequantize((codes, torch.ones_like(absmax)), shape=size, dtype=torch.float32)
        levels = levels.view(-1, nf4.BLOCK)
        rest = torch.addcmul(padded.view(-1, nf4.BLOCK), levels, absmax.view(-1, 1), value=-1)
        self._absmax.append(absmax)
        self._sums.append(torch.stack([(rest * rest).sum(1), (rest * levels).sum(1), (levels * levels).sum(1)]))


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def merge_to(trained: Trained, out: Path, *, onto: Onto, dtype: torch.dtype | None, say: Say) -> Receipt:
    """Write the folder `out`: base and adapter as one model in `dtype`, with its receipt.

    dtype None: in the low bits that the base is shipped in; what did not change is copied byte for byte.

    Raises UserError for what cannot be merged and, before writing, if the disk is too small.
    """
    began, folder = time.monotonic(), trained.base
    check_mergeable(trained, onto)
    if dtype is None:
        check_shipped(trained, onto)
    base = open_base(trained.spec, trained.initial_adapter_dir)
    with open_adapter(trained, base, onto) as adapter, ThreadPoolExecutor(max_workers=1) as hashing:
        parameters, on_disk = parameters_of(base, adapter), base.files.headers
        if dtype is None:
            parameters, on_disk = [each for each in parameters if is_changed(each, base, adapter)], base.files.stored
        outputs = Outputs(base, dtype)
        plan = plan_files(parameters, on_disk, outputs.tensors)
        check_space(out, sum(plan.sizes.values()))
        clock = Clock("merging", sum(segment.num_bytes for segment in plan.places.values()), say)
        sources = [
            (file.name, hashing.submit(clock.digest, file, counted=False))
            for file in sorted({segment.file for segment in base.files.stored.values()})
        ]

        def fill(parameter: Parameter, files: Files) -> MergeChange | None:
            """Write one parameter; return its change, None if nothing changed."""
            clock.passed(0, parameter.weight.name)  # Stop before the first read if another thread failed.
            changed = is_changed(parameter, base, adapter)
            measure = Measure(parameter.numel, quantized=parameter.path is not None)
            with Reader() as reader, Reader() as of_scales:
                cursor = outputs.cursor(files, parameter, of_scales)
                for before, merged in pieces(parameter, base, adapter, reader, original=onto == "original"):
                    written = cursor.write(merged)
                    if changed:
                        measure.add(before, merged)
                    clock.passed(written, parameter.weight.name)
            cursor.close()
            change = measure.result() if changed else None
            if change is None or dtype is not None:
                return change
            lost = change.lost[DTYPE_NAMES[cursor.dtype]] if isinstance(cursor, Cursor) else cursor.lost
            return replace(change, lost={**change.lost, SHIPPED: lost})

        with clock.stopping(), new_folder(out) as temporary:
            with Files(temporary, plan) as files:
                changes = each(lambda parameter: fill(parameter, files), parameters, clock)
                each(lambda name: files.copy(name, clock.passed), list(plan.copied), clock)
            write_index(temporary, plan)
            copy_companions(temporary, trained, shipped=dtype is None)
            config = merged_config(folder, base, None if dtype is None else str(dtype).removeprefix("torch."))
            atomic_io.write_json(temporary / "config.json", config)
            digests = _digests(temporary, say)
            of_base_files = {name: digest.result() for name, digest in sources}
            by_name = {p.weight.name: c for p, c in zip(parameters, changes, strict=True) if c is not None}
            receipt = Receipt(
                onto=onto,
                dtype=SHIPPED if dtype is None else DTYPE_NAMES[dtype],
                date=f"{datetime.date.today():%Y-%m-%d}",
                versions=versions("distlora", "torch", "transformers"),
                base={"path": str(folder), "fingerprint": base.files.fingerprint, "files": of_base_files},
                adapter=None if adapter is None else {"place": trained.place, **_described(adapter.folder)},
                weights={name: change.as_json() for name, change in by_name.items()},
                total=_total(list(by_name.values())),
                files=digests,
                seconds=time.monotonic() - began,
            )
            receipt.write(temporary)
    return receipt


def _digests(folder: Path, say: Say) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    reading = Clock("SHA-256", sum(path.stat().st_size for path in files), say)
    digests = each(reading.digest, files, reading)
    return {path.relative_to(folder).as_posix(): digest for path, digest in zip(files, digests, strict=True)}


def _total(changes: Sequence[MergeChange]) -> dict[str, Any]:
    shipped = (SHIPPED,) if changes and SHIPPED in changes[0].lost else ()
    total = _sum_of(changes, ("bf16", "fp16", "fp32", *shipped)).as_json()
    in_nf4 = [change for change in changes if AGAIN in change.lost]
    total["kept"] |= _sum_of(in_nf4, (AGAIN,)).as_json()["kept"]
    return total


def _described(folder: Path) -> dict[str, Any]:
    return {"folder": str(folder), "files": {name: sha256(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME)}}


def run(request: MergeRequest) -> None:
    """Merge as requested; print the summary on stdout and progress on stderr."""
    out, dtype = Path(request.out), DTYPES.get(request.dtype or "fp32")
    receipt = merge_to(request.name.read(), out, onto=request.onto, dtype=dtype, say=ProgressLines())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out}: {size / 1e6:,.1f} MB in {receipt.dtype}, merge.json lists its sources and hashes")
    tables = changes(receipt)[: 2 if request.dtype == SHIPPED else 1]
    print(Record(title="", tables=tables, findings=list(loss_in_words(receipt))).text())
