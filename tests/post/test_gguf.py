"""Check that transformers and llama.cpp load GGUF files and compute the same as from the folder.

Tokenizers are told apart by their behaviour. llama.cpp sums in another order, and its exp is its own: logits of up to 4
differ by 1e-5 in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from distlora.config import UserError
from distlora.post.export.formats import check_model
from distlora.post.export.gguf.adapter_format import check_paths, write_adapter
from distlora.post.export.gguf.model_format import LlamaCpp, has_llama_cpp, transformers_model, write_model
from distlora.post.export.gguf.tensors import TYPES, Planned, Weight
from distlora.post.export.gguf.vocabulary import (
    LLAMA_CPP_TEXT,
    MORE_TEXTS,
    Match,
    find_pre_tokenizer,
    merges_of,
    scores_of,
    tokenize,
)
from distlora.post.weights import Factors, open_base
from distlora.weights.reader import Reader
from support.family_models import WINDOW, config_for, edit_config, tokens, write_family_folder
from support.gguf_files import described_here
from support.small_models import tokenizer

# The expressions of known tokenizer.json files, which llama.cpp has in other words.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


VARIANTS = ["llama-biases", "llama3-tied", "llama-yarn", "mistral-window", "qwen2-tied-window", "qwen3"]
"""Every architecture and every rotary embedding."""


def write_gguf(folder: Path, path: Path, dtype: str, tokenizer: Any, say: Callable[[str], object] = print) -> None:
    """Write the model of a folder as it is on disk."""
    base = open_base(config_for(folder, quant={"method": "none"}).spec)
    with Reader() as reader:
        weights = {
            name: Weight(
                name=name, shape=weight.shape, rows=lambda weight=weight: (part for _, part in weight.rows(reader))
            )
            for name, weight in base.weights.items()
        }
        write_model(path, base.model.hf_config, weights, tokenizer, dtype=dtype, name="tiny", say=say)


@torch.no_grad()
def logits_of(folder: Path, input_ids: torch.Tensor, **how: Any) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    logits: torch.Tensor = model(input_ids).logits
    return logits


def sentencepiece_spec() -> dict[str, Any]:
    """Return a tokenizer.json as transformers makes it from SentencePiece: a merge per way to join tokens."""
    words = ["the", "value", "of", "an", "expression", "statement", "is", "not", "in", "import", "return", "function"]
    texts = list(dict.fromkeys("▁" + word[:end] for word in words for end in range(1, len(word) + 1)))
    texts += list(dict.fromkeys(word[a:b] for word in words for a in range(len(word)) for b in range(a + 2, a + 5)))
    texts = [text for text in dict.fromkeys(texts) if len(text) > 1]
    letters = sorted(set("".join(texts)))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for text in (*texts, *letters):
        vocabulary.setdefault(text, len(vocabulary))
    merges = [
        (text[:cut], text[cut:])
        for text in texts
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spec: dict[str, Any] = json.loads(made.to_str())
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return spec


def in_llama_cpp(test: Any) -> Any:
    """Run a test only where llama-cpp-python is installed; `make test-llama-cpp` builds it in minutes."""
    skip = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed; `make test-llama-cpp`")
    return pytest.mark.llama_cpp(skip(test))


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_same_from_the_file(variant: str, tmp_path: Path) -> None:
    """Load every tensor, with the rows of q and k in their original order.

    transformers takes the rotary embedding from config.json here, as it reads only the plain one from GGUF.
    """
    write_family_folder(tmp_path, variant)
    said: list[str] = []
    write_gguf(tmp_path, tmp_path / "model.gguf", "fp32", tokenizer(), said.append)
    windowed = "window" in variant
    input_ids = tokens(1, WINDOW if windowed else 40)
    model = transformers_model(tmp_path / "model.gguf", transformers.AutoConfig.from_pretrained(tmp_path))
    with torch.no_grad():
        theirs = model(input_ids).logits
    assert torch.equal(theirs, logits_of(tmp_path, input_ids))
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    context = next(field for name, field in fields.items() if name.endswith(".context_length")).contents()
    assert context == (WINDOW if windowed else 512)
    assert any("window of 16" in line for line in said) == windowed


@pytest.mark.parametrize("variant", ["llama3-tied", "mistral-window", "qwen2-tied-window", "qwen3"])
def test_the_file_is_read_as_the_base_that_it_was_written_from(variant: str, tmp_path: Path) -> None:
    """Read back every tensor, Llama 3's rotary embedding, and the tokenizer. GGUF has no Mistral and no windows."""
    write_family_folder(tmp_path, variant)
    if variant.startswith("llama3"):
        rope = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
        edit_config(tmp_path, rope_parameters=rope | {"original_max_position_embeddings": 8192})
    write_gguf(tmp_path, tmp_path / "model.gguf", "fp32", tokenizer())
    folder = described_here(tmp_path / "model.gguf", tmp_path / "described")
    was, now = (transformers.AutoConfig.from_pretrained(place) for place in (tmp_path, folder))
    for name in ("rope_parameters", "head_dim", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        theirs, ours = (getattr(config, name, None) for config in (was, now))
        assert ours == (pytest.approx(theirs) if isinstance(theirs, float) else theirs), name
    read = open_base(config_for(folder, quant={"method": "none"}).spec)
    exact = open_base(config_for(tmp_path, quant={"method": "none"}).spec)
    assert read.weights.keys() == exact.weights.keys()
    with Reader() as reader:
        for name, weight in exact.weights.items():
            assert torch.equal(read.weights[name].whole(reader), weight.whole(reader)), name
    if variant.startswith("qwen2"):  # transformers reads any tokenizer of this type with Qwen's pre-tokenizer.
        return
    texts = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (LLAMA_CPP_TEXT, *MORE_TEXTS):
        assert texts(text).input_ids == tokenizer()(text).input_ids


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "q8_0"])
def test_types_are_those_of_llama_cpps_converter(dtype: str, tmp_path: Path) -> None:
    write_family_folder(tmp_path, "llama")
    write_gguf(tmp_path, tmp_path / "model.gguf", dtype, tokenizer())
    kinds = {"bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0"}
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert read["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert read["token_embd.weight"].tensor_type.name == kinds[dtype]
    # 200 columns are no blocks of 32.
    assert read["blk.0.ffn_down.weight"].tensor_type.name == ("F16" if dtype == "q8_0" else kinds[dtype])
    weight = open_base(config_for(tmp_path, quant={"method": "none"}).spec).weights["model.layers.0.mlp.up_proj.weight"]
    with Reader() as reader:
        exact = weight.whole(reader).numpy()
    up = read["blk.0.ffn_up.weight"]
    error = np.abs(gguf.quants.dequantize(up.data, up.tensor_type) - exact)
    # Half a step: of 8 bits of mantissa, of 11, of a block's largest / 127 with a scale in fp16.
    bound = {"bf16": 2**-9, "fp16": 2**-12, "q8_0": 0.51 / 127}[dtype]
    assert (error <= 2 * bound * np.abs(exact).max()).all()


def test_a_weight_beyond_fp16_is_refused(tmp_path: Path) -> None:
    write_family_folder(tmp_path, "qwen3")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e5
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight has a weight of 1e\+05.*--dtype bf16"):
        write_gguf(tmp_path, tmp_path / "model.gguf", "fp16", tokenizer())


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(weight: float) -> None:
    rows = torch.zeros(2, 32)
    rows[1, 5] = weight
    tensor = Planned(name="blk.0.ffn_up.weight", shape=(2, 32), type=TYPES["bf16"], rows=lambda: iter([rows]))
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight holds NaN or Inf"):
        list(tensor.encoded())


@pytest.mark.parametrize(
    ("expected", "expressions", "regex", "ignores"),
    [
        ("gpt-2", (), True, False),
        ("llama-bpe", (_LLAMA3,), False, True),
        ("qwen2", (_QWEN2,), False, False),
        ("tekken", (_TEKKEN,), False, True),
        ("smollm", (r"\p{N}",), True, False),
    ],
)
def test_a_pre_tokenizer_is_known_by_what_it_does(
    expected: str, expressions: Sequence[str], regex: bool, ignores: bool
) -> None:
    """The vocabulary is of this project's own, whose hash no table has."""
    match = find_pre_tokenizer(spec_with(expressions, regex=regex, ignores=ignores))
    assert match.name == expected
    # llama.cpp's expression for Mistral Nemo's tokenizer lets no combining mark into a word.
    assert bool(match.unlike) == (expected == "tekken")


def test_ignored_merges_are_told_by_the_vocabulary() -> None:
    """No text need hold the word that tells: llama-bpe takes it whole, and these merges do not make it."""
    spec = spec_with((_LLAMA3,), regex=False)
    assert find_pre_tokenizer(spec).name == "dbrx"
    spec["model"]["ignore_merges"] = True
    assert find_pre_tokenizer(spec).name == "llama-bpe"
    spec = spec_with((_QWEN2,), regex=False, ignores=True)
    assert find_pre_tokenizer(spec) == Match("qwen2", "")  # Merges make every token: it does not matter.
    spec["model"]["vocab"]["zzqx"] = len(spec["model"]["vocab"])
    assert "no merges make" in find_pre_tokenizer(spec).unlike


def spec_with(expressions: Sequence[str], *, regex: bool, ignores: bool = False, **more: Any) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(tokenizer().backend_tokenizer.to_str())
    splits = [
        {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False} for text in expressions
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex, **more}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, to_bytes]}
    spec["model"]["ignore_merges"] = ignores
    return spec


