"""Write the files of a merged checkpoint: lay them out from headers, then fill them in any order.

Files and tensor names are the base's. Parameters may change dtype and, with new tokens or out of NF4, shape. Tensors
that are not parameters are copied unchanged. Config, tokenizer and chat template are written beside the weights.

In the low bits that the base is shipped in, only changed tensors are quantized again: all other tensors, zero points
and global scales keep their bytes. Changed tensors that the base stores in 16 or 32 bits are written in that dtype.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from distlora.architecture.config_checks import MODELOPT_CONFIG, read_config
from distlora.architecture.low_bit_headers import LowBitSegment, LowBitTensor
from distlora.architecture.safetensors_headers import SINGLE_NAME, Segment
from distlora.architecture.tokens import load_tokenizer, tokenizer_files
from distlora.config import UserError
from distlora.config.json_files import object_or_empty, read_object
from distlora.data.chat_template import ChatTemplate
from distlora.post.merged_parameters import Parameter
from distlora.post.trained import Trained
from distlora.post.weights import OpenBase
from distlora.run_folder.layout import DATA_NAME, TEMPLATE_NAME, read_record
from distlora.system import atomic_io, numbers
from distlora.training.publish import companions_of
from distlora.weights.low_bit.codecs import MatrixRows
from distlora.weights.low_bit.requantize import requantize
from distlora.weights.reader import DTYPE_NAMES, TORCH_DTYPES, Reader
from distlora.weights.writer import READ_BYTES, FilePlan, Files, Tensors, lay_out_files
from distlora_kernels.dispatch import threads_of_one

Say = Callable[[str], None]
"""Takes a progress line; prints one now and then."""
Item = TypeVar("Item")
Found = TypeVar("Found")


class Clock:
    """Progress and remaining time of work by several threads."""

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say, self._done, self._began = what, total, say, 0, time.monotonic()
        self._lock = threading.Lock()
        self.stopped = False

    def passed(self, num_bytes: int, name: str) -> None:
        """Count bytes as done. Raises CancelledError after another thread failed."""
        if self.stopped:
            raise CancelledError
        if not num_bytes:
            return
        with self._lock:
            self._done += num_bytes
            share = self._done / self._total
            passed = time.monotonic() - self._began
            left = passed * (1 / share - 1)
            # The first pieces wait for threads and disks, so they predict nothing.
            how_long = f", {left // 60:.0f}:{left % 60:02.0f} left" if passed > 2 else ""
            self._say(f"{self._what}: {share:.0%} of {numbers.size(self._total)}{how_long}, {name}")

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Stop the other threads at their next piece if the block raises, Ctrl-C included."""
        try:
            yield
        except BaseException:
            self.stopped = True
            raise

    def digest(self, file: Path, *, counted: bool = True) -> str:
        """Return the SHA-256 of a file in hexadecimal. With `counted`, its bytes count as progress."""
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while content := stream.read(READ_BYTES):
                digest.update(content)
                self.passed(len(content) if counted else 0, file.name)
        return digest.hexdigest()


def each(work: Callable[[Item], Found], items: Sequence[Item], clock: Clock) -> list[Found]:
    """Return `work` of every item, in order; an exception stops the other threads at their next piece.

    There is one thread per tensor: threads within a tensor would wait for each other at every operation, and the bits
    would depend on their number.
    """
    # Each thread holds a few pieces of 4 MiB in memory.
    with threads_of_one(min(4, len(os.sched_getaffinity(0)))) as pool, clock.stopping():
        return list(pool.map(work, items))


def plan_files(
    parameters: Sequence[Parameter], on_disk: Mapping[str, Segment], tensors: Callable[[Parameter], Tensors]
) -> FilePlan:
    """Lay out the merged files from the base's headers (`on_disk`) and the tensors to write of each parameter."""
    written, home = dict[str, tuple[str, Sequence[int]]](), dict[str, str]()
    for parameter in parameters:
        for name, tensor in tensors(parameter).items():
            written[name] = tensor
            # A tensor that the base lacks goes into the file of its source.
            home[name] = file_of(on_disk.get(name, parameter.weight.source.segments[0]))
    copied = {name: segment for name, segment in on_disk.items() if name not in written}
    tables: dict[str, dict[str, tuple[str, Sequence[int]]]] = {file_of(s): {} for s in on_disk.values()}
    for name, tensor in written.items():
        tables[home[name]][name] = tensor
    for name, segment in copied.items():
        tables[file_of(segment)][name] = (segment.dtype, segment.shape)
    return lay_out_files(tables, copied)


