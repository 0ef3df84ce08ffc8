"""Find a GGUF file by model.path, and keep a folder in the cache that describes it. Needs no torch.

The folder has config.json, the tokenizer and no weights: gguf.json, which `distlora.derive.gguf` writes, says where in
the GGUF file the parameters of the model lie.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.architecture.low_bit_headers import LowBitSegment, LowBitTensor
from distlora.architecture.safetensors_headers import INDEX_NAME, SINGLE_NAME, Segment
from distlora.architecture.spec import derived, kept_text, versions
from distlora.config import UserError, require
from distlora.config.base import cache_root
from distlora.config.json_files import object_or_empty, read_object
from distlora.system.atomic_io import private_folder
from distlora.system.exit_codes import require_package
from distlora_kernels.format_layouts import FORMAT_LAYOUTS

SUFFIX = ".gguf"
_METADATA_BYTES = 2**24
"""Bytes that hold the metadata and the tokenizer of any file that we know: at most 11 MB."""


def gguf_file(path: str | Path) -> Path | None:
    """Return the GGUF file that a path names: itself, or the only one of a folder without safetensors; else None.

    Raises UserError for a folder with several.
    """
    place = Path(path)
    if place.suffix == SUFFIX and not place.is_dir():
        return place
    files = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else []
    if not files or any(place.glob("*.safetensors")):
        return None
    names = ", ".join(file.name for file in files[:8])
    require(len(files) == 1, f"{place} has {len(files)} GGUF files ({names}); set {{model.path}} to one of them")
    return files[0]


def described(file: Path) -> Path:
    """Return the folder in the cache that describes a GGUF file; make it if there is none.

    Raises UserError for a file that is missing, damaged, or of a model that cannot be read exactly.
    """
    if not file.is_file():
        raise UserError(
            f"{{model.path}}={file} is missing or not a file; set {{model.path}} to a GGUF file, or to a model's folder"
        )
    file = file.absolute()
    key = json.dumps([str(file), file.stat().st_mtime_ns, versions()])
    read_by = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = cache_root() / "gguf" / _content_key(file) / read_by / file.stem
    _describe(file, folder)
    return folder


NOTE_NAME = "gguf.json"


def restore_folder(folder: Path, file: Path) -> None:
    """Make the folder of `described` again if the cache lacks it, cannot be read, or describes a file elsewhere.

    Raises UserError for a file that is missing, or is not the one that the folder was made from.
    """
    place = "set model.gguf_file in the run's config.yaml to its place"
    if not file.is_file():
        raise UserError(f"{file} is missing, the GGUF file that the run trained on; put it back there, or {place}")
    if folder.parts[-3:-2] != (_content_key(file),):
        raise UserError(f"{file} is not the GGUF file that the run trained on, but another; put that back, or {place}")
    is_whole = (folder / "config.json").is_file() and object_or_empty(folder / NOTE_NAME).get("file") == str(file)
    _describe(file, folder, again=not is_whole)


def _content_key(file: Path) -> str:
    """Return a digest of a file's size and its first bytes, which hold its metadata."""
    with file.open("rb") as stream:
        content = stream.read(_METADATA_BYTES)
    return hashlib.sha256(f"{file.stat().st_size} ".encode() + content).hexdigest()[:16]


def _describe(file: Path, folder: Path, *, again: bool = False) -> None:
    note = folder / NOTE_NAME
    if note.is_file() and not again:
        return
    require_package("gguf", f"{{model.path}}={file}")
    try:
        private_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()
        if again:
            note.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}, which is to describe {file}, cannot be written ({error.strerror}); set DISTLORA_CACHE to a "
            "folder that can"
        ) from error
    kept_text(note, lambda: derived(f"reading {file.name}", "--gguf", str(file), str(folder)))


_DENSE = {"F32": 32, "F16": 16, "BF16": 16}
"""Bits of a weight of the types without blocks."""

