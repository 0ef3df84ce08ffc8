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
from typing import Any

from gguf import GGUFWriter, TokenType

from distlora.config import UserError
from distlora.post.export.gguf.pre_tokenizers import LLAMA_CPP_TEXT, MORE_TEXTS, find_pre_tokenizer
from distlora.post.export.gguf.supported import CONVERTER

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
    if pieces:
        types = [_piece_type(text, type, unknown) for text, type in zip(tokens, types, strict=True)]
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


def _piece_type(text: str, type: TokenType, unknown: str | None) -> TokenType:
    if text == unknown:
        return TokenType.UNKNOWN
    return TokenType.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else type


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
