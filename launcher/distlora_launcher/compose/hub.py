"""Models by name: find them on the Hugging Face hub and download them.

The commit of `model.path=org/name` is resolved once per process. The files that a run reads are downloaded into the
cache of huggingface_hub, whose locks make that once per node; RUN/config.yaml names the folder and the commit. Nothing
is requested while settings are composed or shown. Needs no torch.
"""

import atexit
import contextlib
import dataclasses
import functools
import glob
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from distlora.architecture.gguf_folder import described, gguf_file, restore_folder
from distlora.architecture.safetensors_headers import INDEX_NAME, LONGEST_HEADER, SINGLE_NAME, read_header, read_index
from distlora.config import ModelConfig, UserError, require
from distlora.config.base import is_hub_name
from distlora.system.hub_errors import explained
from distlora.system.numbers import size
from distlora.system.progress import still

_SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken", "README.md")
"""Endings of files that a run reads besides the weights. Code of a model is never run."""
_UNREAD = ("[!a]*/*", "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json", "*.onnx.index.json")
"""Patterns of files that no run reads: of the folders, it reads additional_chat_templates alone."""
FIRST_BYTES = 100_000
"""Bytes of a safetensors file that are read first: most headers are shorter."""


class HubModel(NamedTuple):
    """A model on the hub at one commit, whose small files are in the cache."""

    name: str
    folder: Path
    """The snapshot's folder, which links to the files of this commit and is called after it."""
    weights: tuple[str, ...]
    """Its safetensors files."""

    def absent(self) -> list[str]:
        """Return the weights that are not downloaded yet."""
        return [file for file in self.weights if not (self.folder / file).is_file()]


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
    snapshot = locate(model.path, model.revision)
    download(snapshot)
    return dataclasses.replace(model, path=str(snapshot.folder), name=snapshot.name, revision=snapshot.folder.name)


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
    # A link into an emptied cache does not exist; `distlora plan` brings small files alone.
    if folder.is_dir() and all(path.exists() for path in folder.iterdir()) and not _model_in(folder, name).absent():
        return
    print(f"{folder} is missing or incomplete", flush=True)
    download(locate(name, commit, cache=folder.parents[2]))


@functools.cache
def locate(name: str, revision: str | None, *, cache: Path | None = None) -> HubModel:
    """Return a model at a branch, tag or commit, by the hub, or by the cache if the hub cannot be reached.

    Downloads its small files. Raises UserError for a model that does not exist or may not be read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    patterns = [f"*{ending}" for ending in _SMALL]
    with explained(name, revision), disable_progress_bars():
        folder = Path(
            snapshot_download(
                name, revision=revision, cache_dir=cache, allow_patterns=patterns, ignore_patterns=list(_UNREAD)
            )
        )
    return _model_in(folder, name)


def _model_in(folder: Path, name: str) -> HubModel:
    """Return a model by its snapshot's folder."""
    if not (index := folder / INDEX_NAME).is_file():
        return HubModel(name, folder, (SINGLE_NAME,))
    with _named(index, f"{name}: its {INDEX_NAME}"):
        return HubModel(name, folder, tuple(sorted({*read_index(index, "set {model.path} to another model").values()})))


def _sizes(model: HubModel, files: list[str]) -> dict[str, int]:
    """Return the size in bytes of files on the hub. Raises UserError for one that is not there."""
    from huggingface_hub import HfApi, RepoFile, constants

    commit = model.folder.name
    with explained(model.name, commit):
        paths = HfApi().get_paths_info(model.name, files, revision=commit)
        sizes = {file.path: file.size for file in paths if isinstance(file, RepoFile)}
        if missing := sorted(set(files) - set(sizes)):
            beside = [file for file in HfApi().list_repo_files(model.name, revision=commit) if file[0] != "."]
            raise UserError(
                f"{{model.path}}={model.name} has no {missing[0]}, only {', '.join(beside[:8])}; set {{model.path}} to "
                "a model with safetensors weights: of an adapter its base; of .bin files, which can hold code, "
                f"model.revision=refs/pr/N, the pull request of {constants.ENDPOINT}/spaces/safetensors/convert"
            )
    return sizes


