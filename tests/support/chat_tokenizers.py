"""Tokenizers that have the markers of every named chat template, built as the families build theirs."""

from __future__ import annotations

import functools
import json
import pydoc_data.topics
from typing import Any

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Pattern by which Llama 3 and Qwen cut a text into words: line breaks stay together, whatever follows them."""

KINDS = ("llama3", "gpt2", "llama2", "metaspace", "phi3")


@functools.cache
def chat_tokenizer(kind: str = "llama3") -> Any:
    """Return a tokenizer of 1,330 entries, trained on CPython's language reference.

    llama3: bytes, puts <s> in front. gpt2: bytes, a line break before a letter is a token of its own; has <s>, and puts
    it nowhere. llama2: a space in front of every stretch between special tokens. metaspace: only in front of the text.
    phi3: as llama2, and the special tokens take in the white space after them.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from distlora.data.chat_template import NAMED, TOOL_MARKERS

    named = " ".join([*NAMED.values(), *TOOL_MARKERS.values()]).split()
    markers = list(dict.fromkeys(["<pad>", "<s>", "</s>", *named]))
    if kind in ("llama3", "gpt2"):
        bpe = Tokenizer(models.BPE())
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        cut = [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")] if kind == "llama3" else []
        bpe.pre_tokenizer = pre_tokenizers.Sequence([*cut, words])
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<pad>", fuse_unk=True))
        if kind == "metaspace":
            bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = ["\u2581"]
        markers += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1330, special_tokens=markers, initial_alphabet=alphabet, show_progress=False, max_token_length=16
    )
    texts = list(pydoc_data.topics.topics.values())
    if kind not in ("llama3", "gpt2"):  # Line breaks are bytes there, in no merge.
        texts = [part.replace("\n", " ") for topic in texts for part in topic.split("\n\n")]
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())  # Bytes are entries of the vocabulary, no markers in the text.
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    for token in state["added_tokens"]:
        token["rstrip"] = kind == "phi3" and token["content"] in named
    bpe = Tokenizer.from_str(json.dumps(state))
    if kind == "llama3":
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
