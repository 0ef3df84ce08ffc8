"""Find the texts that end a completion, wherever the tokens divide them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST_BYTES = 4
"""Bytes of a character in UTF-8. A token has one byte at least."""


class StopStrings:
    """Texts of which each ends a completion."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        assert tokenizer is not None, "stop strings need a tokenizer"
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        # A text, and one character before it that its first token may belong to.
        self._size = MOST_BYTES * (max(map(len, texts)) + 2)

    def ends(self, tokens: Sequence[int]) -> bool:
        """Return whether the last token completed a text. Earlier ones have been asked about."""
        tail = self._tokenizer.decode(list(tokens[-self._size :]), clean_up_tokenization_spaces=False)
        return any(text in tail for text in self._texts)
