"""Mixtures: how often each piece of each source is used, so that the trained tokens have the shares that are wanted.

Letters: P pieces, S sources. A source's *size* is its trained targets; a mixture of *volume* V has w_s * V targets of
source s, where the weights w_s sum to 1. Choices are made by hash, so they depend on the seed and the data alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distlora.data.hashing import MIXTURE, hash64


def shares(weights: Sequence[float]) -> np.ndarray:
    """The weights scaled to sum to 1, (S,) float64."""
    values = np.array(weights, np.float64)
    return values / values.sum()


def volume(sizes: np.ndarray, wanted: np.ndarray, ended: np.ndarray, *, until_all: bool) -> float:
    """Targets of a mixture that ends when the first source is used up or, `until_all`, when the last one is.

    `sizes` and `wanted` are (S,) float64, `ended` (S,) bool: whether a source was read to its end. Sources that have
    not ended bound the volume, since they are not to be repeated. Those that ended without a target do not count: the
    others share what is theirs.
    """
    ratios = sizes / wanted
    if until_all and not ended.all():
        return float(ratios[~ended].min())
    counting = ratios[(sizes > 0) | ~ended]
    return float(counting.max() if until_all else counting.min())


def copies(targets: np.ndarray, sources: np.ndarray, wanted: np.ndarray, volume: float, seed: int) -> np.ndarray:
    """How often each piece is used, (P,) int64: 0, 1, or more where its source is smaller than its part of `volume`.

    `targets` and `sources` are (P,) int64. A source gives whole passes, and then the first of its pieces in the order
    of hash(seed, source, index) up to the count that comes nearest to its part; at least one piece.
    """
    result = np.zeros(len(targets), np.int64)
    for source, share in enumerate(wanted.tolist()):
        pieces = np.flatnonzero(sources == source)
        if len(pieces) == 0:
            continue
        size = int(targets[pieces].sum())
        # A quota that equals the size up to rounding is one pass.
        passes, rest = divmod(share * volume, size)
        order = pieces[np.argsort(hash64((MIXTURE, seed, source), len(pieces)), kind="stable")]
        sums = np.concatenate([[0], np.cumsum(targets[order])])
        after = min(int(np.searchsorted(sums, rest)), len(pieces))
        nearest = after - 1 if after > 0 and rest - sums[after - 1] < sums[after] - rest else after
        result[pieces] = int(passes)
        result[order[: max(nearest, 1 if passes == 0 else 0)]] += 1
    return result
