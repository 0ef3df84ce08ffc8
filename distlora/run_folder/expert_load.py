"""Read and describe the load of experts, as metrics.jsonl and state.json hold it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

EXPERT_TOKENS = "expert_tokens"
"""Their key in a record: {layer: [tokens of each expert]}."""
ExpertTokens = dict[int, list[int]]
"""Tokens that chose each expert, by the index of its layer."""
_MOST = 2**62


def expert_tokens_in(value: Any) -> ExpertTokens | None:
    """Return the tokens of each expert from a value of a record; None if it has another form."""
    by_layer: ExpertTokens = {}
    for layer, tokens in value.items() if isinstance(value, Mapping) else ():
        if not (layer.isdecimal() and len(layer) < 7 and isinstance(tokens, list) and tokens):
            return None
        if not all(type(number) is int and 0 <= number < _MOST for number in tokens):
            return None
        by_layer[int(layer)] = tokens
    return by_layer or None


def imbalance(tokens: Sequence[int]) -> float:
    """Return the busiest expert's tokens over the mean of a layer's experts; 1 without tokens."""
    total = sum(tokens)
    return max(tokens) * len(tokens) / total if total else 1.0


def idle_experts(load: ExpertTokens) -> dict[int, str]:
    """Return the experts that no token chose, by layer, without layers that have none."""
    idle = {layer: [number for number, count in enumerate(tokens) if not count] for layer, tokens in load.items()}
    return {layer: ranges(numbers) for layer, numbers in idle.items() if numbers}


def layers_text(layers: Iterable[int]) -> str:
    """Return `layer 3` or `layers 0-3, 7`."""
    text = ranges(layers)
    return f"layer {text}" if text.isdecimal() else f"layers {text}"


def ranges(numbers: Iterable[int]) -> str:
    """Return rising numbers as `0-3, 7`."""
    known = list(numbers)
    starts = [number for before, number in pairwise([-2, *known]) if number != before + 1]
    ends = [number for number, after in pairwise([*known, -2]) if after != number + 1]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)
