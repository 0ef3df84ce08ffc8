"""The content of a checkpoint's files, which all ranks find out together: each hashes its share of what is unknown."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distlora.loading import source_digest
from distlora.loading.cache_folder import SOURCES
from distlora.parallel import Backend

_WORDS = 4
"""int64 words of a SHA-256."""


@dataclass(frozen=True, slots=True)
class Content:
    digests: Mapping[Path, str]
    """Of each file, the same on every rank."""
    bytes_read: int
    """By this rank, to find that out."""


def content_of(files: Sequence[Path], folder: Path, backend: Backend, say: Callable[[str], None]) -> Content | None:
    """The digests of `files`, which the cache in `folder` then knows. Every rank must call it alike.

    None where ranks see files of other sizes or names by the hub: each machine has a copy, and they differ. Raises
    OSError for a file that cannot be read.
    """
    states = {file: source_digest.state_of(file) for file in files}
    sizes = [states[file][2] for file in files]
    if not alike(json.dumps(sizes), backend):
        return None
    known = {file: source_digest.hub_digest(file) or source_digest.remembered(folder / SOURCES, file) for file in files}
    absent = torch.tensor([known[file] is None for file in files], dtype=torch.int64, device=backend.ranks.device)
    unknown = [file for file, flag in zip(files, backend.max_over_ranks(absent).tolist(), strict=True) if flag]
    bytes_read = 0
    if unknown:
        if backend.writes:
            total = sum(states[file][2] for file in unknown)
            say(f"hashing {total / 1e9:.2f} GB of the base, by which its quantized shards are known again")
        began = time.time()
        hashed, bytes_read = _hash(unknown, states, backend)
        known |= hashed
        with contextlib.suppress(OSError):  # A cache that cannot be written: hashed again next time.
            for file, digest in hashed.items() if backend.ranks.leads_machine else ():
                source_digest.remember(folder / SOURCES, file, states[file], digest, began=began)
    digests = {file: digest for file, digest in known.items() if digest is not None}
    if not alike(json.dumps([digests[file] for file in files]), backend):
        return None
    return Content(digests, bytes_read)


def _hash(
    files: Sequence[Path], states: Mapping[Path, source_digest.State], backend: Backend
) -> tuple[dict[Path, str], int]:
    """(digests of the files, bytes that this rank read): every rank takes each world-th part, and all exchange."""
    by_file = {file: source_digest.parts_of(file, states[file][2]) for file in files}
    parts = [part for file in files for part in by_file[file]]
    rank, world = backend.ranks.rank, backend.ranks.world
    own = parts[rank::world]
    words = torch.zeros(len(parts), _WORDS, dtype=torch.int64)
    if own:
        joined = bytearray(b"".join(source_digest.hash_parts(own)))
        words[rank::world] = torch.frombuffer(joined, dtype=torch.int64).view(-1, _WORDS)
    # All but one rank's are zeros, so the sum is what that one found.
    found = backend.sum_over_ranks(words.to(backend.ranks.device)).cpu().numpy()
    digests, at = {}, 0
    for file in files:
        count = len(by_file[file])
        own_digests = [found[index].tobytes() for index in range(at, at + count)]
        digests[file] = source_digest.digest_of(own_digests, states[file][2])
        at += count
    return digests, sum(part.stop - part.start for part in own)


def alike(told: str, backend: Backend) -> bool:
    """Whether every rank says the same."""
    number = int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")
    both = torch.tensor([number, -number], dtype=torch.int64, device=backend.ranks.device)
    highest, lowest = backend.max_over_ranks(both).tolist()
    return bool(highest == -lowest)
