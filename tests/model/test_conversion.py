"""Find the tensors of each parameter on disk as transformers loads them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
    revert_weight_conversion,
)

from distlora.architecture.disk_names import DiskNames, model_names, natural_order
from distlora.architecture.safetensors_headers import read_headers
from distlora.config import UserError
from distlora.derive.shrink import build, build_on_meta, decoder_layers, shrink
from distlora.weights import conversion
from distlora.weights.conversion import (
    MAX_PIECES,
    CheckpointLayout,
    ParameterSource,
    disk_names_of,
    find_sources,
    layout_of,
)
from distlora.weights.reader import Reader
from support.closeness import relative_error
from support.family_models import edit_config, hf_model, load_ours, our_logits, tokens, write_family_folder
from support.model_types import CAUSAL, COMPOSITES, UNBUILDABLE, VARIANTS, config_of, on_page
from support.tiers import ci


def read(source: ParameterSource) -> torch.Tensor:
    with Reader() as reader:
        numel = sum(segment.numel for segment in source.segments)
        return reader.read(source.segments, 0, numel).view(source.shape)


EXPERTS = 12
"""More than ten: by plain sorting, expert 10 would come before expert 2."""


NAMES = [name for name in on_page((*CAUSAL, *COMPOSITES, *VARIANTS)) if name not in UNBUILDABLE]
SEAMS = {"mixtral", "qwen3_moe", "lara_mini", "sarvam_moe", "hrm_text", "inkling2_text", "zamba", "youtu", "kimi_k25"}
"""Types of which transformers merges, cuts, interleaves, shares or zeroes something on load; one with images."""
CUT = {"lara_mini", "sarvam_moe", "hrm_text", "inkling2_text", "kimi_k25", "mistral_large4"}
PERMUTED = {"kimi_k25", "mistral_large4"} & {*COMPOSITES}
"""Types of which transformers permutes rows of the vision tower on load; the others' towers are not read."""
NOT_READ = {"inkling2_loop_text": "Inkling2LoopDequantizeExperts does more than move whole rows"}


@pytest.mark.parametrize("name", [name if name in SEAMS else ci(name) for name in NAMES])
def test_sources_are_what_transformers_loads(tmp_path: Path, name: str) -> None:
    """Check every parameter of the text model bit for bit, and that the names alone say where it comes from."""
    small = shrink(config_of(name))
    small["pad_token_id"] = 5  # A row that some types zero.
    small |= {key: EXPERTS for key in ("num_local_experts", "num_experts") if name in ("mixtral", "qwen3_moe")}
    torch.manual_seed(0)
    made = build(small)
    with torch.no_grad():
        for parameter in made.parameters():  # No two alike, and no zeros.
            parameter.add_(torch.rand_like(parameter) + 0.1)
    made.save_pretrained(tmp_path)
    headers, empty = read_headers(tmp_path), build_on_meta(small)
    layout = layout_of(empty)
    check_names(empty, layout)
    state = type(made).from_pretrained(tmp_path).state_dict()
    if name in COMPOSITES and name not in PERMUTED:
        paths = {module: path for path, module in empty.named_modules()}
        scope = paths[decoder_layers(empty)].rpartition(".")[0]
        state = {key: tensor for key, tensor in state.items() if key.startswith((f"{scope}.", f"{layout.head}."))}
        assert conversion.names_without_a_place(layout, headers, scope) == []
    if name in NOT_READ:
        with pytest.raises(UserError, match=NOT_READ[name]):
            find_sources(layout, headers, list(state))
        return
    sources = find_sources(layout, headers, list(state))
    assert sources.keys() == state.keys()
    assert (layout.zeroed_row is not None) == (name == "youtu")
    for key, tensor in state.items():
        loaded = read(sources[key]).to(tensor.dtype)
        if layout.zeroed_row is not None and layout.tied.get(key, key) == layout.embedding:
            assert loaded[layout.zeroed_row].all()
            loaded[layout.zeroed_row] = 0
        assert torch.equal(loaded, tensor), key
    by_name = model_names(rules_of(layout), headers, layout.names)
    for key, source in sources.items():
        assert sorted(by_name.get(key) or by_name[layout.tied[key]]) == sorted(source.names), key
    assert all(source.whole for source in sources.values()) != (name in CUT)
    if name in ("mixtral", "qwen3_moe"):
        gate_up = next(key for key in state if key.endswith("experts.gate_up_proj"))
        assert len(sources[gate_up].segments) == 2 * EXPERTS
    if name == "zamba":
        shared = [key for key in layout.tied if ".shared_transf." in key]
        assert shared, "nothing is shared"
        assert all(sources[key] == sources[layout.tied[key]] for key in shared)


