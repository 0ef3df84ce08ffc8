"""Find llama.cpp's pre-tokenizer that splits text like a byte-level BPE tokenizer of Hugging Face.

A GGUF file names one of llama.cpp's built-in pre-tokenizers (tokenizer.ggml.pre). Its converter recognizes a tokenizer
by a hash of its tokens of one text, so a retrained or grown one is unknown to it. Here each candidate is rebuilt with
the tokenizers package and compared with the original on texts, by pieces and by tokens.

The expressions and flags are those of llama.cpp's src/llama-vocab.cpp (MIT) in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distlora.config import UserError

_WORDS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASED = (
    r"((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+%s|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*%s"
)
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A pre-tokenizer of llama.cpp."""

    name: str
    """Value of tokenizer.ggml.pre."""
    expressions: tuple[str, ...]
    """Regular expressions; each splits the pieces of the one before."""
    ignore_merges: bool = False
    """True if a piece that is a token stays whole, whatever the merges say."""


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("llama-bpe", (_WORDS % r"\p{N}{1,3}",), ignore_merges=True),
    PreTokenizer("qwen2", (_WORDS % r"\p{N}",)),
    PreTokenizer("dbrx", (_WORDS % r"\p{N}{1,3}",)),
    PreTokenizer("tekken", (rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED % ('', '')}|\p{{N}}{_REST}",), ignore_merges=True),
    PreTokenizer("gpt-4o", (rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED % (_CONTRACTION, _CONTRACTION)}|\p{{N}}{{1,3}}{_REST}",)),
    PreTokenizer("smollm", (r"\p{N}", _GPT2)),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", _WORDS % r"\p{N}+"), ignore_merges=True),
    PreTokenizer("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    PreTokenizer(
        "deepseek-v3",
        (
            r"\p{N}{1,3}",
            r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    ),
    PreTokenizer("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
)

LLAMA_CPP_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "🚀 (normal) 😶\u200d🌫\ufe0f (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 "
    "3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)
"""Text by which llama.cpp's converter tells tokenizers apart."""

MORE_TEXTS = (
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)  # 0\n\n\tend\r\n\r\n  x = 2**31\n",
    "Ünïcödé ÀÉÎ straße, ça va? Ωμέγα ЖИЗНЬ и вода; 東京タワー 한국어 हिन्दी ภาษาไทย עברית العربية",
    "camelCaseWords HTTPServer iPhone15Pro ABC's they'll THEY'LL 1,234,567.89 2026-11-26T06:00 10% $5 a/b\\c <|x|> [y]",
    " leading and trailing  \n\n\n",
)


@dataclass(frozen=True, slots=True)
class Match:
    """The best matching pre-tokenizer."""

    name: str
    unlike: str
    """Text that it splits differently; "" for none."""


def find_pre_tokenizer(spec: Mapping[str, Any]) -> Match:
    """Return the best match for a tokenizer.json.

    Raises UserError if every candidate tokenizes LLAMA_CPP_TEXT differently.
    """
    original, imitation = _tokenizer(spec), _tokenizer(_without_rules(spec))
    ignores = bool(spec["model"].get("ignore_merges"))
    found: list[tuple[int, bool, int, Match]] = []
    reached: bool | None = None
    for place, candidate in enumerate(PRE_TOKENIZERS):
        _follow(imitation, candidate)
        if _ids(original, LLAMA_CPP_TEXT) != _ids(imitation, LLAMA_CPP_TEXT):
            continue
        unlike = [part for text in (LLAMA_CPP_TEXT, *MORE_TEXTS) if (part := _difference(original, imitation, text))]
        if candidate.ignore_merges != ignores:
            reached = _all_reached(imitation, spec) if reached is None else reached
        if candidate.ignore_merges != ignores and not reached:
            unlike.append("a word that is a token which no merges make")
        match = Match(candidate.name, unlike[0] if unlike else "")
        found.append((len(unlike), candidate.ignore_merges != ignores, place, match))
    if not found:
        raise UserError(
            "the tokenizer splits texts as none of llama.cpp's pre-tokenizers does ("
            + ", ".join(candidate.name for candidate in PRE_TOKENIZERS)
            + "), so llama.cpp would give the model other tokens than it was trained on; write --format hf, and see "
            "whether llama.cpp's convert_hf_to_gguf.py knows the tokenizer"
        )
    return min(found, key=lambda item: item[:3])[3]


def _without_rules(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json with the vocabulary and merges of `spec` and only what llama.cpp reads of the rest."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = [token | flags for token in spec["added_tokens"]]
    return {**spec, "normalizer": None, "post_processor": None, "added_tokens": added}


def _follow(imitation: Any, candidate: PreTokenizer) -> None:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in candidate.expressions]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    imitation.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    imitation.model.ignore_merges = candidate.ignore_merges


def _all_reached(imitation: Any, spec: Mapping[str, Any]) -> bool:
    """Return True if merges produce every token, so that ignore_merges makes no difference."""
    ignores, imitation.model.ignore_merges = imitation.model.ignore_merges, False
    added = {token["content"] for token in spec["added_tokens"]}
    reached = all(len(imitation.model.tokenize(word)) == 1 for word in spec["model"]["vocab"] if word not in added)
    imitation.model.ignore_merges = ignores
    return reached


def _tokenizer(spec: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(spec))


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _pieces(tokenizer: Any, text: str) -> Sequence[str]:
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _difference(original: Any, imitation: Any, text: str) -> str:
    """Return the first piece of `text` that is split differently, in both forms; "" if the tokens are equal."""
    ours, theirs = _pieces(original, text), _pieces(imitation, text)
    if ours == theirs:
        return "" if _ids(original, text) == _ids(imitation, text) else f"the tokens of {text[:40]!r}"
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{_text(ours[place : place + 2])} becomes {_text(theirs[place : place + 2])}"


def _text(pieces: Sequence[str]) -> str:
    from tokenizers import decoders

    decode = decoders.ByteLevel().decode
    return "|".join(repr(decode([piece])) for piece in pieces)
