"""Read checkpoints that are shipped in low bits: values by the libraries that define the formats, blocks, refusals."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.low_bit_headers import LowBitSegment
from distlora.architecture.safetensors_headers import read_headers
from distlora.config import UserError
from distlora.post.merge_worker import merge_to
from distlora.post.trained import Name
from distlora.training.publish import publish_result
from distlora.weights.low_bit import CODECS
from distlora.weights.low_bit.codecs import read_groups
from distlora.weights.reader import Reader
from distlora_launcher.compose.checks import check_model
from support.damage import Reader as Damage
from support.damage import any_json, any_tensors, holds
from support.family_models import (
    VARIANTS,
    config_for,
    load_ours,
    our_logits,
    tokens,
    write_family_folder,
)
from support.loaded_shards import own_rows
from support.low_bit_checkpoints import CHECKPOINTS, NAME, Checkpoint, checkpoint, convert_folder, write
from support.peft_models import their_logits
from support.small_models import tokenizer
from support.tiers import ci
from support.worlds import World


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_values_are_the_reference_librarys_on_any_range(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    """Rounded once to the library's dtype they are equal bit for bit, whatever band of rows is decoded at once."""
    made = checkpoint(name)
    headers = write(tmp_path, made).headers
    assert set(headers) == set(made[2]), "companions disappear"
    for weight, expected in made[2].items():
        segment = headers[weight]
        assert (segment.shape, segment.numel) == (tuple(expected.shape), expected.numel())
        assert segment.tensor.format == CHECKPOINTS[name][2], segment.tensor.reason
        assert bool(segment.tensor.format) != bool(segment.tensor.reason)
        codec, draw = CODECS[segment.tensor.codec], random.Random(0)
        for band in (codec.band, 5 * expected.shape[-1]):
            monkeypatch.setattr(codec, "band", band)
            with Reader() as reader:
                whole = reader.read([segment], 0, segment.numel)
                assert torch.equal(whole.to(expected.dtype).view(expected.shape), expected)
                for _ in range(20):
                    start, stop = sorted(draw.choices(range(segment.numel), k=2))
                    assert torch.equal(reader.read([segment], start, stop), whole[start:stop])


MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "gpt-oss": ("mxfp4", {"hidden_size": 96, "intermediate_size": 64}, ("gate_up_proj", "down_proj")),
    "qwen3-moe": ("fp8", {}, ("_proj",)),
    "mixtral": ("ct-int4", {"intermediate_size": 64}, ("w2",)),
    "llama": ("gptq-ragged", {}, ("_proj",)),
    "qwen2": ("awq-32", {"hidden_size": 128, "intermediate_size": 192}, ("_proj",)),
    "qwen3": ("bnb-int8", {}, ("_proj",)),
    "gemma2": ("modelopt-nvfp4", {"intermediate_size": 192}, ("_proj",)),
}
"""By variant: the format, sizes that it fits, and the endings of the modules in it."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function from a variant to its folder in low bits and one with the same values in fp32."""

    @functools.cache
    def folders(variant: str) -> tuple[Path, Path]:
        place = tmp_path_factory.mktemp(variant)
        format, sizes, endings = MODELS[variant]
        with pytest.MonkeyPatch.context() as patch:
            stem, settings = VARIANTS[variant]
            patch.setitem(VARIANTS, variant, (stem, settings | sizes))
            write_family_folder(place / "source", variant)
        tokenizer().save_pretrained(place / "source")
        convert_folder(place / "source", place / "low", CHECKPOINTS[format][1], only=endings)
        shutil.copytree(place / "source", place / "dense")
        with Reader() as reader:
            values = {
                name: reader.read([segment], 0, segment.numel).view(segment.shape).float()
                for name, segment in CheckpointFiles(place / "low").headers.items()
            }
        safetensors.torch.save_file(values, place / "dense" / "model.safetensors", metadata={"format": "pt"})
        return place / "low", place / "dense"

    return folders


