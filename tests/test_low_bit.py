"""Read checkpoints that are shipped in low bits: values by the libraries that define the formats, blocks, refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.low_bit_headers import LowBitSegment
from distlora.weights.low_bit.codecs import CODECS
from distlora.weights.reader import Reader
from low_bit_checkpoints import CHECKPOINTS, Checkpoint, checkpoint


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
