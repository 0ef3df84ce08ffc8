"""A base from what it was merged into and MERGED/residual, bit for bit, every file checked against its SHA-256."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import Segment, read_headers
from distlora.checkpoint.files import new_folder
from distlora.config import UserError
from distlora.post.deltas.factors import AdapterFile
from distlora.post.merge.difference import decode, unpack
from distlora.post.merge.folder import (
    Cursor,
    Files,
    Plan,
    check_space,
)
from distlora.post.merge.receipt import Receipt
from distlora.post.merge.residual import (
    BASE_NAME,
    CONTENT_NAME,
    FOLDER,
    Frame,
    Predicted,
    Table,
)
from distlora.post.merge.threads import Clock, Say, each
from distlora.post.merge.undo import Undo
from distlora.run_folder.checkpoints import sha256
from distlora.weights.peft_folder import CONFIG_NAME
from distlora.weights.reader import TORCH_DTYPES, Reader


def unmerge(merged: Path, out: Path, *, say: Say) -> dict[str, str]:
    """Write the base into the folder `out`; returns the SHA-256 of its files.

    Raises UserError for a merged model without a residual, and where a file does not become what it was.
    """
    folder, receipt = merged / FOLDER, Receipt.read(merged)
    table = Table.read(folder)
    with _naming(merged, receipt), (folder / CONTENT_NAME).open("rb") as content, new_folder(out) as temporary:
        frames = Frames(content.fileno())
        plan = _plan(table, frames, read_headers(merged))
        check_space(out, sum(plan.sizes.values()))
        with Files(temporary, plan) as files:
            _fill(files, plan, merged, table, frames, say)
        for name in sorted(table.files.keys() - plan.headers.keys()):
            kept = folder / BASE_NAME / name
            shutil.copyfile(kept if kept.is_file() else merged / name, temporary / name)
        clock = Clock("SHA-256", sum(path.stat().st_size for path in temporary.iterdir()), say)
        sums = each(lambda name: clock.digest(temporary / name), list(table.files), clock)
        for (name, expected), found in zip(table.files.items(), sums, strict=True):
            if found != expected:
                raise ValueError(f"{name} did not become what it was")
    return table.files


class Frames:
    """Parts of residual.bin, for several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def contents(self, frame: Frame) -> list[bytes]:
        """As they were packed."""
        first, _, *lengths = frame
        found = []
        for length in lengths:
            content = os.pread(self._descriptor, length, first)
            if len(content) < length:
                raise ValueError(f"{CONTENT_NAME} is too short")
            found.append(content)
            first += length
        return found

    def plain(self, frame: Frame) -> Tensor:
        """(n,) uint8, of what has one content."""
        return unpack(self.contents(frame)[0])


def _plan(table: Table, frames: Frames, merged: Mapping[str, Segment]) -> Plan:
    """The base's files, from their headers."""
    headers = {file: frames.plain(frame).numpy().tobytes() for file, frame in table.headers.items()}
    places = {}
    for file, header in headers.items():
        for name, entry in json.loads(header[8:]).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            places[name] = Segment(
                file=Path(file),
                offset=len(header) + start,
                num_bytes=end - start,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
            )
    known = {name for one in table.predicted for name in one.names} | table.whole.keys()
    return Plan(headers=headers, places=places, copied={name: merged[name] for name in places if name not in known})


def _fill(files: Files, plan: Plan, merged: Path, table: Table, frames: Frames, say: Say) -> None:
    written = read_headers(merged)
    adapter = AdapterFile.open(merged / FOLDER) if (merged / FOLDER / CONFIG_NAME).is_file() else None
    clock = Clock("unmerging", sum(segment.num_bytes for segment in plan.places.values()), say)

    def fill(one: Predicted) -> None:
        shapes = {name: plan.places[name].shape for name in one.names}
        dtype = TORCH_DTYPES[plan.places[one.names[0]].dtype]
        cursor, done = Cursor(files, one.names[0], shapes, dtype), 0
        with Reader() as reader:
            undo = _undo(one, adapter, frames, reader)
            for frame in one.frames:
                count = frame[1]
                values = reader.read([written[name] for name in one.names], done, done + count).float()
                before = undo.rows(values.view(-1, one.columns), done // one.columns).view(-1)
                cursor.write(decode(frames.contents(frame), before.to(dtype)))
                done += count
                clock.passed(count * dtype.itemsize, one.names[0])
        cursor.close()

    each(fill, table.predicted, clock)
    for name, parts in table.whole.items():
        done = 0
        for frame in parts:
            content = frames.plain(frame)
            files.write_bytes(name, done, content.numpy().data)
            done += len(content)
            clock.passed(len(content), name)
    each(lambda name: files.copy(name, clock.passed), list(plan.copied), clock)


def _undo(one: Predicted, adapter: AdapterFile | None, frames: Frames, reader: Reader) -> Undo:
    if one.path is None or adapter is None:
        return Undo()
    scale = None if one.scale is None else frames.plain(one.scale).view(torch.float32)
    factors = adapter.factors(one.path, reader, experts=one.experts)
    return Undo(factors=factors, transposed=one.transposed, scale=scale)


@contextlib.contextmanager
def _naming(merged: Path, receipt: Receipt) -> Iterator[None]:
    """Damage shows wherever it is tripped over; what is damaged, the receipt's hashes say."""
    try:
        yield
    except (ValueError, LookupError, RuntimeError, OSError, zlib.error) as error:
        damaged = [name for name, expected in receipt.files.items() if _sum_of(merged / name) != expected]
        if not damaged:
            raise
        raise UserError(
            f"{merged / damaged[0]} is not what was written ({len(damaged)} such files), so the base cannot be had "
            "from it; put a whole copy in its place"
        ) from error


def _sum_of(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None
