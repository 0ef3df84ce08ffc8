"""Write safetensors files in any order: lay them out from dtypes and shapes, then fill them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import (
    DTYPE_BYTES,
    INDEX_NAME,
    SINGLE_NAME,
    Segment,
    header_bytes,
    lay_out,
)
from distlora.system import atomic_io

READ_BYTES = 2**22
"""Bytes per read of a file that is copied or hashed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePlan:
    """The layout of the files to write."""

    headers: Mapping[str, bytes]
    """Header bytes of each file."""
    places: Mapping[str, Segment]
    """Position of each tensor; files are named without their folder."""
    copied: Mapping[str, Segment]
    """Source segments of the tensors that are copied."""

    @property
    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        sizes = {file: len(header) for file, header in self.headers.items()}
        for segment in self.places.values():
            sizes[segment.file.name] += segment.num_bytes
        return sizes


Tensors = Mapping[str, tuple[str, Sequence[int]]]
"""Dtype (safetensors' name) and shape of tensors by name."""


def lay_out_files(tables: Mapping[str, Tensors], copied: Mapping[str, Segment]) -> FilePlan:
    """Lay out files from dtype (safetensors' name) and shape of their tensors."""
    headers, places = {}, {}
    for file, tensors in tables.items():
        table = lay_out(tensors)
        headers[file] = header_bytes(table, {"format": "pt"})
        for name, entry in table.items():
            start, end = entry["data_offsets"]
            places[name] = Segment(
                file=Path(file),
                offset=len(headers[file]) + start,
                num_bytes=end - start,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
            )
    return FilePlan(headers=headers, places=places, copied=copied)


class Files:
    """The open files while they are filled, by one process or several."""

    def __init__(self, folder: Path, plan: FilePlan, *, create: bool = True) -> None:
        """Create the files with their headers; with `create=False` open those that another process created."""
        self._plan = plan
        self._open: dict[str, int] = {}
        try:
            for file, size in plan.sizes.items():
                # Opened for writing alone, a network file system's client never writes back bytes of other ranks.
                descriptor = os.open(folder / file, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if create else 0), 0o644)
                self._open[file] = descriptor
                if create:
                    os.truncate(descriptor, size)
                    _write_all(descriptor, plan.headers[file], 0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Write elements of a tensor from index `first` on, in its dtype."""
        place = self._plan.places[name]
        content = values.contiguous().view(-1).view(torch.uint8).numpy().data
        _write_all(self._open[place.file.name], content, place.offset + first * DTYPE_BYTES[place.dtype])

    def sync(self) -> None:
        """Flush the files to the disk."""
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def copy(self, name: str, passed: Callable[[int, str], None] | None = None) -> None:
        """Copy a tensor of the base; call `passed` with each part's bytes."""
        source, place = self._plan.copied[name], self._plan.places[name]
        with source.file.open("rb") as stream:
            stream.seek(source.offset)
            for done in range(0, source.num_bytes, READ_BYTES):
                content = stream.read(min(READ_BYTES, source.num_bytes - done))
                if not content:
                    raise OSError(
                        f"{source.file} ended while it was read, so it was changed since the start; start again once "
                        "nobody writes it"
                    )
                _write_all(self._open[place.file.name], content, place.offset + done)
                if passed is not None:
                    passed(len(content), name)


def write_index(folder: Path, plan: FilePlan) -> None:
    """Write model.safetensors.index.json, unless the one file has the name that needs none."""
    if plan.headers.keys() == {SINGLE_NAME}:
        return
    sizes = {name: segment.num_bytes for name, segment in plan.places.items()}
    total = sum(segment.numel for segment in plan.places.values())
    atomic_io.write_json(
        folder / INDEX_NAME,
        {
            "metadata": {"total_parameters": total, "total_size": sum(sizes.values())},
            "weight_map": {name: plan.places[name].file.name for name in sorted(plan.places)},
        },
    )


def _write_all(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
