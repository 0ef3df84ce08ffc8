"""Write folders atomically: checkpoints and published results.

Tensors are whole in the files, however they are sharded, so any number of ranks can resume from them.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distlora.config import UserError
from distlora.loading.tensor_files import DeferredTensor, write_tensors
from distlora.parallel import Backend
from distlora.parallel.ranks import HostRows
from distlora.run_folder.layout import replaced_folder, temporary_folder
from distlora.system import atomic_io
from distlora.system.atomic_io import sha256

Files = Mapping[str, Mapping[str, Tensor | HostRows | DeferredTensor] | dict[str, Any]]
"""Tensors (*.safetensors) or JSON (*.json) by file name."""


@contextlib.contextmanager
def atomic_folder(folder: Path, backend: Backend) -> Iterator[Path]:
    """Yield a temporary folder that then appears as `folder`, complete or not at all.

    An older folder of the same name is set aside first, then removed. Ranks that do not write get a path that does not
    exist. If the folder cannot be made, the OSError is raised after the block, because other ranks may wait for this
    one inside of it.
    """
    temporary = temporary_folder(folder)
    if not backend.writes:
        yield temporary
        return
    shutil.rmtree(temporary, ignore_errors=True)
    refused: OSError | None = None
    try:
        # Never RUN itself: if that is missing too, its disk may be unmounted.
        if not folder.parent.exists():
            folder.parent.mkdir(exist_ok=True)
            atomic_io.sync(folder.parent.parent)
        temporary.mkdir()
    except OSError as error:
        refused = error
    try:
        yield temporary
        if refused is None:
            publish(temporary, folder)
    except OSError:
        if refused is None:
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # Half a checkpoint may be what fills the disk.
    if refused is not None:
        raise refused


@contextlib.contextmanager
def new_folder(folder: Path, *, inside: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that then appears as the new `folder`, for a process without ranks.

    `inside`: yield a path that does not exist yet, where the block makes a folder or a file. The path is locked by this
    process; leftovers of a killed process are removed. Raises UserError if another process is writing it, and if
    `folder` exists by then, which stays unchanged.
    """
    temporary = temporary_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(exist_ok=True)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _own(descriptor, temporary, folder)
        made = temporary / folder.name if inside else temporary
        try:
            yield made
            _sync(made)
            if folder.exists():
                raise UserError(f"{folder} was created meanwhile; name another place with --out")
            made.rename(folder)
            atomic_io.sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(descriptor)


def _own(descriptor: int, temporary: Path, folder: Path) -> None:
    """Lock an open folder for this process, and empty it."""
    with contextlib.suppress(OSError):  # Some network file systems have no locks.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {folder}; wait for it, or name another place with --out"
            ) from None
    # The other process may have renamed or removed it between the two calls.
    if not temporary.exists() or not os.path.samestat(temporary.stat(), os.fstat(descriptor)):
        raise UserError(f"another process has just written {folder}; name another place with --out")
    for left in temporary.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def publish(temporary: Path, folder: Path) -> None:
    """Give a finished temporary folder its name, after syncing it to the disk."""
    _sync(temporary)
    replaced = replaced_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    try:
        temporary.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    atomic_io.sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        atomic_io.sync(path)
    atomic_io.sync(folder)


def write_files(
    folder: Path, files: Files, backend: Backend, *, metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write tensors to safetensors with `metadata` in their headers, and other content to JSON. On every rank.

    Returns the SHA-256 of the files on the writing rank, nothing on the others. `publish` syncs them. An OSError is
    raised after every tensor was streamed, so that no other rank is left waiting.
    """
    sums: dict[str, str] = {}
    failed: OSError | None = None
    for name, content in files.items():
        try:
            if name.endswith(".safetensors"):
                if (digest := write_tensors(folder / name, content, backend, metadata=metadata)) is not None:
                    sums[name] = digest
            elif backend.writes:
                atomic_io.write_json(folder / name, content)
                sums[name] = sha256(folder / name)
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return sums