@pytest.mark.parametrize(
    ("variant", "quant", "size"),
    [
        *(("gpt-oss", "nf4", 3), ("llama", "none", 1)),
        *(ci(variant, "nf4", 3) for variant in MODELS if variant != "gpt-oss"),
    ],
)
def test_ranks_load_what_a_dense_checkpoint_of_these_values_gives(
    world: World, models: Callable[[str], tuple[Path, Path]], variant: str, quant: str, size: int
) -> None:
    low, dense = models(variant)
    settings = {"quant": {"method": quant, "cache": False}, "adapter": {"target_modules": "all-linear"}}
    check_model(config_for(low, **settings))
    expected = world.run(1, own_rows, folder=dense, **settings)[0]
    by_rank = world.run(size, own_rows, folder=low, **settings)
    for name, (rows, _) in expected.items():
        found = [ranks_rows[name] for ranks_rows in by_rank]
        assert torch.equal(torch.cat([local for local, _ in found]) if rows.dim() else found[0][0], rows), name


FUZZED = ("mxfp4", "gptq-64-order", "ct-int4-zeros", "fp8-ragged", "fp8-tensor", "ct-fp8-block", "ct-nvfp4")
FUZZED += ("modelopt-nvfp4", "awq-32", "bnb-int8", "bnb-nf4")


