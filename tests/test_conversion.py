"""Find the tensors of each parameter on disk as transformers loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from closeness import relative_error
from distlora.architecture.families import names_on_disk
from distlora.architecture.safetensors_headers import read_headers
from distlora.config import UserError
from distlora.weights.conversion import CheckpointLayout, Source, find_sources, layout_of
from distlora.weights.reader import Reader
from family_models import edit_config, hf_model, load_ours, our_logits, tokens, write_family_folder


def read(source: Source) -> torch.Tensor:
    with Reader() as reader:
        numel = sum(segment.numel for segment in source.segments)
        return reader.read(source.segments, 0, numel).view(source.shape)


EXPERTS = 12
"""More than ten: by plain sorting, expert 10 would come before expert 2."""


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        ("MixtralConfig", {"num_local_experts": EXPERTS, "head_dim": 8}),
        ("Qwen3MoeConfig", {"num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8}),
    ],
)
def test_merged_experts_are_disk_tensors_in_flat_order(
    tmp_path: Path, config_class: str, settings: dict[str, Any]
) -> None:
    """Check Mixtral and Qwen-MoE, which store each expert's projections separately."""
    config = getattr(transformers, config_class)(
        vocab_size=101,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        **settings,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    headers = read_headers(tmp_path)
    assert len(headers) > 2 * 3 * EXPERTS, "the experts are not apart on disk, so this says nothing"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    state = model.state_dict()
    sources = find_sources(layout_of(model), headers, list(state))
    assert sources.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(read(sources[name]), tensor), name
    gate_up = next(name for name in state if name.endswith("experts.gate_up_proj"))
    assert len(sources[gate_up].segments) == 2 * EXPERTS


def layout(*transforms: WeightConverter, names: tuple[str, ...]) -> CheckpointLayout:
    return CheckpointLayout(names=names, transforms=transforms, base_model_prefix="model")


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return read_headers(folder)


CONVERTERS = [
    (
        WeightConverter("x.qkv", ["x.q", "x.k"], operations=[Chunk(dim=0)]),
        {"x.qkv": (4, 3)},
        "x.k",
        r"Chunk\(dim=0\), and fills several parameters from one",
    ),
    (
        WeightConverter("x.w", "x.weight", operations=[Transpose(0, 1)]),
        {"x.w": (4, 3)},
        "x.weight",
        r"Transpose is more than renaming and merging",
    ),
    (
        WeightConverter(["x.a", "x.b"], "x.weight", operations=[Concatenate(dim=1)]),
        {"x.a": (4, 3), "x.b": (4, 3)},
        "x.weight",
        r"Concatenate\(dim=1\) cuts through tensors",
    ),
    (
        WeightConverter("x.*.w", "x.weight", operations=[MergeModulelist(dim=1)]),
        {"x.0.w": (4, 3), "x.1.w": (4, 3)},
        "x.weight",
        r"MergeModulelist\(dim=1\) is more than",
    ),
    (
        WeightConverter("x.*.w", "x.weight", operations=[MergeModulelist(dim=0)]),
        {"x.0.w": (4, 3), "x.1.w": (3, 4)},
        "x.weight",
        r"stacked from tensors of shapes \[3, 4\] and \[4, 3\]",
    ),
]


@pytest.mark.parametrize(("converter", "tensors", "wanted", "reason"), CONVERTERS, ids=lambda value: str(value)[:40])
def test_unsupported_conversions_are_refused(
    tmp_path: Path, converter: WeightConverter, tensors: dict[str, tuple[int, ...]], wanted: str, reason: str
) -> None:
    headers = stored(tmp_path, {name: torch.randn(shape) for name, shape in tensors.items()})
    names = (wanted, *(["x.q"] if wanted == "x.k" else []))
    with pytest.raises(UserError, match=reason):
        find_sources(layout(converter, names=names), headers, [wanted])
    assert find_sources(layout(converter, names=(*names, "other")), headers, ["other"]) == {}, "nobody asked for it"


def rename_on_disk(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Give every tensor another name, or drop it (None)."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    renamed = {new: tensor for name, tensor in tensors.items() if (new := rename(name)) is not None}
    safetensors.torch.save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


LAYOUTS: list[tuple[str, str, str]] = [
    ("gemma3-untied", r"as the hub has it", "language_model.model."),
    ("gemma3-untied", r"as transformers 4.52 saved it", "model.language_model."),
    ("gemma3", "the bare Gemma3Model", "language_model."),
    ("llama3-tied", "the bare decoder", ""),
]


@pytest.mark.parametrize(("name", "kind", "prefix"), LAYOUTS, ids=str)
def test_every_layout_of_transformers_is_read(tmp_path: Path, name: str, kind: str, prefix: str) -> None:
    write_family_folder(tmp_path / "model", name)
    own = "language_model.model." if name.startswith("gemma3") else "model."

    def rename(stored: str) -> str | None:
        if stored.endswith("lm_head.weight"):
            return stored if prefix == own else "lm_head.weight"
        return prefix + stored.removeprefix(own) if stored.startswith(own) else stored

    rename_on_disk(tmp_path / "model", rename)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = hf_model(name)
    ours, _ = load_ours(tmp_path / "model", quant={"method": "none"})
    early = names_on_disk(read_headers(tmp_path / "model"), ours.family)
    needed = {known for known in ours.layout.names if known.startswith(f"{ours.family.decoder}.")}
    assert needed <= early.keys(), "the launcher would miss what is there"
    for _, linear in ours.adapted_linears():
        for pair in linear.adapters.values():
            pair.B.data.zero_()  # type: ignore[operator, union-attr]
    input_ids = tokens(1, 20)
    with torch.no_grad():
        logits = our_logits(ours, input_ids)
        assert relative_error(theirs(input_ids).logits, expected(input_ids).logits) == 0.0, "transformers reads it not"
        assert relative_error(logits, expected(input_ids).logits) <= 1e-6


def test_weights_missing_in_config_json_are_refused(tmp_path: Path) -> None:
    """Check biases that transformers would drop with a log line, training another model."""
    write_family_folder(tmp_path, "llama-biases")
    edit_config(tmp_path, attention_bias=False)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\..*bias \(12 such tensors\), which config.json does"):
        load_ours(tmp_path)


def test_tied_head_that_differs_on_disk_is_refused(tmp_path: Path) -> None:
    """Check heads that transformers would leave untied despite config.json."""
    write_family_folder(tmp_path, "llama3-tied")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    load_ours(tmp_path)
    tensors["lm_head.weight"] += 0.1
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    with pytest.raises(UserError, match=r"ties the head.*lm_head.weight and model.embed_tokens.weight differ"):
        load_ours(tmp_path)
