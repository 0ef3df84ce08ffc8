"""Decide from the runs that ended which rank is tried next and which is recommended.

The ranks are doubled while that lowers the held-out loss by more than noise. The last doubling run is one too many,
since only that run can tell.

A gain is tested by a paired bootstrap over the held-out documents. Both runs were evaluated on the same documents.
Document i has n_i target tokens, and the second run's loss sum over them is lower by d_i; the gain is sum(d) / sum(n).
Its spread is estimated by drawing as many documents as there are, with replacement, B times, and computing the gain of
each draw (Efron and Tibshirani, An Introduction to the Bootstrap, 1993: chapter 6 for the standard error, 13.3 for the
percentile interval). Documents are drawn, not tokens, since a document's tokens are not independent; both runs' losses
of a document are drawn together, since a hard document is hard for both. The bootstrap does not show how runs differ by
seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distlora.config.sweep import SweepConfig
from distlora.data.packing import hash64
from distlora.output.results import Table
from distlora.run_folder.eval_documents import DocumentRecord

FULL = "full"
"""Stands for full fine-tuning in place of a rank."""
Size = int | str
"""A rank, or FULL."""
FEW_DOCUMENTS = 50
"""Documents below which the percentile interval is too narrow: a nominal 95 % covers 89 to 92 % (README.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A run that has ended."""

    documents: DocumentRecord | None = None
    """Held-out losses by document; None if the run failed."""
    reason: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the table: trial (its number), trainable_parameters, state_bytes, peak_bytes, planned_bytes,
    seconds, lr."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The ranks that may be tried, and the limit of useful ranks."""

    ladder: tuple[int, ...]
    widest: int
    """Largest possible rank of any adapted linear."""


def ladder(start: int, most: int, widest: int) -> Ranks:
    """Return `start` and its doublings up to `most`, up to the first that is at least `widest`."""
    ranks = [start]
    while ranks[-1] * 2 <= most and ranks[-1] < widest:
        ranks.append(ranks[-1] * 2)
    return Ranks(ladder=tuple(ranks), widest=widest)


def compare(first: Tried, second: Tried, settings: SweepConfig) -> Gain | None:
    """Return the gain of the second run over the first; None if one failed."""
    if first.documents is None or second.documents is None:
        return None
    return gain(
        _known(first.documents),
        _known(second.documents),
        first.documents.units,
        resamples=settings.bootstrap,
        confidence=settings.confidence,
        seed=settings.seed,
    )


def _known(record: DocumentRecord) -> list[float]:
    losses = [loss for loss in record.losses if loss is not None]
    assert len(losses) == len(record.losses), "a run with a loss that is not finite has failed"
    return losses


class Gains:
    """Computes each gain between ended runs once: a large bootstrap takes a second."""

    def __init__(self, settings: SweepConfig) -> None:
        self._settings = settings
        self._known: dict[tuple[Size, Size], Gain] = {}

    def of(self, tried: Mapping[Size, Tried], first: Size, second: Size) -> Gain | None:
        """Return the gain of `second` over `first`; None if one failed or has not ended."""
        if first not in tried or second not in tried:
            return None
        found = self._known.get((first, second)) or compare(tried[first], tried[second], self._settings)
        if found is not None:
            self._known[first, second] = found
        return found


def ranks_due(ranks: Ranks, tried: Mapping[Size, Tried], gains: Gains) -> list[int]:
    """Return all ranks due so far: the first two, and one more for each doubling that gained more than noise."""
    due = list(ranks.ladder[:2])
    for smaller, larger, next_one in zip(ranks.ladder, ranks.ladder[1:], ranks.ladder[2:], strict=False):
        found = gains.of(tried, smaller, larger)
        if found is None or not found.is_more_than_noise:
            break
        due.append(next_one)
    return due


def recommended(ranks: Ranks, tried: Mapping[Size, Tried], gains: Gains) -> int | None:
    """Return the largest rank whose doublings gained more than noise; None if no rank's run is complete."""
    best = next((rank for rank in ranks.ladder if rank in tried and tried[rank].documents is not None), None)
    for smaller, larger in itertools.pairwise(ranks.ladder):
        found = gains.of(tried, smaller, larger)
        if smaller == best and found is not None and found.is_more_than_noise:
            best = larger
    return best


def table(ranks: Ranks, tried: Mapping[Size, Tried], gains: Gains, *, confidence: float) -> Table:
    """Return a row per ended run; a rank's gain is over half of it, full fine-tuning's over the recommended rank."""
    head = ["rank", "trained", "state, MiB", "peak, MiB", "planned, MiB", "seconds", "held-out loss", "gain"]
    lines = [[*head, f"{confidence * 100:.4g} % interval", "verdict"]]
    for size, against in compared(ranks, tried, gains):
        run = tried[size]
        figures = run.figures
        cells = [str(size), _count(figures.get("trainable_parameters"))]
        cells += [_mib(figures.get(name)) for name in ("state_bytes", "peak_bytes", "planned_bytes")]
        seconds = figures.get("seconds")
        cells += ["-" if seconds is None else f"{seconds:.1f}"]
        loss = None if run.documents is None else run.documents.loss
        cells += ["-" if loss is None else f"{loss:.4f}"]
        found = None if against is None else gains.of(tried, against, size)
        cells += ["-", "-"] if found is None else [f"{found.gain:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}"]
        lines.append([*cells, _verdict(run, against, found)])
    return Table("Ranks", lines)


def compared(ranks: Ranks, tried: Mapping[Size, Tried], gains: Gains) -> Iterator[tuple[Size, Size | None]]:
    """Yield (ended run, run that its gain is over), in the order of the table."""
    for rank in ranks.ladder:
        if rank in tried:
            yield rank, rank // 2 if rank != ranks.ladder[0] else None
    if FULL in tried:
        yield FULL, recommended(ranks, tried, gains)


def _verdict(run: Tried, against: Size | None, found: Gain | None) -> str:
    if run.documents is None:
        return "failed"
    if found is None:
        return "first rank" if against is None else f"{against} failed"
    if found.is_more_than_noise:
        return f"lower than {against}"
    return f"higher than {against}" if found.is_loss else f"no difference to {against}"


def sentences(ranks: Ranks, tried: Mapping[Size, Tried], gains: Gains) -> Iterator[str]:
    """Yield the recommendation and its reason, the gain of full fine-tuning, failures and warnings."""
    best = recommended(ranks, tried, gains)
    if best is None:
        yield "No rank can be recommended: no rank's run is complete."
    else:
        number = tried[best].figures.get("trial")
        which = "" if number is None else f" (trial {number})"
        yield f"Recommended: adapter.r={best}{which}. {_reason(ranks, tried, gains, best)}"
    for size, run in tried.items():
        if run.documents is None:
            name = "Full fine-tuning" if size == FULL else f"The run with r={size}"
            yield f"{name} failed: {run.reason}"
    if best is None:
        return
    found = gains.of(tried, best, FULL)
    if found is not None:
        yield _of_full(found, best, tried)
    documents = tried[best].documents
    count = 0 if documents is None else len(documents.units)
    if count < FEW_DOCUMENTS:
        yield (
            f"Only {count} document{'s are' if count != 1 else ' is'} held out, so the interval is too narrow, or "
            "infinite. Hold out more (data.eval_fraction, data.eval_path)."
        )


def _reason(ranks: Ranks, tried: Mapping[Size, Tried], gains: Gains, best: int) -> str:
    """Return why this rank is recommended, and not half or twice of it."""
    reasons = []
    if best != ranks.ladder[0] and (before := gains.of(tried, best // 2, best)) is not None:
        reasons.append(f"From {best // 2} to {best} the held-out loss falls by {interval(before)}, more than its noise")
    after = gains.of(tried, best, best * 2)
    failed = tried.get(best * 2)
    if after is not None and after.is_loss:
        reasons.append(
            f"from {best} to {best * 2} it rises by {interval(_turned(after))}: the larger rank is worse at this "
            "learning rate"
        )
    elif after is not None:
        reasons.append(f"from {best} to {best * 2} it falls by {interval(after)}, no more than noise")
    elif failed is not None:
        reasons.append(f"the gain of {best * 2} is unknown: its run failed")
    elif best == ranks.ladder[-1] and best >= ranks.widest:
        reasons.append(f"no adapted linear can use more: the largest possible rank of their matrices is {ranks.widest}")
    elif best == ranks.ladder[-1]:
        reasons.append(f"a higher rank may gain more: sweep.rank_most ended the search; set it to {best * 2} or more")
    if best == ranks.ladder[0] and after is not None:
        reasons.append(f"a lower rank was not tried: set sweep.rank_start={max(1, best // 2)}")
    text = "; ".join(reasons)
    return text[:1].upper() + text[1:] + "." if text else ""


def _of_full(found: Gain, best: int, tried: Mapping[Size, Tried]) -> str:
    lr = tried[FULL].figures.get("lr")
    given = "" if lr is None else f" (lr {lr:g}, not tuned: sweep.full_lr)"
    if found.is_more_than_noise:
        return f"Full fine-tuning{given} ends lower than r={best} by {interval(found)}."
    if found.is_loss:
        return f"Full fine-tuning{given} ends higher than r={best} by {interval(_turned(found))}."
    return f"Full fine-tuning{given} ends as r={best} within noise: lower by {interval(found)}."


def interval(found: Gain) -> str:
    """Return a gain as `0.0120 nats (0.0040 to 0.0201)`."""
    return f"{found.gain:.4f} nats ({found.low:.4f} to {found.high:.4f})"


def _turned(found: Gain) -> Gain:
    return Gain(gain=-found.gain, low=-found.high, high=-found.low, error=found.error)


def rows_as_json(ranks: Ranks, tried: Mapping[Size, Tried], gains: Gains) -> list[dict[str, Any]]:
    """Return the table's rows for programs. Numbers that JSON cannot hold are null."""
    rows = []
    for size, against in compared(ranks, tried, gains):
        run, found = tried[size], None if against is None else gains.of(tried, against, size)
        rows.append(
            {
                "size": size,
                "against": against,
                "loss": None if run.documents is None else run.documents.loss,
                "gain": None if found is None else found.gain,
                "low": None if found is None else _finite(found.low),
                "high": None if found is None else _finite(found.high),
                "verdict": _verdict(run, against, found),
                **run.figures,
            }
        )
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.1f}"


BOOTSTRAP = 4
"""Domain of the hash, beside those in distlora/data/packing.py."""
_DRAWN_AT_ONCE = 2**20
"""Numbers drawn at once: limits memory to about 10 MB for any number of documents and resamples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Decrease of held-out loss from a first run to a second, in nats per token (or pair)."""

    gain: float
    low: float
    high: float
    """Ends of the percentile interval."""
    error: float
    """Standard error: the standard deviation of the resamples' gains."""

    @property
    def is_more_than_noise(self) -> bool:
        """Return whether the whole interval is above 0."""
        return self.low > 0

    @property
    def is_loss(self) -> bool:
        """Return whether the whole interval is below 0."""
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
    """Return the gain between two runs, given their loss sums and units by document, each of length D.

    The same arguments draw the same documents on any machine and with any version of numpy. For one document the
    interval and the error are infinite.
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
    """Return (B,) float64: sum(sums) / sum(units) of B draws of D documents with replacement.

    sums, units: (D,).
    """
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