def test_a_pre_tokenizer_that_llama_cpp_has_not_is_refused() -> None:
    with pytest.raises(UserError, match=r"none of llama\.cpp's pre-tokenizers"):
        find_pre_tokenizer(spec_with((), regex=True, add_prefix_space=True))


def test_sentencepieces_scores_lead_llama_cpp_to_the_same_tokens() -> None:
    spec = sentencepiece_spec()
    original, vocabulary = Tokenizer.from_str(json.dumps(spec)), spec["model"]["vocab"]
    scores = scores_of(vocabulary, merges_of(spec["model"]))
    assert scores["▁t"] == 0 > scores["▁th"] > scores["e"]
    for text in (LLAMA_CPP_TEXT, *MORE_TEXTS, "the statement returns importance"):
        same = tokenize(text, vocabulary, scores, prefix=True) == original.encode(text).ids
        assert same == (not text.startswith(" "))  # Where there is a space, tokenizers adds none; SentencePiece does.


def test_an_adapter_without_effect_has_none(tmp_path: Path) -> None:
    write_family_folder(tmp_path, "qwen3")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    own = Factors(A=torch.ones(4, 96), B=torch.ones(200, 4), scaling=0.0)
    factors = {"model.layers.0.mlp.up_proj": lambda: own}
    write_adapter(tmp_path / "adapter.gguf", config, factors, dtype="fp32", name="tiny")
    file = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert file.fields["adapter.lora.alpha"].contents() == 1
    assert not next(tensor for tensor in file.tensors if tensor.name.endswith("b")).data.any()


