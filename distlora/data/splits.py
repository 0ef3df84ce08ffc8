"""A corpus to splits: which documents are held out, how often each piece is used, and the files of a split.

Letters: P pieces, D documents, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distlora.data.corpus import Corpus
from distlora.data.hashing import HELD_OUT, MIXTURE, below, hash64
from distlora.data.packing import build_rows, pack
from distlora.data.rows import DOCUMENTS, REJECTED, TRAINED, split_file
from distlora.data.sources import Source


def shares(weights: Sequence[float]) -> np.ndarray:
    """Return the weights scaled to sum to 1, (S,) float64."""
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
    """Return how often each piece is used, (P,) int64: more than once if its source is smaller than its part.

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


def held_out(usable: np.ndarray, fraction: float, seed: int, source: int = 0) -> np.ndarray:
    """Return a mask of held-out documents: hashes of (seed, source, index) among the lowest `fraction` of all.

    `usable` and the result are (D,) bool over the documents of one source; a usable one has a trained token. With few
    documents the fraction may hit none of these: then the one with the lowest hash is held out, if another remains.
    """
    hashes = hash64((HELD_OUT, seed, source), len(usable))
    chosen = below(hashes, fraction)
    if fraction > 0 and not (chosen & usable).any() and np.count_nonzero(usable) > 1:
        candidates = np.flatnonzero(usable)
        chosen[candidates[np.argmin(hashes[candidates])]] = True
    return chosen


def held_out_documents(corpus: Corpus, fraction: float, seed: int) -> np.ndarray:
    """Return a mask of the held-out documents of a corpus, (D,) bool: the fraction applies to each source."""
    chosen = np.zeros(corpus.num_documents, bool)
    usable, sources = corpus.pieces_of > 0, corpus.sources
    for source in np.unique(sources).tolist():
        own = sources == source
        chosen[own] = held_out(usable[own], fraction, seed, source)
    return chosen


def use_pieces(
    corpus: Corpus,
    in_split: np.ndarray,
    wanted: np.ndarray | None,
    ended: np.ndarray,
    *,
    until_all: bool,
    seed: int,
) -> np.ndarray:
    """Return how often each piece is used in a split, (P,) int64. `in_split` is (D,) bool; `wanted` has the shares."""
    ours = in_split[corpus.documents]
    used = ours.astype(np.int64)
    if wanted is not None and ours.any():
        targets, sources = corpus.targets[ours], corpus.sources[corpus.documents][ours]
        sizes = np.bincount(sources, weights=targets, minlength=len(wanted))
        used[ours] = copies(targets, sources, wanted, volume(sizes, wanted, ended, until_all=until_all), seed)
    return used


def write_split(
    folder: Path, split: str, corpus: Corpus, in_split: np.ndarray, used: np.ndarray, pad: int
) -> dict[str, Any]:
    """Pack the pieces of a split, each as often as `used` ((P,) int64) says, into its files; its counts."""
    lengths = corpus.lengths
    chosen = np.repeat(np.arange(len(lengths)), used)
    packing = pack((np.cumsum(lengths) - lengths)[chosen], lengths[chosen], corpus.sequence_length)
    shape = (packing.num_rows, corpus.sequence_length)

    def new_file(name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
        return np.lib.format.open_memmap(split_file(folder, split, name), mode="w+", dtype=dtype, shape=shape)

    tokens = new_file("tokens", np.int32, shape)
    flags = new_file("flags", np.uint8, shape)
    targets, pairs = (new_file(name, np.int32, shape[:1]) for name in ("targets", "pairs"))
    new_file(DOCUMENTS, np.int64, chosen.shape)[:] = corpus.documents[chosen[packing.pieces]]
    largest = 0
    for rows, row_tokens, row_flags in build_rows(packing, *corpus.read(), pad):
        tokens[rows], flags[rows] = row_tokens, row_flags
        targets[rows] = np.count_nonzero(row_flags & TRAINED, axis=1)
        pairs[rows] = np.count_nonzero(row_flags & REJECTED, axis=1)
        largest = max(largest, int(row_tokens.max()))
    pieces_of = corpus.pieces_of
    used_of = np.bincount(corpus.documents[used > 0], minlength=corpus.num_documents)
    num_tokens = int(packing.lengths.sum())

    def count(documents: np.ndarray) -> int:
        return int(np.count_nonzero(documents & in_split))

    return {
        "documents": count(used_of > 0),
        "rows": packing.num_rows,
        "pairs": int(pairs.sum(dtype=np.int64)),
        "tokens": num_tokens,
        "targets": int(targets.sum(dtype=np.int64)),
        "padding": packing.num_rows * corpus.sequence_length - num_tokens,
        "truncated": count(corpus.truncated & (used_of > 0)),
        "split": count((pieces_of > 1) & (used_of > 0)),
        "dropped": count((pieces_of == 0) & ~corpus.dropped_long),
        "dropped_long": count(corpus.dropped_long),
        "unused": count((pieces_of > 0) & (used_of == 0)),
        "pieces": int(used.sum()),
        "largest_token": largest,
    }


def count_sources(
    counts: dict[str, Any], corpus: Corpus, sources: list[Source], used: np.ndarray, wanted: np.ndarray | None
) -> None:
    """Add `sources`, one entry for each: where it is, what of it is used, and its share of the trained targets."""
    of_piece, targets, lengths = corpus.sources[corpus.documents], corpus.targets, corpus.lengths
    counts["sources"] = []
    for number, source in enumerate(sources):
        own = of_piece == number
        ours = int((targets * used)[own].sum())
        counts["sources"].append(
            {
                **source.describe(),
                "documents": len(np.unique(corpus.documents[own & (used > 0)])),
                "tokens": int((lengths * used)[own].sum()),
                "targets": ours,
                "share": ours / counts["targets"],
                "share_wanted": None if wanted is None else float(wanted[number]),
                "most_copies": int(used[own].max(initial=0)),
            }
        )
