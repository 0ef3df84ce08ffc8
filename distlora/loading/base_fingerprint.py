"""The content of a checkpoint's files, which the ranks find out together: those that see the same files hash a share
each. Where each machine has a copy, every copy is hashed, by its own machine's ranks, and all have to be alike."""

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
"""Parts that a rank hashes between two boundaries: a second or less, where the disk gives 256 MiB in it."""


@dataclass(frozen=True, slots=True)
class Content:
    digests: Mapping[Path, str]
    """Of each file, the same on every rank."""
    bytes_read: int
    """By this rank, to find that out."""


def content_of(
    files: Sequence[Path], folder: Path, backend: Backend, say: Callable[[str], None], boundary: watch.Marker
) -> Content | None:
    """The digests of `files`, which the cache in `folder` then knows. Every rank must call it alike.

    None where ranks see files of other sizes or bytes, or names by the hub: each machine has a copy, and they differ.
    Raises OSError for a file that cannot be read.
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
                f"hashing {total / 1e9:.2f} GB of the base, by which its quantized shards are known again; with "
                "quant.cache=false nothing is kept and it is read once"
            )
        began = time.time()
        hashed, bytes_read = _hash(unknown, states, backend, boundary)
        known |= hashed
        with contextlib.suppress(OSError):  # A cache that cannot be written: hashed again next time.
            for file, digest in hashed.items() if backend.ranks.leads_machine else ():
                file_fingerprints.remember(folder / SOURCES, file, states[file], digest, began=began)
    digests = {file: digest for file, digest in known.items() if digest is not None}
    if not alike(json.dumps([digests[file] for file in files]), backend):
        return None
    return Content(digests, bytes_read)


def _hash(
    files: Sequence[Path], states: Mapping[Path, file_fingerprints.State], backend: Backend, boundary: watch.Marker
) -> tuple[dict[Path, str], int]:
    """(digests of the files that this rank sees, bytes that it read for it): of the ranks that see the same files each
    takes each n-th part, and all exchange."""
    by_file = {file: file_fingerprints.parts_of(file, states[file].size) for file in files}
    parts = [part for file in files for part in by_file[file]]
    groups = _who_sees_the_same([states[file] for file in files], backend)
    rank = backend.ranks.rank
    number, group = next((number, group) for number, group in enumerate(groups) if rank in group)
    first, step = group.index(rank), len(group)
    own = parts[first::step]
    rounds = -(-len(parts) // (min(map(len, groups)) * PARTS_AT_ONCE))
    found: list[bytes] = []
    for index in range(rounds):  # As many on every rank: at a boundary all ranks agree on whether to go on.
        boundary(None, "hashing the base", index + 1, long=True)
        found += file_fingerprints.hash_parts(own[index * PARTS_AT_ONCE : (index + 1) * PARTS_AT_ONCE])
    words = torch.zeros(len(groups), len(parts), _WORDS, dtype=torch.int64)
    if own:
        words[number, first::step] = torch.frombuffer(bytearray(b"".join(found)), dtype=torch.int64).view(-1, _WORDS)
    # All but one rank's are zeros, so the sum is what that one found.
    words_of_all = backend.sum_over_ranks(words.to(backend.ranks.device))[number].cpu().numpy()
    digests, at = {}, 0
    for file in files:
        count = len(by_file[file])
        of_parts = [words_of_all[index].tobytes() for index in range(at, at + count)]
        digests[file] = file_fingerprints.digest_of(of_parts, states[file].size)
        at += count
    return digests, sum(part.stop - part.start for part in own)


def _who_sees_the_same(states: Sequence[file_fingerprints.State], backend: Backend) -> list[list[int]]:
    """The ranks, put together by the states in which they see the files; the same on every rank."""
    told = torch.zeros(backend.ranks.world, dtype=torch.int64, device=backend.ranks.device)
    told[backend.ranks.rank] = number_of(json.dumps(states))
    groups: dict[int, list[int]] = {}
    for rank, number in enumerate(backend.sum_over_ranks(told).tolist()):
        groups.setdefault(number, []).append(rank)
    return list(groups.values())


def alike(told: str, backend: Backend) -> bool:
    """Whether every rank says the same."""
    number = number_of(told)
    both = torch.tensor([number, -number], dtype=torch.int64, device=backend.ranks.device)
    highest, lowest = backend.max_over_ranks(both).tolist()
    return bool(highest == -lowest)


def number_of(told: str) -> int:
    """56 bits that are another number where other words are told."""
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")
