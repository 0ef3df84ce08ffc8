"""Models by name: find them on the Hugging Face hub and download them.

The commit of `model.path=org/name` is resolved once per process. The files that a run reads are downloaded into the
cache of huggingface_hub, whose locks make that once per node; RUN/config.yaml names the folder and the commit. Nothing
is requested while settings are composed or shown. Needs no torch.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import glob
import io
import json
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from distlora.architecture.gguf_folder import described, gguf_file, restore_folder
from distlora.architecture.safetensors_headers import INDEX_NAME, SINGLE_NAME, read_index
from distlora.config import ModelConfig, UserError, require
from distlora.config.base import is_hub_name
from distlora.system.hub_errors import explain_absent_weights, explained, unreachable

LOG_SECONDS = 10.0
"""Interval between lines of progress in a log."""

_COMPANION = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken)|README\.md|(additional_chat_templates/)[^/]+\.jinja")
_NOT_COMPANION = re.compile(r".*\.(bin|h5|msgpack|onnx)\.index\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubModel:
    """A model on the hub at one commit, and its place in the cache."""

    name: str
    commit: str
    weights: Mapping[str, int]
    """Size in bytes of each safetensors file of the model."""
    companions: Mapping[str, int]
    """Size in bytes of the other files that a run reads: configuration, tokenizer, templates, README."""
    cache: Path
    """Folder of huggingface_hub's cache."""

    @property
    def repository(self) -> Path:
        """The repository's folder in the cache."""
        return self.cache / f"models--{self.name.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        """The snapshot's folder, which links to the files of this commit."""
        return self.repository / "snapshots" / self.commit

    def absent(self) -> dict[str, int]:
        """Return the files that are not downloaded yet, with their sizes."""
        files = {**self.companions, **self.weights}
        return {file: size for file, size in files.items() if not (self.folder / file).is_file()}


def is_to_download(model: ModelConfig) -> bool:
    """Return whether the model is on the hub and not fully downloaded."""
    return is_hub_name(model.path) and bool(locate(model.path, model.revision).absent())


def localize(model: ModelConfig) -> ModelConfig:
    """Return the model on this node: a hub model is downloaded, a local folder is returned as it is.

    The path becomes the snapshot's folder, the name its name on the hub, the revision its commit. The path of a GGUF
    file becomes a folder that describes it.
    """
    if not is_hub_name(model.path):
        file = gguf_file(model.path)
        if file is None:
            return model
        return dataclasses.replace(model, path=str(described(file)), gguf_file=str(file.absolute()))
    on_hub = locate(model.path, model.revision)
    download(on_hub)
    return dataclasses.replace(model, path=str(on_hub.folder), name=on_hub.name, revision=on_hub.commit)


def restore(model: ModelConfig) -> None:
    """Download the snapshot that RUN/config.yaml names again if it is missing or incomplete.

    The folder that describes a GGUF file is made again from the file. Does nothing for another local model.
    """
    if model.gguf_file is not None:
        restore_folder(Path(model.path), Path(model.gguf_file))
        return
    folder, name, commit = Path(model.path), model.name, model.revision
    if name is None or commit is None or folder.parts[-2:] != ("snapshots", commit):
        return
    if folder.is_dir() and all(path.exists() for path in folder.iterdir()):  # A link into an emptied cache does not.
        return
    print(f"{folder} is missing or incomplete", flush=True)
    download(locate(name, commit, cache=folder.parents[2]))


