"""Find the adapter ranks of each decoder layer, of one run or of trials trained together. Imports no torch."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence

from distlora.architecture.shapes import Asked, ModelShapes
from distlora.planner.decoder_sizes import AdaptedRanks
from distlora.planner.workload import Workload


def ranks_of_blocks(work: Workload, shapes: ModelShapes) -> tuple[AdaptedRanks, ...]:
    """Return the adapter ranks of each decoder layer; layers that are alike share one object."""
    if work.adapter.method == "full":
        return (AdaptedRanks(),) * shapes.num_layers
    found = [_ranks_of_blocks(Asked(shapes, adapter)) for adapter in work.adapters]
    if len(found) == 1:
        return found[0]
    kinds: dict[tuple[int, ...], AdaptedRanks] = {}
    blocks = []
    for block in zip(*found, strict=True):
        key = tuple(map(id, block))
        if key not in kinds:
            kinds[key] = _side_by_side(block)
        blocks.append(kinds[key])
    return tuple(blocks)


def _side_by_side(trials: Sequence[AdaptedRanks]) -> AdaptedRanks:
    """Add up the adapter ranks of several trials in one decoder layer."""
    ranks: Counter[str] = Counter()
    largest: dict[str, int] = {}
    for each in trials:
        ranks.update(each.by_name)
        largest |= {name: max(rank, largest.get(name, 0)) for name, rank in each.by_name.items()}
    return AdaptedRanks(by_name=ranks, of_one=largest)


@functools.lru_cache(maxsize=16)
def _ranks_of_blocks(asked: Asked) -> tuple[AdaptedRanks, ...]:
    shapes = asked.shapes
    experts = {weight.path: math.prod(weight.shape[:-2]) for weight in shapes.block}
    kinds: dict[object, AdaptedRanks] = {}
    found = []
    for block in shapes.adapters(asked.config):
        ranks = {each.place: each.down[0] // experts.get(each.place, 1) for each in block}
        found.append(kinds.setdefault(tuple(ranks.items()), AdaptedRanks.of(ranks)))
    return tuple(found)
