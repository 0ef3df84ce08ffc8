"""GGUF files in llama.cpp itself: logits, greedy tokens and tokenization beside transformers'.

llama.cpp sums in another order, and its exp is its own: logits of up to 4 differ by 1e-5 in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distlora.post.adapter_factors import Factors
from distlora.post.export.gguf.adapter_format import write_adapter
from distlora.post.export.gguf.clients import LlamaCpp, has_llama_cpp
from distlora.post.export.gguf.pre_tokenizers import LLAMA_CPP_TEXT, MORE_TEXTS
from family_models import WINDOW, edit_config, tokens, write_family_folder
from gguf_files import VARIANTS, logits_of, sentencepiece_spec, write_gguf
from small_models import tokenizer

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(
        not has_llama_cpp(), reason="llama-cpp-python is not installed; `make test-llama-cpp` builds it in minutes"
    ),
]
BOUND = 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same(variant: str, tmp_path: Path) -> None:
    write_family_folder(tmp_path, variant)
    if variant == "llama-yarn":  # What multiplies cos and sin, in place of that which follows from the factor.
        rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "attention_factor": 1.3}
        edit_config(tmp_path, rope_parameters=rope)
    write_gguf(tmp_path, tmp_path / "model.gguf", "fp32", tokenizer())
    length = WINDOW if "window" in variant else 96
    input_ids = tokens(1, length)
    theirs = logits_of(tmp_path, input_ids)
    client = LlamaCpp(tmp_path / "model.gguf", context=length)
    assert (client.logits(input_ids) - theirs).abs().max() < BOUND
    prompt = input_ids[:, : length // 2]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    # On so short a text the end-of-text token counts as any other.
    greedy = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=-1)[0, prompt.shape[1] :]
    assert client.greedy(prompt, 8) == greedy.tolist()


def test_a_smaller_type_moves_logits_by_what_it_rounds(tmp_path: Path) -> None:
    write_family_folder(tmp_path, "llama")
    input_ids = tokens(1, 64)
    theirs = logits_of(tmp_path, input_ids)
    moved = {}
    for dtype in ("bf16", "fp16", "q8_0"):
        write_gguf(tmp_path, tmp_path / f"{dtype}.gguf", dtype, tokenizer())
        logits = LlamaCpp(tmp_path / f"{dtype}.gguf", context=64).logits(input_ids)
        moved[dtype] = float((logits - theirs).norm() / theirs.norm())
    # 2**-9 and 2**-12 of each weight, and 1/254 of a block's largest, times about sqrt(3 blocks * 3 matrices).
    assert BOUND < moved["fp16"] < moved["bf16"] < 0.02
    assert moved["q8_0"] < 0.05  # Activations are rounded to 8 bits too.


def test_a_lora_on_the_bases_file_is_what_we_add(tmp_path: Path) -> None:
    """With a scale of its own for one weight, and the rows of q turned."""
    write_family_folder(tmp_path, "llama-biases")
    write_gguf(tmp_path, tmp_path / "base.gguf", "fp32", tokenizer())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    parts = {
        "model.layers.0.self_attn.q_proj": Factors(A=torch.randn(4, 96) / 10, B=torch.randn(96, 4) / 10, scaling=4.0),
        "model.layers.2.mlp.down_proj": Factors(A=torch.randn(8, 200) / 10, B=torch.randn(96, 8) / 10, scaling=0.7),
    }
    factors = {path: lambda own=own: own for path, own in parts.items()}
    write_adapter(tmp_path / "adapter.gguf", config, factors, dtype="fp32", name="tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    input_ids = tokens(1, 64)
    with torch.no_grad():
        base = model(input_ids).logits
        for path, own in parts.items():
            model.get_submodule(path).weight += own.delta()
        theirs = model(input_ids).logits
    ours = LlamaCpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf", context=64).logits(input_ids)
    assert (ours - theirs).abs().max() < BOUND < (theirs - base).abs().max()


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_llama_cpp_splits_texts_as_the_tokenizer_does(kind: str, tmp_path: Path) -> None:
    write_family_folder(tmp_path, "qwen3")
    made = tokenizer()
    if kind == "pieces":
        backend = Tokenizer.from_str(json.dumps(sentencepiece_spec()))
        made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    write_gguf(tmp_path, tmp_path / "model.gguf", "fp32", made)
    client = LlamaCpp(tmp_path / "model.gguf", context=16)
    for text in (LLAMA_CPP_TEXT, *MORE_TEXTS, "the statement <|x|> returns importance<eos>"):
        if kind == "bytes" or not text.startswith(" "):  # test_gguf.py
            assert client.tokenize(text) == made(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