@functools.cache
def locate(name: str, revision: str | None, *, cache: Path | None = None) -> HubModel:
    """Return a model at a branch, tag or commit, by the hub, or by the cache if the hub cannot be reached.

    Raises UserError for a model that does not exist, may not be read, or has no safetensors.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download

    cache = (cache or Path(constants.HF_HUB_CACHE)).expanduser().resolve()
    with explained(name, revision):
        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        except Exception as error:
            if not unreachable(error):
                raise
            return _cached(name, revision, cache, error)
        assert info.sha is not None
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        if "config.json" in sizes:  # By the branch's name: that records its commit, by which an offline start finds it.
            hf_hub_download(name, "config.json", revision=revision, cache_dir=cache)
        shards = {SINGLE_NAME}
        if INDEX_NAME in sizes:
            index = hf_hub_download(name, INDEX_NAME, revision=info.sha, cache_dir=cache)
            shards = _shards(Path(index), name)
        elif SINGLE_NAME not in sizes:
            raise explain_absent_weights(name, sizes)
    missing = sorted(shards - set(sizes))
    if missing:
        raise UserError(
            f"{name} has no {missing[0]}, which its {INDEX_NAME} names; set model.revision to a whole commit, or "
            "{model.path} to another model"
        )
    return _model(name, info.sha, sizes, shards, cache)


def _model(name: str, commit: str, sizes: Mapping[str, int], shards: Iterable[str], cache: Path) -> HubModel:
    weights = {file: sizes[file] for file in sorted(shards)}
    companions = {file: size for file, size in sizes.items() if is_companion(file)}
    return HubModel(name=name, commit=commit, weights=weights, companions=companions, cache=cache)


def is_companion(file: str) -> bool:
    """Return whether a run reads this file besides the weights. Code of a model is never run."""
    return _COMPANION.fullmatch(file) is not None and _NOT_COMPANION.fullmatch(file) is None


def download(model: HubModel) -> None:
    """Download the missing files into the cache, with progress. Raises UserError if the disk is too small."""
    from huggingface_hub import snapshot_download

    absent = model.absent()
    if not absent:
        return
    needed = sum(absent.values())
    _check_space(model, needed)
    print(f"downloading {model.name} ({megabytes(needed)}, commit {model.commit[:12]}) to {model.cache}", flush=True)
    started = time.monotonic()
    with explained(model.name, model.commit), _interruptible() as bar:
        try:
            snapshot_download(
                model.name,
                revision=model.commit,
                cache_dir=model.cache,
                allow_patterns=[glob.escape(file) for file in (*model.companions, *model.weights)],
                tqdm_class=bar,
            )
        except OSError as error:
            if error.errno == errno.ENOSPC:
                _check_space(model, needed, is_full=True)
            raise
    seconds = max(time.monotonic() - started, 1e-3)
    print(f"downloaded in {seconds:,.0f} s ({megabytes(needed / seconds)}/s)", flush=True)


def megabytes(num_bytes: float) -> str:
    """Return bytes as MB or GB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _shards(index: Path, name: str) -> set[str]:
    try:
        return set(read_index(index, "set {model.path} to another model").values())
    except UserError as error:
        raise UserError(str(error).replace(str(index), f"{name}: its {INDEX_NAME}")) from error


def _cached(name: str, revision: str | None, cache: Path, reason: Exception) -> HubModel:
    """Return the model from the cache. Raises `reason` if it is not there or incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache, local_files_only=True, allow_patterns=["config.json"]
        )
    except LocalEntryNotFoundError:
        raise reason from None
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    shards = _shards(Path(folder) / INDEX_NAME, name) if INDEX_NAME in sizes else {SINGLE_NAME}
    if not shards <= set(sizes):
        raise reason
    model = _model(name, Path(folder).name, sizes, shards, cache)
    print(f"the hub cannot be reached: using {name} as it is in the cache, commit {model.commit[:12]}", flush=True)
    return model


def _check_space(model: HubModel, needed: int, *, is_full: bool = False) -> None:
    """Raise UserError if the cache's disk has too little space, or is known to be full."""
    existing = next(folder for folder in (model.cache, *model.cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    require(
        free >= needed and not is_full,
        f"{model.name} needs {megabytes(needed)} in {model.cache}, where {megabytes(free)} are free; make room "
        "(`hf cache ls`, `hf cache rm`), or set HF_HOME to a folder on another disk",
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[type[Any]]:
    """Yield a progress bar class that ends the download at Ctrl-C, and writes few lines into a log.

    huggingface_hub's own waits for the files in flight, gigabytes each.
    """
    from huggingface_hub.utils import tqdm

    stopped = threading.Event()

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._is_log = not sys.stderr.isatty()
            for_log = {"mininterval": LOG_SECONDS, "file": io.StringIO()}
            super().__init__(*arguments, **(options | (for_log if self._is_log else {})))

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if not self._is_log:
                super().display(msg, pos)
            elif 0 < self.n < (self.total or 0):
                print(self, flush=True)

        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    def stop(_signum: int, _frame: FrameType | None) -> None:
        if stopped.is_set():
            os._exit(128 + signal.SIGINT)
        stopped.set()
        print("\nstopping the download; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield Bar
    except KeyboardInterrupt:
        print("stopped; the same command continues with the incomplete files", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


PARALLEL_REQUESTS = 16


@contextlib.contextmanager
def with_small_files(model: ModelConfig) -> Iterator[ModelConfig]:
    """Yield the model with its path set to a local folder: for a model on the hub, its snapshot or its small files.

    For a GGUF file it is the folder that describes it.

    A UserError raised in the block names the model in place of the folder.
    """
    if not is_hub_name(model.path):
        yield localize(model)
        return
    found = locate(model.path, model.revision)
    folder = _preview_folder(model.path, model.revision) if found.absent() else found.folder
    try:
        yield dataclasses.replace(model, path=str(folder), name=model.path)
    except UserError as error:
        raise UserError(str(error).replace(str(folder), model.path)) from error


@functools.cache
def _preview_folder(name: str, revision: str | None) -> Path:
    """Return a folder of copies of the downloaded small files and of sparse safetensors files; removed at exit."""
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
            shutil.copyfile(Path(snapshot) / file, folder / file)
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
