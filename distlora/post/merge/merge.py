"""Merge a base and an adapter into one model on disk, a few rows at a time.

Besides these rows, memory holds the adapter's factors of one weight and one quantized weight's absmax per 64 weights.
The folder appears completely or not at all.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distlora.checkpoint.files import new_folder
from distlora.output.tables import Table
from distlora.post.base_weights import Base, open_base
from distlora.post.merge.adapter import Adapter, open_adapter
from distlora.post.merge.output_folder import Cursor, Files, check_space, plan_files, write_companions, write_index
from distlora.post.merge.parameters import Parameter, is_changed, parameters_of, pieces
from distlora.post.merge.receipt import Receipt
from distlora.post.merge.request import MergeRequest, Onto, check_mergeable
from distlora.post.merge.rounding_loss import AGAIN, DTYPES, Change, Measure, sum_of
from distlora.post.merge.threads import Clock, Say, each
from distlora.post.trained import Trained
from distlora.run_folder.checkpoint_manifest import sha256
from distlora.system.exit_codes import DONE, run_to_exit_code
from distlora.system.progress import Progress, quieten
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from distlora.weights.reader import Reader


def merge_to(trained: Trained, out: Path, *, onto: Onto, dtype: torch.dtype, say: Say) -> Receipt:
    """Write the folder `out`: base and adapter as one model in `dtype`, with its receipt.

    Raises UserError for what cannot be merged and, before writing, if the disk is too small.
    """
    began, folder = time.monotonic(), trained.base
    check_mergeable(trained, onto)
    base = open_base(trained.spec, trained.initial_adapter_dir)
    with open_adapter(trained, base, onto) as adapter, ThreadPoolExecutor(max_workers=1) as hashing:
        parameters = parameters_of(base, folder, adapter)
        plan = plan_files(parameters, base.headers, dtype)
        check_space(out, sum(plan.sizes.values()))
        clock = Clock("merging", sum(segment.num_bytes for segment in plan.places.values()), say)
        sources = [
            (file.name, hashing.submit(clock.digest, file, counted=False))
            for file in sorted({segment.file for segment in base.headers.values()})
        ]
        with clock.stopping(), new_folder(out) as temporary:
            with Files(temporary, plan) as files:
                filling = Filling(files, base, adapter, onto, dtype, clock)
                changes = each(filling.fill, parameters, clock)
                each(lambda name: files.copy(name, clock.passed), list(plan.copied), clock)
            write_index(temporary, plan, folder)
            write_companions(temporary, trained, base, str(dtype).removeprefix("torch."))
            of_base_files = {name: digest.result() for name, digest in sources}
            found = {p.weight.name: c for p, c in zip(parameters, changes, strict=True) if c is not None}
            receipt = Receipt(
                onto=onto,
                dtype=next(name for name, known in DTYPES.items() if known is dtype),
                date=f"{datetime.date.today():%Y-%m-%d}",
                versions={name: importlib.metadata.version(name) for name in ("distlora", "torch", "transformers")},
                base={"path": str(folder), "fingerprint": base.files.fingerprint, "files": of_base_files},
                adapter=None if adapter is None else _named(adapter, trained),
                weights={name: change.as_json() for name, change in found.items()},
                total=_total(list(found.values())),
                files=_digests(temporary, say),
                seconds=time.monotonic() - began,
            )
            receipt.write(temporary)
    return receipt


@dataclass
class Filling:
    """State that the merging threads share."""

    files: Files
    base: Base
    adapter: Adapter | None
    onto: Onto
    dtype: torch.dtype
    clock: Clock

    def fill(self, parameter: Parameter) -> Change | None:
        """Write one parameter; return its change, None if nothing changed."""
        self.clock.passed(0, parameter.weight.name)  # Stop before the first read if another thread failed.
        cursor = Cursor(self.files, parameter.weight.name, parameter.outputs, self.dtype)
        changed = is_changed(parameter, self.base, self.adapter)
        measure = Measure(parameter.numel, quantized=parameter.path is not None)
        with Reader() as reader:
            for piece in pieces(parameter, self.base, self.adapter, reader, original=self.onto == "original"):
                written = cursor.write(piece.merged)
                if changed:
                    measure.add(piece.base, piece.merged)
                self.clock.passed(written.nbytes, parameter.weight.name)
        cursor.close()
        return measure.result() if changed else None


def _digests(folder: Path, say: Say) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    clock = Clock("SHA-256", sum(path.stat().st_size for path in files), say)
    names = [path.relative_to(folder).as_posix() for path in files]
    return dict(zip(names, each(clock.digest, files, clock), strict=True))


def _total(changes: list[Change]) -> dict[str, Any]:
    total = sum_of(changes).as_json()
    in_nf4 = [change for change in changes if AGAIN in change.lost]
    if in_nf4 and isinstance(total["kept"], dict):
        total["kept"] |= {name: value for name, value in sum_of(in_nf4).kept.items() if name == AGAIN}
    return total


def _named(adapter: Adapter, trained: Trained) -> dict[str, Any]:
    folder = adapter.folder
    return {
        "place": trained.place,
        "folder": str(folder),
        "files": {name: sha256(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME)},
    }


def run(request: MergeRequest) -> Receipt:
    """Merge as requested; print the summary on stdout and progress on stderr."""
    out = Path(request.out)
    receipt = merge_to(
        request.name.read(),
        out,
        onto=request.onto,
        dtype=DTYPES[request.dtype],
        say=Progress(),
    )
    print(summary(receipt, out))
    return receipt


def summary(receipt: Receipt, out: Path) -> str:
    """Return the summary for the terminal."""
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    lines = [f"wrote {out}: {size / 1e6:,.1f} MB in {receipt.dtype}, merge.json says what from, with hashes"]
    if receipt.weights:
        kept = receipt.total["kept"]
        rows = [["stored in", "of the adapter's change kept"]]
        rows += [[name if name != receipt.dtype else f"{name} (this)", f"{kept[name]:.2%}"] for name in kept]
        heading = f"{len(receipt.weights)} tensors changed, ||dW||/||W|| = {receipt.total['ratio']:.3g}"
        lines.append(Table(heading, rows).text())
    return "\n".join(lines)


def main(request: MergeRequest) -> int:
    """Merge; return the exit code."""
    quieten()

    def work() -> int:
        run(request)
        return DONE

    return run_to_exit_code(work)
