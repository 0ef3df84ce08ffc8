"""A model on the hub as a folder that can be checked, before gigabytes are downloaded.

The folder holds the model's small files, and in place of each safetensors file a sparse one of the right length with
the real header. So a model by name is refused by the very checks that refuse a local folder, in seconds.
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

from distlora.architecture.safetensors_headers import LONGEST_HEADER
from distlora.config import Config, UserError
from distlora.config.places import is_hub_name
from distlora.system.hub_errors import explained
from distlora_launcher.compose.hub import HubModel, locate

HEADER_GUESS = 100_000
"""Bytes of a safetensors file that are asked for first; most headers fit (huggingface_hub: 97 % of the top 1000)."""
PARALLEL_REQUESTS = 16


@contextlib.contextmanager
def preview(name: str, revision: str | None) -> Iterator[Path]:
    """A folder that looks like the model to every check that reads headers; the snapshot itself where that is here.

    In messages of UserErrors that the block raises, the folder is called by the model's name.
    """
    model = locate(name, revision)
    folder = _preview_folder(name, revision) if model.absent() else model.folder
    try:
        yield folder
    except UserError as error:
        raise UserError(str(error).replace(str(folder), name)) from error


@contextlib.contextmanager
def with_small_files(config: Config) -> Iterator[Config]:
    """The config with its model as a folder here; of a model on the hub only the small files are downloaded."""
    if not is_hub_name(config.model.path):
        yield config
        return
    with preview(config.model.path, config.model.revision) as folder:
        model = dataclasses.replace(config.model, path=str(folder), name=config.model.path)
        yield dataclasses.replace(config, model=model)


@functools.cache
def _preview_folder(name: str, revision: str | None) -> Path:
    """Links to the small files, which are downloaded, and sparse safetensors files with real headers.

    The folder is removed when the process ends.
    """
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
        written = threads.map(lambda item: _write_header(model, folder, *item), model.weights.items())
        ranges = [(file, first, last) for file, spans in written for first, last in spans]
        for _ in threads.map(lambda span: _copy_range(model, folder, *span), ranges):
            pass
    return folder


def _write_header(model: HubModel, folder: Path, file: str, size: int) -> tuple[str, list[tuple[int, int]]]:
    """Write a sparse file with the header of one on the hub; returns the byte ranges that checks read beside it.

    Those are the quant_states of a checkpoint that bitsandbytes quantized: a few hundred bytes a weight.
    """
    data = fetch_range(model, file, 0, min(HEADER_GUESS, size) - 1) if size else b""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    end = min(8 + length, size)
    if len(data) < end and length <= LONGEST_HEADER:
        data += fetch_range(model, file, len(data), end - 1)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    with (folder / file).open("wb") as stream:
        stream.write(data[:end] if length <= LONGEST_HEADER else data)
        stream.truncate(size)
    try:
        header = json.loads(data[8:end])
        offsets = [entry["data_offsets"] for name, entry in header.items() if ".quant_state." in name]
        return file, [(end + first, end + last) for first, last in offsets]
    except (ValueError, KeyError, TypeError, AttributeError):
        return file, []  # Damaged: the check of the headers says how.


def _copy_range(model: HubModel, folder: Path, file: str, first: int, end: int) -> None:
    descriptor = os.open(folder / file, os.O_WRONLY)
    try:
        os.pwrite(descriptor, fetch_range(model, file, first, end - 1), first)
    finally:
        os.close(descriptor)


def fetch_range(model: HubModel, file: str, first: int, last: int) -> bytes:
    """Bytes `first` to `last`, inclusive, of a file on the hub."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    response = get_session().get(
        hf_hub_url(model.name, file, revision=model.commit),
        headers={**build_hf_headers(), "range": f"bytes={first}-{last}"},
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )
    hf_raise_for_status(response)
    content = response.content
    return content[first : last + 1] if response.status_code == 200 else content  # 200: the whole file, unasked.