def download(model: HubModel) -> None:
    """Download the missing weights into the cache, with progress. Raises UserError if the disk is too small."""
    from huggingface_hub import snapshot_download

    if not (absent := model.absent()):
        return
    cache, commit = model.folder.parents[2], model.folder.name
    needed, free = sum(_sizes(model, absent).values()), shutil.disk_usage(cache).free
    require(
        free >= needed,
        f"{model.name} needs {size(needed)} in {cache}, where {size(free)} are free; make room (`hf cache ls`, "
        "`hf cache rm`), or set HF_HOME to a folder on another disk",
    )
    print(f"downloading {model.name} ({size(needed)}, commit {commit[:12]}) to {cache}", flush=True)
    patterns = [glob.escape(file) for file in absent]
    with explained(model.name, commit), _interruptible(model.name) as bar:
        snapshot_download(model.name, revision=commit, cache_dir=cache, allow_patterns=patterns, tqdm_class=bar)


@contextlib.contextmanager
def _interruptible(name: str) -> Iterator[type[Any]]:
    """Yield a progress bar that ends the download at Ctrl-C; in a log, lines take its place.

    huggingface_hub's own waits for the files in flight, gigabytes each.
    """
    from huggingface_hub.utils import disable_progress_bars, tqdm

    stopped = threading.Event()

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    def stop(*_: object) -> None:
        if stopped.is_set():
            os._exit(128 + signal.SIGINT)
        stopped.set()
        print("\nstopping; the same command continues with the missing files", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, stop)
    try:
        with contextlib.ExitStack() as log:
            if not sys.stderr.isatty():
                log.enter_context(disable_progress_bars())
                log.enter_context(still(f"downloading {name}"))
            yield Bar
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def with_small_files(model: ModelConfig) -> Iterator[ModelConfig]:
    """Yield the model with its path set to a local folder: for a model on the hub, its snapshot or its small files.

    For a GGUF file it is the folder that describes it. A UserError of the block names the model, not the folder.
    """
    if not is_hub_name(model.path):
        yield localize(model)
        return
    snapshot = locate(model.path, model.revision)
    folder = _preview_folder(snapshot) if snapshot.absent() else snapshot.folder
    with _named(folder, model.path):
        yield dataclasses.replace(model, path=str(folder), name=model.path)


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    """Have UserErrors of the block name `path` as `name`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from error


@functools.cache
def _preview_folder(model: HubModel) -> Path:
    """Return a folder of copies of the small files and of sparse safetensors files; removed at exit.

    These have the header, and the quant_states of a checkpoint that bitsandbytes quantized, which the checks read too.
    """
    from huggingface_hub import HfFileSystem

    sizes, hub = _sizes(model, list(model.weights)), HfFileSystem()
    folder = Path(tempfile.mkdtemp(prefix="distlora-hub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def large(_: object, names: list[str]) -> list[str]:
        return [name for name in names if "." in name and not name.endswith(_SMALL)]

    def copy(file: str, first: int, end: int) -> bytes:
        path = f"{model.name}@{model.folder.name}/{file}"
        data: bytes = hub.cat_file(path, start=first, end=end, cache_type="none")
        with (folder / file).open("r+b") as stream:
            stream.seek(first)
            stream.write(data)
        return data

    def copy_header(file: str) -> list[tuple[str, int, int]]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
        os.truncate(folder / file, sizes[file])
        end = 8 + int.from_bytes(copy(file, 0, min(FIRST_BYTES, sizes[file]))[:8], "little")
        if FIRST_BYTES < end <= min(LONGEST_HEADER, sizes[file]):
            copy(file, FIRST_BYTES, end)
        tensors = read_header(folder / file).items()
        return [(file, at.offset, at.offset + at.num_bytes) for name, at in tensors if ".quant_state." in name]

    shutil.copytree(model.folder, folder, ignore=large, dirs_exist_ok=True)
    with explained(model.name, model.folder.name), _named(folder, model.name), ThreadPoolExecutor(16) as threads:
        ranges = [span for of_file in threads.map(copy_header, sizes) for span in of_file]
        list(threads.map(lambda span: copy(*span), ranges))
    return folder
