"""What the bytes of a checkpoint's files are, by name: known for free where the hub's cache says it, remembered where
they were read before, else read once by all ranks together. Imports no torch.

A file that was hashed is known again by its path, inode, size and times of modification and of change, all in
nanoseconds, which all clients of a file server see alike (they number its device each in its own way, and anew after a
restart). A record is named by all of these, so those of machines with a copy each stand side by side. A file is
remembered only if these were SETTLED_SECONDS old when hashing began and the same when it ended: so a change in place
gets other times than those remembered, even where the disk keeps times in steps of up to that. What goes unseen is a
change after which someone sets the machine's clock back to give the file its old times again, or one on a file server
whose clock is behind this machine's by more than that; the base's fingerprint, 4 KiB of every tensor, is in the key of
a cache besides.
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
"""Of a file: what one rank hashes by itself."""
SETTLED_SECONDS = 2.0
_READ_BYTES = 2**20
_THREADS = 2
"""Of a rank: one reads while the other hashes."""


class State(NamedTuple):
    """What changes when a file does."""

    inode: int
    size: int
    modified: int
    """Nanoseconds since the epoch, as `changed`."""
    changed: int


@dataclass(frozen=True, slots=True)
class Part:
    """PART_BYTES of a file, or what is left of it."""

    file: Path
    start: int
    stop: int


def state_of(file: Path) -> State:
    """Of a file, or of what a link leads to, now. Raises OSError where there is none."""
    found = file.stat()
    return State(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def hub_digest(file: Path) -> str | None:
    """The SHA-256 by which the hub's cache names the content of a snapshot's file; None for any other file."""
    if not file.is_symlink():
        return None
    blob = file.resolve()
    is_blob = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    return f"sha256:{blob.name}" if is_blob and re.fullmatch("[0-9a-f]{64}", blob.name) else None


def remembered(folder: Path, file: Path) -> str | None:
    """The digest of a file that is as it was when it was hashed; None where it has to be hashed."""
    return digest_in(_record(folder, file, state_of(file)), file)


def digest_in(record: Path, file: Path) -> str | None:
    """What a record says of a file in its state of now; None where it says nothing of that, or is damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        if isinstance(values, dict) and values.get("state") == list(state_of(file)):
            digest = values.get("digest")
            return digest if isinstance(digest, str) else None
    return None


def remember(folder: Path, file: Path, state: State, digest: str, *, began: float) -> None:
    """Keep the digest of a file that was in `state` when hashing `began` (seconds since the epoch), if it is still, and
    was settled. Raises OSError where the cache cannot be written."""
    if began - max(state.modified, state.changed) / 1e9 < SETTLED_SECONDS or state_of(file) != state:
        return
    record = _record(folder, file, state)
    record.parent.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(record, {"path": str(file), "state": list(state), "digest": digest})


def _record(folder: Path, file: Path, state: State) -> Path:
    told = json.dumps([os.fsencode(file).hex(), *state])
    return folder / f"source-{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"


def parts_of(file: Path, size: int) -> list[Part]:
    return [Part(file, start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]


def digest_of(part_digests: Sequence[bytes], size: int) -> str:
    """Of a whole file, by those of its parts in order."""
    return f"tree:{hashlib.sha256(str(size).encode() + b''.join(part_digests)).hexdigest()}"


def hash_parts(parts: Sequence[Part]) -> list[bytes]:
    """SHA-256 of each. Raises OSError for a file that ends early."""
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
