"""Write a tokenizer.json as GGUF metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

SentencePiece (Llama 2, Mistral 7B): merges in tokenizer.json are ordered, while GGUF scores tokens and llama.cpp merges
the adjacent pair whose joined text has the highest score, leftmost first. Both agree if every split of a token in two
is a merge and one token's merges are adjacent, as transformers converts a SentencePiece model. Other tokenizers are
refused by comparing tokens of texts.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from distlora.config import UserError
from distlora.post.export.formats import CONVERTER

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
    # The vocabulary and merges, and only what llama.cpp reads of the rest.
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = [token | flags for token in spec["added_tokens"]]
    plain = {**spec, "normalizer": None, "post_processor": None, "added_tokens": added}
    original, imitation = _tokenizer(spec), _tokenizer(plain)
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
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


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


_NEVER = -1e6
"""Score of a token that no text merges into."""


def add_vocabulary(writer: GGUFWriter, tokenizer: Any, rows: int, say: Callable[[str], None]) -> None:
    """Add a transformers tokenizer; embedding rows without a token are named [PAD<row>].

    Raises UserError for a tokenizer that llama.cpp would not follow.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = spec["model"], {token["id"]: token for token in spec["added_tokens"]}
    if model["type"] != "BPE":
        raise UserError(
            f"the tokenizer is a {model['type']}, and GGUF is written here for BPE alone (byte-level, or "
            f"SentencePiece's). {CONVERTER}"
        )
    pieces = bool(model.get("byte_fallback"))
    texts = {id: text for text, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    if (highest := max(texts)) >= rows:
        raise UserError(
            f"the tokenizer has a token {highest} ({texts[highest]!r}), and the embedding {rows:,} rows; llama.cpp "
            "wants a row for every token, so write --format hf"
        )
    (_add_pieces if pieces else _add_bytes)(writer, spec, say)
    tokens = [texts.get(id, f"[PAD{id}]") for id in range(rows)]
    writer.add_token_list(tokens)
    if pieces:
        scores = scores_of(model["vocab"], merges_of(model))
        writer.add_token_scores([_NEVER if id in added else scores.get(text, _NEVER) for id, text in enumerate(tokens)])
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges_of(model)])
    unknown = model.get("unk_token") or tokenizer.unk_token
    types = [_type_of(id, texts.get(id), added) for id in range(rows)]
    for id, text in enumerate(tokens if pieces else ()):
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[id] = TokenType.BYTE
        elif text == unknown:
            types[id] = TokenType.UNKNOWN
    writer.add_token_types(types)
    _add_special(writer, tokenizer, rows)


def _add_bytes(writer: GGUFWriter, spec: Mapping[str, Any], say: Callable[[str], None]) -> None:
    match = find_pre_tokenizer(spec)
    if match.unlike:
        say(
            f"warning: {match.name} is the nearest of llama.cpp's pre-tokenizers, and does not split every text as the "
            f"model's tokenizer does: {match.unlike}"
        )
    normalizer = spec.get("normalizer")
    if normalizer is not None:
        say(
            f"the tokenizer normalizes texts first ({normalizer['type']}), and llama.cpp does not: a text that is not "
            "normalized already gets other tokens there"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(match.name)


def _add_pieces(writer: GGUFWriter, spec: Mapping[str, Any], say: Callable[[str], None]) -> None:
    from tokenizers import Tokenizer

    original, model = Tokenizer.from_str(json.dumps(spec)), spec["model"]
    scores = scores_of(model["vocab"], merges_of(model))
    prefix = original.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
    for text in (LLAMA_CPP_TEXT, *MORE_TEXTS):
        ours = original.encode(text, add_special_tokens=False).ids
        theirs = tokenize(text, model["vocab"], scores, prefix=prefix)
        if ours == theirs:
            continue
        place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
        before = original.decode(ours[:place])[-30:]
        token, other = original.id_to_token(ours[place]), original.id_to_token(theirs[place])
        unlike = f"{before!r} is followed by {token!r}, and there by {other!r}"
        if text == LLAMA_CPP_TEXT:
            raise UserError(f"llama.cpp would split texts otherwise than the tokenizer: {unlike}; write --format hf")
        say(f"warning: llama.cpp does not split every text as the model's tokenizer does: {unlike}")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)


def _type_of(id: int, text: str | None, added: Mapping[int, Mapping[str, Any]]) -> TokenType:
    """Return a token's type as llama.cpp's converter does: <|...|> is a control token in any case."""
    if text is None:
        return TokenType.UNUSED
    if id not in added:
        return TokenType.NORMAL
    looks_special = text in ("<pad>", "<mask>") or (text.startswith("<|") and text.endswith("|>"))
    return TokenType.CONTROL if added[id]["special"] or looks_special else TokenType.USER_DEFINED


def _add_special(writer: GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Add the special tokens, start and end flags, and the chat template."""
    for part in ("bos", "eos", "unk", "pad"):
        id = getattr(tokenizer, f"{part}_token_id")
        if isinstance(id, int) and id < rows:
            getattr(writer, f"add_{part}_token_id")(id)
    inner, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    extra = len(whole) - len(inner)
    writer.add_add_bos_token(extra > 0 and whole[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(extra > 0 and whole[-1] == tokenizer.eos_token_id and inner[-1:] != whole[-1:])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


SPACE = "▁"


def scores_of(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return SentencePiece scores of tokens.

    A score is minus the index among merge results, then minus that of single characters by id; else 0.
    """
    places: dict[str, int] = {}
    for left, right in merges:
        places.setdefault(left + right, len(places))
    for token in sorted(vocabulary, key=lambda token: vocabulary[token]):
        if len(token) == 1:
            places.setdefault(token, len(places))
    return {token: -float(places.get(token, 0)) for token in vocabulary}


def tokenize(text: str, vocabulary: Mapping[str, int], scores: Mapping[str, float], *, prefix: bool) -> list[int]:
    """Tokenize text without special tokens as llama.cpp does (llama-vocab.cpp, llm_tokenizer_spm_session)."""
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
    """Return the merges of a tokenizer.json's model, in either of its two forms."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]