def rules_of(layout: CheckpointLayout) -> DiskNames:
    """Return the rules for names as they come back from a file."""
    return DiskNames.from_json(json.loads(json.dumps(dataclasses.asdict(disk_names_of(layout)))))


ROOTS = ("", "model.", "language_model.", "language_model.model.", "model.language_model.", "backbone.", "transformer.")
DORY = [f"backbone.layers.{i}.{name}" for i in (0, 1, 3) for name in ("mixer.q_proj.weight", "attn_alpha", "mlp_alpha")]


def check_names(model: Any, layout: CheckpointLayout) -> None:
    """Compare the names with transformers' own for a checkpoint as saved, and for names with other prefixes."""
    rules, theirs = rules_of(layout), conversion._renamer(layout)
    names = {*revert_weight_conversion(model, model.state_dict()), *layout.names, *DORY}
    names |= {name.partition(".")[2] for name in names}
    for name in sorted({root + name for name in names for root in ROOTS}, key=dot_natural_key):
        target, pattern = theirs(name)
        ours, converter = rules.rename(name, layout.names)
        assert (ours, converter is None) == (target, pattern is None), name
    assert sorted(names, key=natural_order) == sorted(names, key=dot_natural_key)


def layout(*transforms: Any, names: Sequence[str], shape: tuple[int, ...] = (2, 3)) -> CheckpointLayout:
    return CheckpointLayout(shapes=dict.fromkeys(names, shape), transforms=transforms, base_model_prefix="model")


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return read_headers(folder)


class _Reversed(Chunk):
    """A conversion of which transformers may make anything."""


REFUSED = [
    (WeightConverter("x.w", "x.weight", operations=[Transpose(0, 1)]), {"x.w": (4, 3)}, r"Transpose does more than"),
    (WeightConverter("x.w", ["x.weight", "x.b"], operations=[_Reversed(0)]), {"x.w": (4, 3)}, r"_Reversed.* does more"),
    (
        WeightConverter(["x.a", "x.b"], "x.weight", operations=[Concatenate(dim=1)]),
        {"x.a": (4, 3), "x.b": (4, 3)},
        r"Concatenate\(dim=1\), and that cuts through rows",
    ),
    (WeightConverter("x.w", ["x.weight", "x.b"], operations=[Chunk(1)]), {"x.w": (4, 6)}, r"\[4, 6\], which do not"),
    (
        WeightConverter("x.*.w", "x.weight", operations=[MergeModulelist(dim=0)]),
        {"x.0.w": (4, 3), "x.1.w": (3, 4)},
        r"shapes \[3, 4\] and \[4, 3\], which do not fit together",
    ),
    (
        WeightConverter("x.*.w", "x.weight", operations=[MergeModulelist(dim=0)]),
        {"x.0.w": (4, 3), "x.1.w": (5, 3)},
        r"shapes \[4, 3\] and \[5, 3\], which do not fit together",
    ),
    (
        WeightConverter("x.w", "x.weight", operations=[Interleave(0)]),
        {"x.w": (2 * MAX_PIECES, 2)},
        r"x\.weight lies in 32,768 pieces, more than 16,384",
    ),
]


@pytest.mark.parametrize(("converter", "tensors", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_unsupported_conversions_are_refused(
    tmp_path: Path, converter: WeightConverter, tensors: dict[str, tuple[int, ...]], reason: str
) -> None:
    headers = stored(tmp_path, {name: torch.randn(shape) for name, shape in tensors.items()})
    with pytest.raises(UserError, match=reason):
        find_sources(layout(converter, names=["x.weight", "x.b"]), headers, ["x.weight"])
    assert find_sources(layout(converter, names=["x.weight", "other"]), headers, ["other"]) == {}, "nobody asked for it"


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
    early = ours.architecture.on_disk(read_headers(tmp_path / "model"))
    needed = {known for known in ours.layout.names if known.startswith(f"{ours.architecture.decoder}.")}
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
    with pytest.raises(
        UserError, match=r"ties lm_head.weight to .*lm_head.weight and model.embed_tokens.weight differ.*set tie_word"
    ):
        load_ours(tmp_path)
