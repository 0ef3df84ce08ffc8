"""Folders that appear whole or not at all: what a checkpoint and a published result are written with.

Tensors are whole in the files, whatever number of ranks has cut them, so any number can go on from them.
"""

from __future__ import annotations

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
from distlora.parallel.shards import HostRows
from distlora.run_folder.checkpoints import replaced_folder, sha256, temporary_folder
from distlora.system import atomic_io

Files = Mapping[str, Mapping[str, Tensor | HostRows | DeferredTensor] | dict[str, Any]]
"""Tensors (*.safetensors) or JSON (*.json) by the name of their file."""


@contextlib.contextmanager
def atomic_folder(folder: Path, backend: Backend) -> Iterator[Path]:
    """A place to write what then appears as `folder`, complete or not at all.

    An older one of the same name is set aside first, then removed. On ranks that do not write there is no such place.
    Where it cannot be made, the OSError comes after the block: other ranks may be waiting for what this one does in it.
    """
    temporary = temporary_folder(folder)
    if not backend.writes:
        yield temporary
        return
    shutil.rmtree(temporary, ignore_errors=True)
    refused: OSError | None = None
    try:
        # Not what that lies in: where RUN is gone too, a disk may not be mounted any more.
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
        shutil.rmtree(temporary, ignore_errors=True)  # Of a failed save: half a checkpoint may be what fills the disk.
    if refused is not None:
        raise refused


@contextlib.contextmanager
def new_folder(folder: Path, *, inside: bool = False) -> Iterator[Path]:
    """A place to write what then appears as `folder`, a new one, complete or not at all: of a process without ranks.
    `inside`: nothing is at that place yet, and the block makes a folder or a file there.

    The place is this process's while it writes; what a killed one left there is removed. Raises UserError where another
    process writes it, and where there is such a folder by then, which stays as it is.
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
                raise UserError(f"{folder} has appeared since this began; name another place with --out")
            made.rename(folder)
            atomic_io.sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(descriptor)


def _own(descriptor: int, temporary: Path, folder: Path) -> None:
    """Make an open folder this process's alone, and empty it."""
    with contextlib.suppress(OSError):  # Some network disks know no locks.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {folder}; wait for it, or name another place with --out"
            ) from None
    # Its owner may have given it its name, or removed it, between our two calls.
    if not temporary.exists() or not os.path.samestat(temporary.stat(), os.fstat(descriptor)):
        raise UserError(f"another process has just written {folder}; name another place with --out")
    for left in temporary.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def publish(temporary: Path, folder: Path) -> None:
    """Give a finished temporary folder its name; the name stands for a whole folder, on the disk, from then on."""
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
    """Tensors to safetensors, with `metadata` in their headers, the rest to JSON, by the file's ending; `publish` syncs
    them to disk. On every rank.

    Returns their SHA-256 on the rank that writes, nothing on the others. An OSError there comes after every tensor has
    been streamed, so that no other rank is left waiting.
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
