"""How far a gain in held-out loss can be trusted: a paired bootstrap over the held-out documents.

Two runs were evaluated on the same documents. Document i has n_i target tokens, and the second run's loss sum over them
is lower by d_i; the gain is the ratio of sums, sum(d) / sum(n). Had other documents been held out, it would be another:
its spread is estimated by drawing as many documents as there are, with replacement, again and again, and computing the
gain of each draw (Efron and Tibshirani, An Introduction to the Bootstrap, 1993: chapter 6 for the standard error, 13.3
for the percentile interval). Documents are drawn and not tokens, since a document's tokens are not independent; both
runs' losses of a document are drawn together, since what makes it hard makes it hard for both.

What it does not know is how the runs would differ with another seed. Letters: D documents, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distlora.data.hashing import hash64

BOOTSTRAP = 4
"""What a hash is for, after the uses in hashing.py."""
_DRAWN_AT_ONCE = 2**20
"""Numbers: some 10 MB of memory, for any number of documents and resamples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """How much lower a second run's held-out loss is than a first one's, nats a token (or pair)."""

    gain: float
    low: float
    high: float
    """Of the percentile interval."""
    error: float
    """Its standard error: the deviation of the resamples' gains."""

    @property
    def is_more_than_noise(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    @property
    def is_loss(self) -> bool:
        """Whether all of it is below."""
        return self.high < 0


def gain(
    first: Sequence[float],
    second: Sequence[float],
    units: Sequence[int],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> Gain:
    """Of two runs with these loss sums by document, and the documents' counts of units: each of length D.

    The same arguments draw the same documents, on any machine and with any version of numpy. Of one document nothing is
    known of others: the interval has no ends, and the error is infinite.
    """
    counts = np.array(units, np.float64)
    lower = np.array(first, np.float64) - np.array(second, np.float64)
    if len(counts) < 2:
        return Gain(gain=float(lower.sum() / counts.sum()), low=-math.inf, high=math.inf, error=math.inf)
    gains = resampled(lower, counts, resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(gains, [tail, 1 - tail]).tolist()
    return Gain(gain=float(lower.sum() / counts.sum()), low=low, high=high, error=float(gains.std(ddof=1)))


def resampled(sums: np.ndarray, units: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(B,) float64: sum(sums) / sum(units) over each of B draws of D documents with replacement. sums, units: (D,)."""
    documents = len(sums)
    result = np.empty(resamples, np.float64)
    step = max(1, _DRAWN_AT_ONCE // documents)
    for first in range(0, resamples, step):
        last = min(first + step, resamples)
        random = hash64((BOOTSTRAP, seed), (last - first) * documents, start=first * documents)
        # The upper 32 bits times D, over 2^32: every document as likely as another up to D / 2^32.
        drawn = ((random >> np.uint64(32)) * np.uint64(documents) >> np.uint64(32)).astype(np.int64)
        drawn = drawn.reshape(last - first, documents)
        result[first:last] = sums[drawn].sum(axis=1) / units[drawn].sum(axis=1)
    return result
