"""Fingerprint the base's files for the quantized-weights cache, with the work divided over the ranks.

Ranks that see the same files hash a part each. If each node has a copy, its ranks hash it, and all copies must be
equal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distlora.parallel import Backend, watch
from distlora.weights import file_fingerprints
from distlora.weights.quantized_cache_folder import SOURCES

_WORDS = 4
"""int64 words of a SHA-256."""
PARTS_AT_ONCE = 4
"""Parts that a rank hashes between two boundaries: about a second at 256 MiB/s."""


@dataclass(frozen=True, slots=True)
class Content:
    """Fingerprints of the base's files."""

    digests: Mapping[Path, str]
    """Fingerprint of each file, the same on every rank."""
    bytes_read: int
    """Bytes that this rank read to compute them."""


def content_of(
    files: Sequence[Path], folder: Path, backend: Backend, say: Callable[[str], None], boundary: watch.Marker
) -> Content | None:
    """Return the fingerprints of `files` and record them in the cache at `folder`. Every rank must call it alike.

    Returns None if the ranks see files of different sizes or bytes: each node has a copy, and they differ. Raises
    OSError for a file that cannot be read.
    """
    states = {file: file_fingerprints.state_of(file) for file in files}
    if not alike(json.dumps([states[file].size for file in files]), backend):
        return None
    known = {
        file: file_fingerprints.hub_digest(file) or file_fingerprints.remembered(folder / SOURCES, file)
        for file in files
    }
    absent = torch.tensor([known[file] is None for file in files], dtype=torch.int64, device=backend.ranks.device)
    unknown = [file for file, flag in zip(files, backend.max_over_ranks(absent).tolist(), strict=True) if flag]
    bytes_read = 0
    if unknown:
        if backend.writes:
            total = sum(states[file].size for file in unknown)
            say(
                f"fingerprinting {total / 1e9:.2f} GB of the base for the quantized-weights cache (disable: "
                "quant.cache=false)"
            )
        began = time.time()
        hashed, bytes_read = _hash(unknown, states, backend, boundary)
        known |= hashed
        with contextlib.suppress(OSError):  # If the cache cannot be written, the next start hashes again.
            for file, digest in hashed.items() if backend.ranks.leads_machine else ():
                file_fingerprints.remember(folder / SOURCES, file, states[file], digest, began=began)
    digests = {file: digest for file, digest in known.items() if digest is not None}
    if not alike(json.dumps([digests[file] for file in files]), backend):
        return None
    return Content(digests, bytes_read)


def _hash(
    files: Sequence[Path], states: Mapping[Path, file_fingerprints.State], backend: Backend, boundary: watch.Marker
) -> tuple[dict[Path, str], int]:
    """Return (fingerprints of the files that this rank sees, bytes that it read).

    The n ranks that see the same files hash every n-th part each, and all exchange the results.
    """
    by_file = {file: file_fingerprints.parts_of(file, states[file].size) for file in files}
    parts = [part for file in files for part in by_file[file]]
    groups = _who_sees_the_same([states[file] for file in files], backend)
    rank = backend.ranks.rank
    number, group = next((number, group) for number, group in enumerate(groups) if rank in group)
    first, step = group.index(rank), len(group)
    mine = parts[first::step]
    rounds = -(-len(parts) // (min(map(len, groups)) * PARTS_AT_ONCE))
    hashes: list[bytes] = []
    for index in range(rounds):  # The same number on every rank: at a boundary all ranks agree whether to go on.
        boundary(None, "fingerprinting the base", index + 1, long=True)
        hashes += file_fingerprints.hash_parts(mine[index * PARTS_AT_ONCE : (index + 1) * PARTS_AT_ONCE])
    words = torch.zeros(len(groups), len(parts), _WORDS, dtype=torch.int64)
    if mine:
        words[number, first::step] = torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.int64).view(-1, _WORDS)
    # Each word is zero on all ranks but one.
    words_of_all = backend.sum_over_ranks(words.to(backend.ranks.device))[number].cpu().numpy()
    digests, at = {}, 0
    for file in files:
        count = len(by_file[file])
        part_digests = [words_of_all[index].tobytes() for index in range(at, at + count)]
        digests[file] = file_fingerprints.digest_of(part_digests, states[file].size)
        at += count
    return digests, sum(part.stop - part.start for part in mine)


def _who_sees_the_same(states: Sequence[file_fingerprints.State], backend: Backend) -> list[list[int]]:
    """Return groups of ranks that see the files in the same state; the same on every rank."""
    states_by_rank = torch.zeros(backend.ranks.world, dtype=torch.int64, device=backend.ranks.device)
    states_by_rank[backend.ranks.rank] = number_of(json.dumps(states))
    groups: dict[int, list[int]] = {}
    for rank, number in enumerate(backend.sum_over_ranks(states_by_rank).tolist()):
        groups.setdefault(number, []).append(rank)
    return list(groups.values())


def alike(text: str, backend: Backend) -> bool:
    """Return whether every rank passes the same text."""
    number = number_of(text)
    both = torch.tensor([number, -number], dtype=torch.int64, device=backend.ranks.device)
    highest, lowest = backend.max_over_ranks(both).tolist()
    return bool(highest == -lowest)


def number_of(text: str) -> int:
    """Return 56 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
