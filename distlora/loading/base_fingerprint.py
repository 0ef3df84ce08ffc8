"""Fingerprint the base's files for the quantized-weights cache, with the work divided over the ranks.

The hub's cache names a file by its SHA-256. Any other file is read once, by the ranks that see it together, and its
fingerprint is recorded under its path, inode, size and times of modification and change. All clients of a file server
see these alike; device numbers differ. If each node has a copy, all copies must be equal.

A file is recorded only if its times were SETTLED_SECONDS old when hashing began and unchanged when it ended, so that a
later change in place gets other times even on disks with coarse timestamps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from distlora.parallel import Backend, watch
from distlora.system import atomic_io
from distlora.weights.quantized_cache_folder import SOURCES

PART_BYTES = 64 * 2**20
"""Bytes of a file that one rank hashes at a time."""
SETTLED_SECONDS = 2.0
PARTS_AT_ONCE = 4
"""Parts that a rank hashes between two boundaries: about a second at 256 MiB/s."""
Value = TypeVar("Value")


class State(NamedTuple):
    """Values of a file's status that change when the file changes."""

    inode: int
    size: int
    modified: int
    """Nanoseconds since the epoch, like `changed`."""
    changed: int


class Part(NamedTuple):
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
    state = state_of(file)
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = _record(folder, file, state)
        values = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        if isinstance(values, dict) and values.get("state") == list(state) and isinstance(values.get("digest"), str):
            return str(values["digest"])
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


def digest_of(part_digests: Sequence[bytes], size: int) -> str:
    """Return the fingerprint of a file from the SHA-256 of its parts, in order."""
    return f"tree:{hashlib.sha256(str(size).encode() + b''.join(part_digests)).hexdigest()}"


def hash_parts(parts: Sequence[Part]) -> list[bytes]:
    """Return the SHA-256 of each part. Raises OSError for a file that ends early."""
    with ThreadPoolExecutor(max_workers=2) as pool:  # One thread reads while the other hashes.
        return list(pool.map(_hash_part, parts))


def _hash_part(part: Part) -> bytes:
    digest, left = hashlib.sha256(), part.stop - part.start
    with part.file.open("rb", buffering=0) as stream:
        stream.seek(part.start)
        while left:
            content = stream.read(min(left, 2**20))
            if not content:
                raise OSError(
                    f"{part.file} ended at byte {part.stop - left:,} while it was read, so it was changed after the "
                    "run began; start again once nobody writes it"
                )
            digest.update(content)
            left -= len(content)
    return digest.digest()


def content_of(
    files: Sequence[Path], folder: Path, backend: Backend, say: Callable[[str], None], boundary: watch.Marker
) -> tuple[dict[Path, str], int] | None:
    """Return (fingerprints of `files`, bytes that this rank read), and record them in the cache at `folder`.

    Every rank must call it alike. Returns None if the ranks see files of different sizes or bytes: each node has a
    copy, and they differ. Raises OSError for a file that cannot be read.
    """
    states = {file: state_of(file) for file in files}
    if not alike([states[file].size for file in files], backend):
        return None
    digests = {file: hub_digest(file) or remembered(folder / SOURCES, file) for file in files}
    known_by_rank = gathered(list(digests.values()), backend)
    unknown = [file for file, *known in zip(files, *known_by_rank, strict=True) if None in known]
    bytes_read = 0
    if unknown:
        if backend.writes:
            total = sum(states[file].size for file in unknown)
            say(
                f"fingerprinting {total / 1e9:.2f} GB of the base for the quantized-weights cache (disable: "
                "quant.cache=false)"
            )
        began, rank = time.time(), backend.ranks.rank
        states_by_rank = gathered(json.dumps(list(states.values())), backend)
        # The ranks that see the same files hash every n-th part each.
        group = [other for other, seen in enumerate(states_by_rank) if seen == states_by_rank[rank]]
        parts = [
            Part(file, start, min(start + PART_BYTES, states[file].size))
            for file in unknown
            for start in range(0, states[file].size, PART_BYTES)
        ]
        mine = parts[group.index(rank) :: len(group)]
        rounds = -(-len(parts) // (min(Counter(states_by_rank).values()) * PARTS_AT_ONCE))
        own_hashes: list[bytes] = []
        for index in range(rounds):  # The same number on every rank: at a boundary all ranks agree whether to go on.
            boundary(None, "fingerprinting the base", index + 1, long=True)
            own_hashes += hash_parts(mine[index * PARTS_AT_ONCE : (index + 1) * PARTS_AT_ONCE])
        bytes_read = sum(part.stop - part.start for part in mine)
        hashes_by_rank = gathered([digest.hex() for digest in own_hashes], backend)
        hashes: dict[Part, bytes] = {}
        for place, other in enumerate(group):
            hashes |= zip(parts[place :: len(group)], map(bytes.fromhex, hashes_by_rank[other]), strict=True)
        for file in unknown:
            digests[file] = digest_of([hashes[part] for part in parts if part.file == file], states[file].size)
        with contextlib.suppress(OSError):  # If the cache cannot be written, the next start hashes again.
            for file in unknown if backend.ranks.leads_machine else ():
                remember(folder / SOURCES, file, states[file], str(digests[file]), began=began)
    if not alike(list(digests.values()), backend):
        return None
    return {file: str(digest) for file, digest in digests.items()}, bytes_read


def gathered(value: Value, backend: Backend) -> list[Value]:
    """Return the JSON values of all ranks, in the order of ranks. Every rank must call it alike."""
    content, device = json.dumps(value).encode(), backend.ranks.device
    length = int(backend.max_over_ranks(torch.tensor([len(content)], dtype=torch.int64, device=device)))
    padded = torch.frombuffer(bytearray(content.ljust(length)), dtype=torch.uint8).to(device)
    return [json.loads(row.numpy().tobytes()) for row in backend.gather_ranks(padded).cpu()]


def alike(value: object, backend: Backend) -> bool:
    """Return whether every rank passes an equal JSON value."""
    values = gathered(value, backend)
    return all(other == values[0] for other in values)