def test_an_adapter_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    """llama.cpp has no tensor for it, and would not load the adapter."""
    write_family_folder(tmp_path, "llama3-tied")
    base = open_base(config_for(tmp_path).spec)
    check_paths(["model.layers.0.mlp.up_proj"], base)
    with pytest.raises(UserError, match="lm_head, which is not in the base's GGUF"):
        check_paths(["model.layers.0.mlp.up_proj", "lm_head"], base)


def test_a_scale_for_each_weight_becomes_one_for_the_file(tmp_path: Path) -> None:
    """llama.cpp adds (alpha / R) B A."""
    write_family_folder(tmp_path, "qwen2-tied-window")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    parts = {
        f"model.layers.{layer}.mlp.up_proj": Factors(A=torch.randn(rank, 96), B=torch.randn(200, rank), scaling=scaling)
        for layer, (rank, scaling) in enumerate([(4, 4.0), (4, 4.0), (8, 0.3)])
    }
    factors = {path: lambda own=own: own for path, own in parts.items()}
    write_adapter(tmp_path / "adapter.gguf", config, factors, dtype="fp32", name="tiny")
    file = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert file.fields["adapter.lora.alpha"].contents() == 16
    read = {tensor.name: np.array(tensor.data) for tensor in file.tensors}
    for layer, own in enumerate(parts.values()):
        a, b = (read[f"blk.{layer}.ffn_up.weight.lora_{part}"] for part in "ab")
        np.testing.assert_allclose(16 / own.rank * (b @ a), own.delta().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"model_type": "gemma3_text"}, r"'gemma3_text' is not written as GGUF.*convert_hf_to_gguf\.py"),
        ({"model_type": "mixtral"}, "no test compares its layers"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "computes silu"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "longrope"}}, "'longrope', which GGUF has no word for"),
        ({"model_type": "qwen3", "rope_parameters": {"rope_type": "yarn", "truncate": False}}, "always truncates"),
        ({"model_type": "qwen3", "attention_bias": True}, "no bias on o_proj"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(model: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        check_model(model, "config.json")


@in_llama_cpp
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
    assert (client.logits(input_ids) - theirs).abs().max() < 1e-4
    prompt = input_ids[:, : length // 2]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    # On so short a text the end-of-text token counts as any other.
    greedy = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=-1)[0, prompt.shape[1] :]
    assert client.greedy(prompt, 8) == greedy.tolist()


@in_llama_cpp
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
    assert (ours - theirs).abs().max() < 1e-4 < (theirs - base).abs().max()


@in_llama_cpp
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
        if kind == "bytes" or not text.startswith(" "):
            assert client.tokenize(text) == made(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
