"""SentencePiece's BPE (Llama 2, Mistral 7B): its scores out of a tokenizer.json, and llama.cpp's way through them.

In tokenizer.json merges have an order; in GGUF each token has a score, and llama.cpp merges the adjacent two whose
joined text is the token of the highest score, the leftmost first. Both are the same where every way to join two tokens
into one is a merge, and those of one token follow each other: so transformers makes them of a SentencePiece model. A
tokenizer for which that does not hold is refused, by what it makes of texts.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

SPACE = "▁"


def scores_of(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Of the tokens by which texts are split, as in a SentencePiece model: minus the place among all results of merges,
    then single characters by their ids. Of bytes and special tokens it is 0."""
    places: dict[str, int] = {}
    for left, right in merges:
        places.setdefault(left + right, len(places))
    for token in sorted(vocabulary, key=lambda token: vocabulary[token]):
        if len(token) == 1:
            places.setdefault(token, len(places))
    return {token: -float(places.get(token, 0)) for token in vocabulary}


def tokenize(text: str, vocabulary: Mapping[str, int], scores: Mapping[str, float], *, prefix: bool) -> list[int]:
    """What llama.cpp makes of a text without special tokens (llama-vocab.cpp, llm_tokenizer_spm_session)."""
    symbols: list[str] = list(((SPACE if prefix else "") + text).replace(" ", SPACE))
    after = list(range(1, len(symbols) + 1))
    before = list(range(-1, len(symbols) - 1))
    queue: list[tuple[float, int, int, int]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(symbols):
            joined = symbols[left] + symbols[right]
            if joined in vocabulary:
                heapq.heappush(queue, (-scores[joined], left, right, len(joined)))

    for place in range(1, len(symbols)):
        offer(place - 1, place)
    while queue:
        _, left, right, length = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
            continue
        symbols[left], symbols[right] = symbols[left] + symbols[right], ""
        after[left] = after[right]
        if after[right] < len(symbols):
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    ids: list[int] = []
    for symbol in filter(None, symbols):
        if symbol in vocabulary:
            ids.append(vocabulary[symbol])
        else:
            ids += (vocabulary[f"<0x{byte:02X}>"] for byte in symbol.encode())
    return ids


def merges_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a tokenizer.json's model, in either of its two forms."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]