def read_all(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read every weight and every stored block; return the shapes of the weights."""
    headers = CheckpointFiles(folder).headers
    with Reader() as reader:
        for segment in headers.values():
            if isinstance(segment, LowBitSegment):
                assert reader.read([segment], 0, segment.numel).shape == (segment.numel,)
                if segment.tensor.codec == "bnb_nf4":
                    read_groups(segment.tensor, reader, 0, 1)
                elif segment.tensor.format:
                    CODECS[segment.tensor.codec].blocks(segment.tensor, reader, 0, 1)
    return {name: segment.shape for name, segment in headers.items() if isinstance(segment, LowBitSegment)}


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_checkpoints_are_refused_by_the_name_of_file_or_tensor(tmp_path: Path, name: str) -> None:
    """300 cases: damaged headers, shapes and dtypes, truncated data, missing parts, other and unknown settings."""
    write(tmp_path, checkpoint(name))
    names = (
        "model.safetensors",
        "config.json",
        "quantization_config",
        "quant_state",
        "quant_map",
        "in the checkpoint, which",
    )
    for file, damages in (("model.safetensors", any_tensors), ("config.json", any_json)):
        holds(Damage(file, damages, read_all, names=names, examples=15), tmp_path)


def without(part: str) -> Callable[[Checkpoint], None]:
    return lambda made: made[0].pop(f"{NAME}.{part}")


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Checkpoint], None]:
    return lambda made: made[0].update({f"{NAME}.{part}": change(made[0][f"{NAME}.{part}"]).contiguous()})


def setting(**values: Any) -> Callable[[Checkpoint], None]:
    return lambda made: made[1].update(values)


def zero_points(made: Checkpoint) -> None:
    made[0][f"{NAME}.weight_zero_point"] = torch.zeros(33, 1, dtype=torch.int8)


def scaled_inputs(made: Checkpoint) -> None:
    made[0][f"{NAME}.pre_quant_scale"] = torch.ones(50)


def group(made: Checkpoint) -> dict[str, Any]:
    """Return the settings of the weights of a compressed-tensors checkpoint."""
    weights: dict[str, Any] = made[1]["config_groups"]["group_0"]["weights"]
    return weights


OTHER = ".*set model.path to the 16-bit checkpoint"
REFUSED: list[tuple[str, Callable[[Checkpoint], None], str]] = [
    ("fp8-ragged", without("weight_scale_inv"), r"no tensor .*down_proj.weight_scale_inv in the checkpoint"),
    ("fp8-ragged", changed("weight_scale_inv", lambda s: s[1:]), r"weight_scale_inv has shape \[4, 3\].*needs \[5, "),
    ("fp8-ragged", without("weight"), r"no weight in .* is quantized"),
    ("fp8-ragged", setting(weight_block_size=[128]), r"weight_block_size=\[128\] is not a pair"),
    ("fp8-ragged", setting(rotation="hadamard"), r"quantization_config.rotation='hadamard' is unknown"),
    ("fp8-ragged", setting(fmt="e5m2"), r"fmt='e5m2' is not supported, only 'e4m3'"),
    ("fp8-tensor", changed("weight_scale_inv", lambda s: s.expand(1, 130)), r"weight_scale_inv has shape \[1, 130\]"),
    ("ct-int4", setting(transform_config={"R1": {}}), r"transform_config=.* is not supported"),
    ("ct-int4", changed("weight_shape", lambda s: s + 1), r"weight_shape of .* is \[68, 193\]"),
    ("ct-int4", changed("weight_scale", lambda s: s[:, :-1]), r"weight_packed of shape \[67, 24\] .* fits no config"),
    ("ct-int4-zeros", without("weight_zero_point"), r"no tensor .*weight_zero_point"),
    ("ct-fp8-channel", changed("weight_scale", lambda s: s[:-1]), r"weight_scale has shape \[32, 1\]"),
    ("ct-nvfp4", changed("weight_scale", lambda s: s.float()), r"weight_scale is stored as F32, not F8_E4M3"),
    ("modelopt-nvfp4", setting(quant_algo="NVFP4_AWQ"), r"quant_algo='NVFP4_AWQ' is not supported"),
    ("awq-32", setting(group_size=64), r"down_proj.scales has shape \[3, 40\]; .* needs \[2, 40\]"),
    ("awq-32", changed("qweight", lambda q: q[None]), r"qweight has shape \[1, 96, 5\], not that of one matrix"),
    ("gptq-128", changed("qweight", lambda q: q[None]), r"qweight has shape \[1, 32, 40\], not that of one matrix"),
    ("awq-32", setting(version="gemv"), r"version='gemv' is not supported"),
    ("gptq-128", without("qzeros"), r"no tensor .*down_proj.qzeros"),
    ("gptq-128", setting(bits=3), r"bits=3 is not supported, only 4 or 8"),
    ("gptq-128", changed("g_idx", lambda g: g + 1), r"\(g_idx\) names groups 1 to 2 of 2"),
    ("gptq-128", changed("g_idx", lambda g: g.roll(1)), r"activation order \(g_idx\), but config.json has desc_act"),
    ("gptq-128", changed("qzeros", lambda z: z | 15), r"zero point stored as 15"),
    ("bnb-int8", changed("weight_format", lambda f: f + 1), r"layout for old GPUs"),
    ("bnb-int8", setting(load_in_4bit=True), r"load_in_4bit=true is not supported"),
    # Valid kinds that are not read are not called damaged.
    ("ct-int8", zero_points, f"weight has zero points, which only packed{OTHER}"),
    ("ct-int8", lambda made: group(made).update(symmetric=False), f"weight has zero points, which only packed{OTHER}"),
    ("ct-int8", lambda made: group(made).update(num_bits=4), f"stored as I8, and no config group has ints of 8{OTHER}"),
    ("ct-fp8-tensor", lambda made: group(made).update(symmetric=False), f"symmetric=false is not supported{OTHER}"),
    ("modelopt-fp8", scaled_inputs, f"pre_quant_scale belongs to no quantized weight of a supported kind{OTHER}"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), REFUSED, ids=[f"{n}-{r[:24]}" for n, _, r in REFUSED])
def test_what_is_not_certain_is_refused_by_name(
    tmp_path: Path, name: str, damage: Callable[[Checkpoint], None], reason: str
) -> None:
    made = checkpoint(name)
    damage(made)
    write(tmp_path, made)
    with pytest.raises(UserError, match=reason):
        read_all(tmp_path)


def test_the_fingerprint_covers_how_bytes_are_decoded(tmp_path: Path, monkeypatch: Any) -> None:
    """It names the base of a run and of the cache's NF4 shards. That of dense checkpoints stays what it was."""
    tensors, config, _ = checkpoint("gptq-v2-32")
    found = {write(tmp_path, (tensors, config | {"desc_act": each}, {})).fingerprint for each in (False, True)}
    assert len(found) == 1, "quant=keep alone asks for it"
    found.add(write(tmp_path, (tensors, config | {"checkpoint_format": "gptq"}, {})).fingerprint)
    assert len(found) == 2
    monkeypatch.setattr("distlora.architecture.low_bit_headers.READER_VERSION", 0)
    found.add(CheckpointFiles(tmp_path).fingerprint)
    assert len(found) == 3
    safetensors.torch.save_file({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    before = hashlib.sha256(b"w F32 (2, 3)\n" + torch.arange(6.0).numpy().tobytes()).hexdigest()
    assert CheckpointFiles(tmp_path).fingerprint == before


@pytest.mark.parametrize("name", ["ct-int4-channel", "ct-int8-packed", "ct-int4", "ct-int4-zeros"])
def test_groups_of_4_and_8_bits_that_both_fit_are_told_apart(tmp_path: Path, name: str) -> None:
    """By zero points and by the stored shape: codes and scales alone fit twice as many weights of half the bits."""
    tensors, config, values = checkpoint(name)
    own = config["config_groups"]["group_0"]
    twice = {"num_bits": 12 - own["weights"]["num_bits"], "symmetric": True}
    if (size := own["weights"].get("group_size")) is not None:
        twice["group_size"] = size * own["weights"]["num_bits"] // twice["num_bits"]
    other = own | {"weights": own["weights"] | twice}
    for groups in ({"a": other, "b": own}, {"a": own, "b": other}):
        made = (tensors, config | {"config_groups": groups}, values)
        segment = write(tmp_path, made).headers[f"{NAME}.weight"]
        with Reader() as reader:
            expected = values[f"{NAME}.weight"]
            assert segment.shape == expected.shape
            assert torch.equal(reader.read([segment], 0, segment.numel).to(expected.dtype), expected.flatten())


def test_a_composite_models_settings_may_lie_in_its_text_config(tmp_path: Path) -> None:
    made = checkpoint("ct-int4")
    write(tmp_path, made)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": made[1]}}))
    assert read_all(tmp_path).keys() == made[2].keys()


def test_modelopts_own_file_describes_a_checkpoint_whose_config_does_not(tmp_path: Path) -> None:
    tensors, config, values = checkpoint("modelopt-nvfp4")
    write(tmp_path, (tensors, config, values))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert read_all(tmp_path) == {name: tuple(value.shape) for name, value in values.items()}


@pytest.mark.parametrize("variant", ["gpt-oss", ci("qwen3-moe"), ci("gemma2")])
def test_a_merge_is_dense_and_computes_what_the_adapted_model_does(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path, variant: str
) -> None:
    low, _ = models(variant)
    model, backend = load_ours(low)
    publish_result(tmp_path / "adapter", model, config_for(low).spec, None, backend)
    trained = Name(place=str(tmp_path / "adapter"), base=str(low), quant="nf4").read()
    trained = replace(trained, spec=replace(trained.spec, dtype="fp32"))  # As `model`; by its weights it may be bf16.
    ids, out = tokens(2, 24), tmp_path / "merged"
    merge_to(trained, out, onto="trained", dtype=torch.float32, say=lambda text: None)
    assert (our_logits(model, ids) - their_logits(out, ids, model.architecture)).abs().max() <= 1e-4
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert {name: segment.shape for name, segment in read_headers(out).items()} == {
        name: segment.shape for name, segment in CheckpointFiles(low).headers.items()
    }
