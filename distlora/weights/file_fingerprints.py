"""Fingerprints of a checkpoint's files, for the quantized-weights cache. Needs no torch.

The hub's cache names a file by its SHA-256. Any other file is read once, and its fingerprint is recorded under its
path, inode, size and times of modification and change in nanoseconds. All clients of a file server see these alike;
device numbers differ between clients. Copies on several nodes have one record each.

A file is recorded only if its times were SETTLED_SECONDS old when hashing began and unchanged when it ended, so that a
later change in place gets other times even on disks with coarse timestamps. A change is missed only if someone sets the
clock back to restore the old times, or if a file server's clock lags this node's by more than that. The base's
fingerprint, 4 KiB of every tensor, is part of the cache key as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distlora.system import atomic_io

PART_BYTES = 64 * 2**20
"""Bytes of a file that one rank hashes at a time."""
SETTLED_SECONDS = 2.0
_READ_BYTES = 2**20
_THREADS = 2
"""Threads per rank: one reads while the other hashes."""


class State(NamedTuple):
    """Values of a file's status that change when the file changes."""

    inode: int
    size: int
    modified: int
    """Nanoseconds since the epoch, like `changed`."""
    changed: int


@dataclass(frozen=True, slots=True)
class Part:
    """PART_BYTES of a file, or its remainder."""

    file: Path
    start: int
    stop: int


def state_of(file: Path) -> State:
    """Return the state of a file, following symlinks. Raises OSError if there is none."""
    status = file.stat()
    return State(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def hub_digest(file: Path) -> str | None:
    """Return the SHA-256 by which the hub's cache names a file; None for any other file."""
    if not file.is_symlink():
        return None
    blob = file.resolve()
    is_blob = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    return f"sha256:{blob.name}" if is_blob and re.fullmatch("[0-9a-f]{64}", blob.name) else None


def remembered(folder: Path, file: Path) -> str | None:
    """Return the recorded fingerprint of an unchanged file; None if it has to be hashed."""
    return digest_in(_record(folder, file, state_of(file)), file)


def digest_in(record: Path, file: Path) -> str | None:
    """Return the fingerprint in a record of the file's present state; None otherwise or for a damaged record."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        if isinstance(values, dict) and values.get("state") == list(state_of(file)):
            digest = values.get("digest")
            return digest if isinstance(digest, str) else None
    return None


def remember(folder: Path, file: Path, state: State, digest: str, *, began: float) -> None:
    """Record the fingerprint of a file that was in `state` when hashing `began` (seconds since the epoch).

    Nothing is recorded if the file changed meanwhile or was not settled. Raises OSError if the cache cannot be written.
    """
    if began - max(state.modified, state.changed) / 1e9 < SETTLED_SECONDS or state_of(file) != state:
        return
    record = _record(folder, file, state)
    record.parent.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(record, {"path": str(file), "state": list(state), "digest": digest})


def _record(folder: Path, file: Path, state: State) -> Path:
    key = json.dumps([os.fsencode(file).hex(), *state])
    return folder / f"source-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def parts_of(file: Path, size: int) -> list[Part]:
    """Divide a file into parts of PART_BYTES."""
    return [Part(file, start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]


def digest_of(part_digests: Sequence[bytes], size: int) -> str:
    """Return the fingerprint of a file from the SHA-256 of its parts, in order."""
    return f"tree:{hashlib.sha256(str(size).encode() + b''.join(part_digests)).hexdigest()}"


def hash_parts(parts: Sequence[Part]) -> list[bytes]:
    """Return the SHA-256 of each part. Raises OSError for a file that ends early."""
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return list(pool.map(_hash_part, parts))


def _hash_part(part: Part) -> bytes:
    digest, buffer = hashlib.sha256(), bytearray(_READ_BYTES)
    with part.file.open("rb", buffering=0) as stream:
        at = part.start
        while at < part.stop:
            got = os.preadv(stream.fileno(), [memoryview(buffer)[: part.stop - at]], at)
            if got == 0:
                raise OSError(
                    f"{part.file} ended at byte {at:,} while it was read, so it was changed after the run began; start "
                    "again once nobody writes it"
                )
            digest.update(memoryview(buffer)[:got])
            at += got
    return digest.digest()