_SHAPE = {
    "file": str,
    "bytes": int,
    "header_bytes": int,
    "header_sha256": str,
    "orders": [[[int]]],
    "parameters": {
        "*": {"shape": [int], "width": int, "minus_one": bool, "order": (int, type(None)), "sources": [list]},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor(LowBitTensor):
    """A parameter that lies in a GGUF file as blocks of a type, or with its rows in another order.

    `parts` are its tensors there, "0", "1", ..., as bytes; their rows follow each other.
    """

    types: tuple[tuple[str, int, int], ...]
    """(ggml's name of the type, weights of a block, bytes of a block) of each part: ("Q4_K", 256, 144)."""
    width: int
    """Weights of a row; 1 of a vector."""
    runs: tuple[tuple[int, int, int], ...]
    """(row of the parameter, row of the parts, number of rows), ascending."""
    minus_one: bool
    """True if the file holds the weight plus one."""


def format_name(kind: str) -> str:
    """Return what a type of ggml is called as a format: q4_K of Q4_K."""
    return kind[0].lower() + kind[1:]


def header_digest(file: Path, num_bytes: int) -> str:
    """Return the SHA-256 of a file's first bytes."""
    with file.open("rb") as stream:
        return hashlib.sha256(stream.read(num_bytes)).hexdigest()


def read_gguf_note(folder: Path) -> dict[str, Segment] | None:
    """Return the parameters by gguf.json of a folder, those in blocks as `LowBitSegment`s.

    None if it has none, or safetensors of its own. Raises UserError if it is damaged, and if the GGUF file is not the
    one that it describes.
    """
    path = folder / NOTE_NAME
    if not path.is_file() or any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        return None
    remedy = f"remove {folder}, and set {{model.path}} to the GGUF file"
    note = read_object(path, remedy, _SHAPE)
    file = Path(note["file"])
    if not file.is_file():
        raise UserError(f"{file} is missing; {path} refers to its weights. Restore it, or {remedy}")
    if (file.stat().st_size, header_digest(file, note["header_bytes"])) != (note["bytes"], note["header_sha256"]):
        raise UserError(f"{file} changed after {path} was written; {remedy}")
    orders = [_runs(order) for order in note["orders"]]
    return {name: _segment(file, name, entry, orders) for name, entry in note["parameters"].items()}


def _runs(order: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    """Return the runs of an order, which is (first row in the parts, number of rows) of each."""
    counts = [count for _, count in order]
    begins = itertools.accumulate(counts, initial=0)
    return tuple((begin, first, count) for begin, (first, count) in zip(begins, order, strict=False))


def _segment(
    file: Path, name: str, entry: Mapping[str, Any], orders: Sequence[tuple[tuple[int, int, int], ...]]
) -> Segment:
    shape, width, sources = tuple(entry["shape"]), entry["width"], entry["sources"]
    kind, offset, size, block, block_bytes = sources[0]
    if kind in _DENSE and len(sources) == 1 and entry["order"] is None and not entry["minus_one"]:
        return Segment(file, offset, size, kind, shape)
    types = tuple((kind, block, block_bytes) for kind, _, _, block, block_bytes in sources)
    format: str | None = format_name(kind)
    if len(set(types)) > 1 or format not in FORMAT_LAYOUTS or entry["minus_one"]:
        format = None
    return GgufTensor(
        name=name,
        shape=shape,
        codec="gguf",
        parts={str(i): Segment(file, source[1], source[2], "U8", (source[2],)) for i, source in enumerate(sources)},
        block=(1, block),
        bits=_DENSE.get(kind) or 8 * block_bytes // block,
        format=format,
        reason="" if format else f"{name} is stored as {', '.join(dict.fromkeys(kind for kind, _, _ in types))}",
        types=types,
        width=width,
        runs=((0, 0, math.prod(shape) // width),) if entry["order"] is None else orders[entry["order"]],
        minus_one=entry["minus_one"],
    ).segment


def stored_parts(parameters: Mapping[str, Segment]) -> dict[str, Segment]:
    """Return the tensors of the GGUF file by the names of their parameters: bytes where they are in blocks."""
    segments = dict[str, Segment]()
    for name, segment in parameters.items():
        if isinstance(segment, LowBitSegment):
            segments |= {f"{name}#{number}": part for number, part in segment.tensor.parts.items()}
        else:
            segments[name] = segment
    return segments
