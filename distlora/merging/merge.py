"""A base and an adapter as one model on disk: rows in, rows out, no model in memory.

Memory beside a few rows: an adapter's factors of one weight, and of one quantized weight an absmax for every 64 (README
counts it). The folder appears whole or not at all.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distlora.checkpoints.files import appearing
from distlora.checkpoints.folder import sha256
from distlora.deltas.base import Base, open_base
from distlora.initial_adapter import CONFIG_NAME, WEIGHTS_NAME
from distlora.loading.decompose import one_thread
from distlora.loading.reader import Reader
from distlora.loading.segments import fingerprint
from distlora.merging.adapter import Adapter, open_adapter
from distlora.merging.companions import write_companions
from distlora.merging.folder import Cursor, Files, Plan, check_space, plan_files, write_index
from distlora.merging.kept import AGAIN, DTYPES, Change, Measure, sum_of
from distlora.merging.parameters import Parameter, is_changed, parameters_of, pieces
from distlora.merging.receipt import Receipt
from distlora.merging.request import Onto, check_mergeable
from distlora.trained import Trained

Say = Callable[[str], None]
"""Called often; it says something now and then."""
WORKERS = min(4, len(os.sched_getaffinity(0)))
"""Tensors at once; each has a few pieces of 4 MiB in memory."""


def merge_to(trained: Trained, out: Path, *, onto: Onto, dtype: torch.dtype, say: Say) -> Receipt:
    """Write the folder `out`: base and adapter as one model in `dtype`, with its receipt.

    Raises UserError for what cannot be merged, and before anything is written where the disk is too small.
    """
    began, config = time.monotonic(), trained.config
    check_mergeable(trained, onto)
    folder = Path(config.model.path)
    base = open_base(config)
    with open_adapter(trained, base, onto) as adapter, ThreadPoolExecutor(max_workers=1) as hashing:
        parameters = parameters_of(base, folder, adapter)
        plan = plan_files(parameters, base.headers, dtype)
        check_space(out, sum(plan.sizes.values()))
        sources = hashing.submit(_sums, sorted({segment.file for segment in base.headers.values()}))
        with appearing(out) as temporary:
            with Files(temporary, plan) as files:
                clock = Clock(sum(parameter.numel for parameter in parameters), say)
                filling = Filling(files=files, base=base, adapter=adapter, onto=onto, dtype=dtype, clock=clock)
                changes = _fill(filling, parameters, plan)
            write_index(temporary, plan, folder)
            write_companions(temporary, trained, base, str(dtype).removeprefix("torch."))
            say("SHA-256 of what was written")
            receipt = Receipt(
                onto=onto,
                dtype=next(name for name, known in DTYPES.items() if known is dtype),
                date=f"{datetime.date.today():%Y-%m-%d}",
                versions={name: importlib.metadata.version(name) for name in ("distlora", "torch", "transformers")},
                base={"path": str(folder), "fingerprint": fingerprint(folder), "files": sources.result()},
                adapter=None if adapter is None else _named(adapter, trained),
                weights={name: change.as_json() for name, change in changes.items()},
                total=_total(list(changes.values())),
                files=_sums(sorted(path for path in temporary.iterdir())),
                seconds=time.monotonic() - began,
            )
            receipt.write(temporary)
    return receipt


def _fill(filling: Filling, parameters: Sequence[Parameter], plan: Plan) -> dict[str, Change]:
    """Write every tensor, several at once. Returns what was changed, by name."""
    # A thread a tensor, and not threads within one: those wait for each other at every operation.
    with one_thread(), ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            changes = list(pool.map(filling.fill, parameters))
        except BaseException:
            filling.stop()
            raise
    for name in plan.copied:
        filling.files.copy(name)
    named = zip((parameter.weight.name for parameter in parameters), changes, strict=True)
    return {name: change for name, change in named if change is not None}


@dataclass(kw_only=True)
class Filling:
    """What the threads share."""

    files: Files
    base: Base
    adapter: Adapter | None
    onto: Onto
    dtype: torch.dtype
    clock: Clock

    def fill(self, parameter: Parameter) -> Change | None:
        """Write one parameter; returns what was done to it, None for nothing."""
        cursor = Cursor(self.files, parameter, self.dtype)
        changed = is_changed(parameter, self.base, self.adapter)
        measure = Measure(parameter.numel, quantized=parameter.path is not None)
        with Reader() as reader:
            for piece in pieces(parameter, self.base, self.adapter, reader, original=self.onto == "original"):
                cursor.write(piece.merged)
                if changed:
                    measure.add(piece.base, piece.merged)
                self.clock.passed(piece.merged.numel(), parameter.weight.name)
        cursor.close()
        return measure.result() if changed else None

    def stop(self) -> None:
        """Have every thread end at its next piece."""
        self.clock.stopped = True


class Clock:
    """How far it is, and how long it will take."""

    def __init__(self, total: int, say: Say) -> None:
        self._total, self._say, self._done, self._began = total, say, 0, time.monotonic()
        self._lock = threading.Lock()
        self.stopped = False

    def passed(self, numel: int, name: str) -> None:
        if self.stopped:
            raise CancelledError
        with self._lock:
            self._done += numel
            share = self._done / self._total
            left = (time.monotonic() - self._began) * (1 / share - 1)
            of = f"{share:.0%} of {self._total:,} weights"
            self._say(f"merging: {of}, {left // 60:.0f}:{left % 60:02.0f} left, {name}")


def _total(changes: list[Change]) -> dict[str, Any]:
    total = sum_of(changes).as_json()
    in_nf4 = [change for change in changes if AGAIN in change.lost]
    if in_nf4 and isinstance(total["kept"], dict):
        total["kept"][AGAIN] = sum_of(in_nf4).kept.get(AGAIN)
    return total


def _named(adapter: Adapter, trained: Trained) -> dict[str, Any]:
    folder = adapter.folder
    return {
        "place": trained.place,
        "folder": str(folder),
        "files": _sums([folder / CONFIG_NAME, folder / WEIGHTS_NAME]),
    }


def _sums(files: Sequence[Path]) -> dict[str, str]:
    return {path.name: sha256(path) for path in files}
