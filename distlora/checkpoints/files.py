"""Folders that appear whole or not at all: what a checkpoint and a published result are written with.

Tensors are whole in the files, whatever number of ranks has cut them, so any number can go on from them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distlora import durable
from distlora.checkpoints.folder import replaced_of, sha256, temporary_of
from distlora.parallel import Backend
from distlora.parallel.streams import HostRows
from distlora.tensor_files import Unmade, write_tensors

Files = Mapping[str, Mapping[str, Tensor | HostRows | Unmade] | dict[str, Any]]
"""Tensors (*.safetensors) or JSON (*.json) by the name of their file."""


@contextlib.contextmanager
def whole_folder(folder: Path, backend: Backend) -> Iterator[Path]:
    """A place to write what then appears as `folder`, complete or not at all.

    An older one of the same name is set aside first, then removed. On ranks that do not write there is no such place.
    Where it cannot be made, the OSError comes after the block: other ranks may be waiting for what this one does in it.
    """
    temporary = temporary_of(folder)
    if not backend.writes:
        yield temporary
        return
    shutil.rmtree(temporary, ignore_errors=True)
    refused: OSError | None = None
    try:
        # Not what that lies in: where RUN is gone too, a disk may not be mounted any more.
        if not folder.parent.exists():
            folder.parent.mkdir(exist_ok=True)
            durable.sync(folder.parent.parent)
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
def appearing(folder: Path) -> Iterator[Path]:
    """`whole_folder` of a process without ranks: it stops where the place cannot be made."""
    temporary = temporary_of(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path) -> None:
    """Give a finished temporary folder its name; the name stands for a whole folder, on the disk, from then on."""
    for path in temporary.rglob("*"):
        durable.sync(path)
    durable.sync(temporary)
    replaced = replaced_of(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    try:
        temporary.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    durable.sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


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
                durable.write_json(folder / name, content)
                sums[name] = sha256(folder / name)
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return sums
