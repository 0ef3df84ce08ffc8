"""Read checkpoints that are shipped in low bits: values by the libraries that define the formats, blocks, refusals."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.low_bit_headers import LowBitSegment
from distlora.model.adapters import adapter_parameters
from distlora.weights.low_bit.codecs import CODECS
from distlora.weights.reader import Reader
from distlora_launcher.compose.checks import check_model
from family_models import SINGLE, VARIANTS, load_ours, our_logits, tokens, write_family_folder
from low_bit_checkpoints import CHECKPOINTS, Checkpoint, checkpoint, convert_folder
from small_models import tokenizer
from test_families import three_steps
from test_loading import config_for, own_rows
from tiers import ci
from worlds import World


def write(folder: Path, made: Checkpoint) -> CheckpointFiles:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(made[0], folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": made[1]}))
    return CheckpointFiles(folder)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_values_are_the_reference_librarys_on_any_range(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    """Rounded once to the library's dtype they are equal bit for bit, whatever band of rows is decoded at once."""
    made = checkpoint(name)
    headers = write(tmp_path, made).headers
    assert set(headers) == set(made[2]), "companions disappear"
    for weight, expected in made[2].items():
        segment = headers[weight]
        assert isinstance(segment, LowBitSegment)
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


def decoded(format: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the weights (n, block) fp32 of stored blocks, by the definition of their format."""
    codes, scales, *more = parts
    if format == "fp8_block":
        return codes.view(torch.float8_e4m3fn).float() * scales
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    if format.startswith("int4"):
        return (nibbles.float() - more[0].float()) * scales.float()
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([levels, -levels])[nibbles.long()]
    if format == "mxfp4":
        return values * torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    return values * (scales.view(torch.float8_e4m3fn).float() / more[0])


@pytest.mark.parametrize("name", [name for name, (_, _, format) in CHECKPOINTS.items() if format])
def test_stored_blocks_hold_the_same_values(tmp_path: Path, name: str) -> None:
    """In the flat order of the stored shape, or as tiles of 128 x 128; from any block on, over several matrices."""
    made = checkpoint(name)
    ((weight, expected),) = made[2].items()
    tensor = write(tmp_path, made).headers[weight].tensor
    stored = expected.float().mT if tensor.transposed else expected.float()
    assert tuple(stored.shape) == tensor.stored_shape
    if tensor.format == "fp8_block":
        matrix = stored.flatten(0, -2)
        down, across = (-(-size // 128) for size in matrix.shape)
        padded = torch.nn.functional.pad(matrix, (0, across * 128 - matrix.shape[1], 0, down * 128 - len(matrix)))
        stored = padded.view(down, 128, across, 128).transpose(1, 2)
        size = 128 * 128
    else:
        size = {"mxfp4": 32, "nvfp4": 16}.get(tensor.format) or int(tensor.format.removeprefix("int4_g"))
    blocks, draw = stored.reshape(-1, size), random.Random(0)
    with Reader() as reader:
        for _ in range(10):
            first, stop = sorted(draw.sample(range(len(blocks) + 1), k=2))
            parts = CODECS[tensor.codec].blocks(tensor, reader, first, stop - first)
            assert {len(part) for part in parts} == {stop - first}
            values = decoded(tensor.format, parts)
            assert torch.equal(values.to(expected.dtype), blocks[first:stop].to(expected.dtype))


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
        *(("gpt-oss", "nf4", 3), ("qwen3-moe", "nf4", 2), ("llama", "none", 1)),
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
    for name, (rows, _) in expected.items():
        found = [ranks_rows[name] for ranks_rows in world.run(size, own_rows, folder=low, **settings)]
        assert torch.equal(torch.cat([local for local, _ in found]) if rows.dim() else found[0][0], rows), name


def test_gpt_oss_in_mxfp4_trains_and_merges_as_transformers_reads_it(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Its values by transformers' own loader; three steps with NF4 as from the dense copy; a dense merge of the run."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    low, dense = models("gpt-oss")
    theirs = GptOssForCausalLM.from_pretrained(
        low, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32, experts_implementation="eager"
    )
    ids = tokens(2, 24)
    with torch.no_grad():
        expected = theirs(ids).logits
    for folder in (low, dense):
        model, _ = load_ours(folder, quant={"method": "none"}, adapter={"init": "kaiming", "r": 4})
        for pair in adapter_parameters(model).values():
            torch.nn.init.zeros_(pair)
        assert (our_logits(model, ids) - expected).abs().max() <= 1e-4
    (losses, adapter), (dense_losses, dense_adapter) = (three_steps(SINGLE, folder=folder) for folder in (low, dense))
    assert losses == dense_losses
    assert all(torch.equal(tensor, dense_adapter[name]) for name, tensor in adapter.items())
