"""MERGED/residual: what the base is, given the merged model; `distlora unmerge` puts the two together.

residual.json   each file of the base, and where in residual.bin its parts are
residual.bin    of each tensor what it differs from a prediction by (difference.py), the files' headers, and whole
                the tensors that the merged model has not
adapter_*       the adapter: a prediction takes it away from the merged weights again (undo.py)
base/           of the base's small files those that are others in the merged folder
"""

from __future__ import annotations

import json
import shutil
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import INDEX_NAME, Segment
from distlora.config.json_files import check_shape, read_object
from distlora.post.merge.adapter import Adapter
from distlora.post.merge.difference import encode, pack
from distlora.post.merge.folder import Plan
from distlora.post.merge.parameters import Parameter, Piece
from distlora.post.merge.undo import Undo, dora_scale
from distlora.run_folder.checkpoints import sha256
from distlora.system import atomic_io
from distlora.training.publish import COMPANIONS
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from distlora.weights.reader import Reader

FOLDER, CONTENT_NAME, TABLE_NAME, BASE_NAME = "residual", "residual.bin", "residual.json", "base"
RAW_BYTES = 2**20
"""Of a tensor that is kept whole, deflated at once."""

Frame = list[int]
"""First byte in residual.bin, elements, and the length of the content of each of their bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """A parameter of the base that is predicted from the merged one."""

    names: list[str]
    """Its tensors on the base's disk, in flat order; the merged ones have the same names."""
    columns: int
    path: str | None
    """Of an adapted one: as the adapter's file has it."""
    experts: int | None
    transposed: bool
    scale: Frame | None
    """DoRA's."""
    frames: list[Frame] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """residual.json."""

    files: dict[str, str]
    """The SHA-256 of each file that `distlora unmerge` gives back."""
    headers: dict[str, Frame]
    """The first bytes of each of its weights' files."""
    predicted: list[Predicted]
    whole: dict[str, list[Frame]]
    """Tensors that the merged model has not."""

    @classmethod
    def read(cls, folder: Path) -> Table:
        """Of MERGED/residual. Raises UserError for one that is damaged."""
        values = read_object(folder / TABLE_NAME, _AGAIN)
        check_shape(values, _SHAPE, folder / TABLE_NAME, _AGAIN)
        return cls(**(values | {"predicted": [Predicted(**one) for one in values["predicted"]]}))


_AGAIN = "put a whole copy in its place"
_FRAMES = [[int]]
_SHAPE: dict[str, Any] = {
    "files": {"*": str},
    "headers": {"*": [int]},
    "predicted": [
        {
            "names": [str],
            "columns": int,
            "path": (str, type(None)),
            "experts": (int, type(None)),
            "transposed": bool,
            "scale": ([int], type(None)),
            "frames": _FRAMES,
        }
    ],
    "whole": {"*": _FRAMES},
}


