"""A model on the hub as a folder that can be checked before its weights are downloaded.

The folder has the model's small files, and for each safetensors file a sparse one with the same header and length. So a
model by name is refused by the same checks as a local folder, within seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import glob
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distlora.config import ModelConfig, UserError
from distlora.config.places import is_hub_name
from distlora.system.hub_errors import explained
from distlora_launcher.compose.hub import HubModel, locate

PARALLEL_REQUESTS = 16


@contextlib.contextmanager
def preview(name: str, revision: str | None) -> Iterator[Path]:
    """Yield a folder with the headers and small files of a model; its snapshot if that is downloaded already.

    A UserError raised in the block names the model in place of the folder.
    """
    model = locate(name, revision)
    folder = _preview_folder(name, revision) if model.absent() else model.folder
    try:
        yield folder
    except UserError as error:
        raise UserError(str(error).replace(str(folder), name)) from error


@contextlib.contextmanager
def with_small_files(model: ModelConfig) -> Iterator[ModelConfig]:
    """Yield the model with its path set to a local folder: for a model on the hub, that of `preview`."""
    if not is_hub_name(model.path):
        yield model
        return
    with preview(model.path, model.revision) as folder:
        yield dataclasses.replace(model, path=str(folder), name=model.path)


@functools.cache
def _preview_folder(name: str, revision: str | None) -> Path:
    """Return a folder of links to the downloaded small files and of sparse safetensors files; removed at exit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    model = locate(name, revision)
    folder = Path(tempfile.mkdtemp(prefix="distlora-hub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with explained(name, revision), disable_progress_bars(), ThreadPoolExecutor(PARALLEL_REQUESTS) as threads:
        snapshot = snapshot_download(
            name,
            revision=model.commit,
            cache_dir=model.cache,
            allow_patterns=[glob.escape(file) for file in model.companions],
        )
        for file in model.companions:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).symlink_to(Path(snapshot) / file)
        headers = threads.map(lambda item: _write_header(model, folder, *item), model.weights.items())
        ranges = [(file, first, last) for file, spans in headers for first, last in spans]
        list(threads.map(lambda span: _copy_range(model, folder, *span), ranges))
    return folder


def _write_header(model: HubModel, folder: Path, file: str, size: int) -> tuple[str, list[tuple[int, int]]]:
    """Write a sparse file with the header of one on the hub; return the byte ranges that the checks also read.

    These are the quant_states of a checkpoint that bitsandbytes quantized: a few hundred bytes per weight.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    try:
        metadata = HfApi().parse_safetensors_file_metadata(model.name, file, revision=model.commit)
    except SafetensorsParsingError:
        (folder / file).write_bytes(b"")  # The check of the headers refuses it.
        return file, []
    tensors = {
        name: {"dtype": str(tensor.dtype), "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for name, tensor in metadata.tensors.items()
    }
    data_bytes = max((tensor.data_offsets[1] for tensor in metadata.tensors.values()), default=0)
    fields: dict[str, object] = {"__metadata__": metadata.metadata, **tensors} if metadata.metadata else {**tensors}
    header = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    start = max(size - data_bytes, 8 + len(header))  # Padded as on the hub: ranges are the same in both files.
    with (folder / file).open("wb") as stream:
        stream.write(struct.pack("<Q", start - 8) + header.ljust(start - 8))
        stream.truncate(size)
    spans = [tensor.data_offsets for name, tensor in metadata.tensors.items() if ".quant_state." in name]
    return file, [(start + first, start + end) for first, end in spans]


def _copy_range(model: HubModel, folder: Path, file: str, first: int, end: int) -> None:
    """Copy bytes `first` to `end` (exclusive) of a file on the hub into its sparse file."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    response = get_session().get(
        hf_hub_url(model.name, file, revision=model.commit),
        headers={**build_hf_headers(), "range": f"bytes={first}-{end - 1}"},
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )
    hf_raise_for_status(response)
    content = response.content[first:end] if response.status_code == 200 else response.content
    descriptor = os.open(folder / file, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, first)
    finally:
        os.close(descriptor)
