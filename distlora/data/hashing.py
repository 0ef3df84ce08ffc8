"""Choices by hash: which documents are held out or drawn into a mixture, in which order rows are visited.

A counter-based source (splitmix64, Steele et al. 2014, with random access), spelled out here in integer operations
because numpy promises no stable streams for its generators across versions: the same seed must name the same order on
the machine that resumes a run.
"""

from __future__ import annotations

import numpy as np

HELD_OUT, ROW_ORDER, MIXTURE = 1, 2, 3
"""Uses of hashes: the first word, so that no two uses share a stream."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _scramble(state: np.ndarray) -> np.ndarray:
    """Return the output function of splitmix64: a bijection of uint64 that mixes every bit into every other."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hash64(words: tuple[int, ...], count: int, start: int = 0) -> np.ndarray:
    """Return uint64 numbers `start` to `start + count`; the i-th depends on `words` (each below 2**64) and i alone."""
    state = np.zeros(1, np.uint64)  # An array, since numpy warns when a uint64 scalar wraps around.
    for word in words:
        state = _scramble((state ^ np.uint64(word)) + _GOLDEN)
    return _scramble(state + np.arange(start + 1, start + count + 1, dtype=np.uint64) * _GOLDEN)


def below(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Return a mask of the uint64 hashes among the lowest `fraction` of all values."""
    return hashes < np.uint64(int(fraction * 2**53) << 11)