class Keeper:
    """Writes it while the model is merged, several tensors at once."""

    def __init__(self, folder: Path, base: Path, on_disk: Mapping[str, Segment], adapter: Adapter | None) -> None:
        self._folder, self._base, self._on_disk, self._adapter = folder, base, on_disk, adapter
        folder.mkdir()
        self._file: BinaryIO = (folder / CONTENT_NAME).open("wb")
        self._lock = threading.Lock()
        self._predicted: dict[str, Predicted] = {}
        self._whole: dict[str, list[Frame]] = {}

    def write(self, numel: int, contents: Sequence[bytes]) -> Frame:
        """Append a frame."""
        with self._lock:
            frame = [self._file.tell(), numel, *map(len, contents)]
            for content in contents:
                self._file.write(content)
        return frame

    def begin(self, parameter: Parameter, reader: Reader) -> Callable[[Piece, Tensor], None]:
        """What takes the pieces of a parameter, in order, with what was written of each."""
        names = [name for name in parameter.outputs if name in self._on_disk]
        if not names or parameter.weight.packed is not None:
            return lambda piece, written: None
        segments = [self._on_disk[name] for name in names]
        undo, factors = Undo(), None
        if parameter.path is not None and self._adapter is not None:
            plain = self._adapter.file.factors(parameter.path, reader, experts=parameter.experts)
            factors = self._adapter.factors(parameter.path, reader, experts=parameter.experts)
            scale = None if factors.magnitude is None else torch.empty_like(factors.magnitude)
            undo = Undo(factors=plain, transposed=parameter.transposed, scale=scale)
        numel, done = sum(segment.numel for segment in segments), 0
        frames: list[Frame] = []

        def take(piece: Piece, written: Tensor) -> None:
            nonlocal done
            first = done // piece.base.shape[-1]
            count = min(piece.base.numel(), numel - done)
            if count <= 0:  # New tokens' rows.
                return
            if undo.scale is not None and factors is not None:
                undo.scale[first : first + len(piece.base)] = dora_scale(piece.base, first, factors)
            own = reader.read(segments, done, done + count)
            before = undo.rows(written.view_as(piece.base).float(), first).view(-1)[:count]
            frames.append(self.write(count, encode(own, before.to(own.dtype))))
            done += count
            if done == numel:
                self._predicted[parameter.weight.name] = Predicted(
                    names=names,
                    columns=piece.base.shape[-1],
                    path=parameter.path,
                    experts=parameter.experts,
                    transposed=parameter.transposed,
                    scale=None if undo.scale is None else self._scale(undo.scale),
                    frames=frames,
                )

        return take

    def _scale(self, scale: Tensor) -> Frame:
        return self.write(len(scale), [pack(scale.view(torch.uint8))])

    def _keep_whole(self, plan: Plan) -> None:
        """What the merged model has in no form: the parts of packed weights."""
        known = {name for one in self._predicted.values() for name in one.names} | plan.copied.keys()
        for name in sorted(self._on_disk.keys() - known):
            segment = self._on_disk[name]
            self._whole[name] = []
            with segment.file.open("rb") as stream:
                stream.seek(segment.offset)
                for first in range(0, segment.num_bytes, RAW_BYTES):
                    content = bytearray(stream.read(min(RAW_BYTES, segment.num_bytes - first)))
                    packed = pack(torch.frombuffer(content, dtype=torch.uint8))
                    self._whole[name].append(self.write(len(content), [packed]))

    def close(self, merged: Path, plan: Plan, sums: Mapping[str, str]) -> dict[str, Any]:
        """Write the rest; `plan` is that of the merged files, `sums` the SHA-256 of the files of the base's weights.
        Returns what the receipt says."""
        self._keep_whole(plan)
        headers = {}
        for file in sorted({segment.file for segment in self._on_disk.values()}):
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                stream.seek(0)
                content = bytearray(stream.read(8 + length))
            headers[file.name] = self.write(len(content), [pack(torch.frombuffer(content, dtype=torch.uint8))])
        self._file.close()
        files = dict(sums)
        (self._folder / BASE_NAME).mkdir()
        for path in sorted(self._base.iterdir()):
            if path.is_file() and (path.suffix in COMPANIONS or path.name == INDEX_NAME):
                files[path.name] = sha256(path)
                same = merged / path.name
                if not same.is_file() or same.read_bytes() != path.read_bytes():
                    shutil.copy2(path, self._folder / BASE_NAME / path.name)
        if self._adapter is not None:
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                shutil.copyfile(self._adapter.file.read.folder / name, self._folder / name)
        table = Table(files=files, headers=headers, predicted=list(self._predicted.values()), whole=self._whole)
        atomic_io.write_text(self._folder / TABLE_NAME, json.dumps(asdict(table)) + "\n")
        num_bytes = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        of_base = sum(segment.num_bytes for segment in self._on_disk.values())
        return {"bytes": num_bytes, "base_bytes": of_base, "files": files}