def file_of(segment: Segment) -> str:
    """Return the name of the file that a tensor's goes into; one for all of a GGUF file."""
    return SINGLE_NAME if segment.file.suffix == ".gguf" else segment.file.name


class Cursor:
    """Writes the values of a parameter, in flat order, to its output tensors."""

    def __init__(self, files: Files, name: str, outputs: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._files, self._name = files, name
        self._left = [(output, torch.Size(shape).numel()) for output, shape in [*outputs.items()][::-1]]
        self._first = 0

    def write(self, values: Tensor) -> int:
        """Round and write values; return the bytes written. Raises UserError for values beyond the dtype."""
        flat = values.reshape(-1)
        rounded = flat.to(self.dtype)
        num_bytes = rounded.nbytes
        if self.dtype is torch.float16 and not bool(torch.isfinite(rounded).all()):
            largest = float(flat.abs().max())
            raise UserError(
                f"--dtype=fp16 ends at 65,504, and {self._name} has {largest:,.0f}; write --dtype bf16 or fp32"
            )
        while len(rounded):
            name, numel = self._left[-1]
            own = rounded[: numel - self._first]
            self._files.write(name, self._first, own)
            self._first, rounded = self._first + len(own), rounded[len(own) :]
            if self._first == numel:
                self._left.pop()
                self._first = 0
        return num_bytes

    def close(self) -> None:
        """Check that every tensor is written whole."""
        assert not self._left, f"{self._name} ended early"


def check_space(folder: Path, num_bytes: int, what: str = "the merged model") -> None:
    """Raise UserError if the disk under `folder` has less free space than the `num_bytes` of `what`."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise UserError(
            f"{folder}: {what} takes {num_bytes / 1e9:,.1f} GB, and the disk there has {free / 1e9:,.1f} GB "
            "free; name another folder with --out, write --dtype bf16, or free some space"
        )


def copy_companions(folder: Path, trained: Trained, *, shipped: bool = False) -> None:
    """Write tokenizer, generation config and chat template: all companions except config.json.

    `shipped`: the weights stay in the base's low bits, which ModelOpt describes in a file of its own.
    """
    if shipped and (described := trained.base / MODELOPT_CONFIG).is_file():
        shutil.copy2(described, folder / MODELOPT_CONFIG)
    for path in companions_of(trained.base):
        if path.name != "config.json":
            shutil.copy2(path, folder / path.name)
    for name, content in tokenizer_files(trained.spec).items():
        (folder / name).write_bytes(content)
    # The chat template of the training data, if it differs from the base's.
    template: str | None = None
    if trained.foreign and trained.weights is not None:
        beside = trained.weights / TEMPLATE_NAME
        template = beside.read_text(encoding="utf-8") if beside.is_file() else None
    elif trained.run_dir is not None and trained.weights is not None:
        template = read_record(trained.run_dir / DATA_NAME).get("chat_template")
    if template is not None:
        atomic_io.write_text(folder / TEMPLATE_NAME, template)
    write_stops(folder, trained)


def write_stops(folder: Path, trained: Trained) -> None:
    """Add the tokens that end the run's answers to generation_config.json, which transformers' generate reads."""
    model, data, place = trained.spec.model, trained.data, folder / "generation_config.json"
    if data is None or trained.foreign or not (model.changes_tokenizer or data.eot_tokens or data.template):
        return
    tokenizer = load_tokenizer(Path(model.path), model.new_tokens, model.special_tokens)
    stops = {tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, data.eot_tokens)} - {None}
    record = object_or_empty(trained.run_dir / DATA_NAME) if trained.run_dir is not None else {}
    if record.get("chats"):
        stops.update(ChatTemplate(tokenizer, model.path, source=record["chat_template"]).end_of_turn())
    config = read_config(trained.base)
    settings = read_object(place, "mend the base's file, or remove it") if place.is_file() else dict[str, Any]()
    if not settings:
        settings |= {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    before = settings.get("eos_token_id")
    known = before if isinstance(before, list) else [] if before is None else [before]
    if not stops <= set(known):
        atomic_io.write_json(place, settings | {"eos_token_id": [*known, *sorted(stops - set(known))]})


def merged_config(folder: Path, base: OpenBase, dtype: str | None) -> dict[str, Any]:
    """Return config.json of a merged model from that of its base's folder.

    It has the new dtype and no quantization, or both as they are if `dtype` is None; the grown vocabulary, and an
    untied head if needed.
    """
    # Without the settings that read_config adds of a file that is copied.
    model, config = base.model, read_config(folder) if dtype is not None else read_object(folder / "config.json", "")
    text = config
    if (key := model.architecture.text_config) is not None:
        text = config[key] = dict(config[key])
    for settings in (config, text) if dtype is not None else ():
        settings.pop("quantization_config", None)
        keys = [key for key in ("dtype", "torch_dtype") if key in settings]  # transformers reads both.
        for key in keys or (["dtype"] if settings is config else []):
            settings[key] = dtype
    if model.vocabulary.has_grown:
        text["vocab_size"] = model.vocabulary.rows
    if model.tied_in_base and not model.tied:
        config["tie_word_embeddings"] = False
        if "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = False
    return config


BAND = 2**20
"""Weights that are quantized at once, about: 4 MiB in fp32. A block and a transposed matrix are never divided."""


class Outputs:
    """The tensors that are written of parameters: in one dtype, or (None) in that of the base, and its low bits."""

    def __init__(self, base: OpenBase, dtype: torch.dtype | None) -> None:
        self._dtype, self._names = dtype, {segment: name for name, segment in base.files.stored.items()}

    def tensors(self, parameter: Parameter) -> Tensors:
        """Return the tensors to write. Raises UserError for a matrix in low bits that gets new rows."""
        low_bit = self._low_bit(parameter)
        if not low_bit:
            return {name: (DTYPE_NAMES[self._dense(parameter)], shape) for name, shape in parameter.outputs.items()}
        if list(parameter.outputs.values()) != [tensor.shape for tensor in low_bit]:
            raise UserError(f"--dtype=shipped: {parameter.weight.name} is in low bits and grows; leave --dtype out")
        parts = [tensor.parts[part] for tensor in low_bit for part in ("codes", "scales")]
        return {self._names[part]: (part.dtype, part.shape) for part in parts}

    def cursor(self, files: Files, parameter: Parameter, reader: Reader) -> Cursor | LowBitCursor:
        """Return what writes a parameter; `reader` reads shipped scales."""
        if low_bit := self._low_bit(parameter):
            return LowBitCursor(files, low_bit, self._names, reader)
        return Cursor(files, parameter.weight.name, parameter.outputs, self._dense(parameter))

    def _low_bit(self, parameter: Parameter) -> list[LowBitTensor]:
        segments = parameter.weight.source.segments if self._dtype is None else ()
        return [segment.tensor for segment in segments if isinstance(segment, LowBitSegment)]

    def _dense(self, parameter: Parameter) -> torch.dtype:
        return self._dtype or TORCH_DTYPES[parameter.weight.source.segments[0].dtype]


class LowBitCursor:
    """Quantizes the values of a parameter, in flat order, and writes its codes and scales."""

    def __init__(
        self, files: Files, tensors: Sequence[LowBitTensor], names: Mapping[Segment, str], reader: Reader
    ) -> None:
        self.lost = 0.0
        """||M - Q||^2 of what is written."""
        self._files, self._names = files, names
        self._bands = deque(band for tensor in tensors for band in _bands(tensor, reader))
        self._values = list[Tensor]()
        """Flat values of the next bands."""

    def write(self, values: Tensor) -> int:
        """Quantize and write values; return the bytes written."""
        self._values.append(values.reshape(-1))
        written = 0
        while self._bands:
            at = self._bands[0]
            numel = at.num_rows * at.tensor.stored_shape[-1]
            if sum(map(len, self._values)) < numel:
                break
            flat = torch.cat(self._values)
            rows, self._values = flat[:numel].view(-1, at.tensor.shape[-1]), [flat[numel:]]
            parts, lost = requantize(at, rows.T.contiguous() if at.tensor.transposed else rows)
            for part, stored in parts.items():
                self._files.write(self._names[at.tensor.parts[part]], at.span(part)[0], stored)
                written += stored.nbytes
            self.lost += lost
            self._bands.popleft()
        return written

    def close(self) -> None:
        """Check that every tensor is written whole."""
        assert not self._bands, "a parameter ended early"


def _bands(tensor: LowBitTensor, reader: Reader) -> Iterator[MatrixRows]:
    """Yield stored rows in flat order: rows of whole blocks; transposed matrices whole."""
    rows, width = tensor.stored_shape[-2:]
    height = tensor.block[0]
    step = rows if tensor.transposed else max(BAND // width // height, 1) * height
    for matrix in range(tensor.shape[0] if len(tensor.shape) == 3 else 1):
        for first in range(0, rows, step):
            yield MatrixRows(tensor, reader, matrix, first, min(first + step, rows))
