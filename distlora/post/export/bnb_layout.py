"""The tensors in which bitsandbytes stores an NF4 weight, out of our own NF4 of it: written a few rows at a time.

They are listed in `distlora.weights.prequantized`, which reads them back. Our codes and scales are the same bytes, but
for the padding of the last group, which bitsandbytes does not have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distlora.config import UserError
from distlora.post.deltas.base import BaseWeight
from distlora.weights.reader import Reader
from distlora_kernels import nf4, reference

STATE = "quant_state.bitsandbytes__nf4"
STATE_BYTES = 256
"""Of quant_state with its trailing spaces: the offset, and with it the text's length, is known after a first look at
the weight, and files are laid out before."""

Write = Callable[[str, int, Tensor], None]
"""(tensor, first element, elements)."""


def parts_of(weight: BaseWeight) -> dict[str, tuple[str, Sequence[int]]]:
    """The tensors of one weight: dtype as safetensors names it, and shape.

    Raises UserError for a weight that several tensors make up, whose names would not tell which.
    """
    name = name_of(weight)
    blocks = -(-weight.numel // nf4.BLOCK)
    return {
        name: ("U8", (-(-weight.numel // 2), 1)),
        f"{name}.absmax": ("U8", (blocks,)),
        f"{name}.quant_map": ("F32", (len(reference.NF4_LEVELS),)),
        f"{name}.nested_absmax": ("F32", (nf4.num_groups(weight.numel),)),
        f"{name}.nested_quant_map": ("F32", (256,)),
        f"{name}.{STATE}": ("U8", (STATE_BYTES,)),
    }


def name_of(weight: BaseWeight) -> str:
    """On disk."""
    names = weight.source.names
    if len(names) > 1 or len(weight.shape) != 2:
        raise UserError(
            f"{weight.name} has shape {list(weight.shape)} and is made of {len(names)} tensors on disk, and "
            "bitsandbytes holds linears alone; write --format hf or peft"
        )
    return names[0]


def write_weight(weight: BaseWeight, reader: Reader, write: Write, dtype: str) -> None:
    """All of `parts_of`. `dtype`: what bitsandbytes dequantizes to, as torch calls it."""
    name, second = name_of(weight), weight.second_level(reader)
    blocks, done = -(-weight.numel // nf4.BLOCK), 0
    for size, codes in weight.codes(reader):
        write(name, done // 2, codes.view(-1)[: -(-size // 2)])
        done += size
    write(f"{name}.absmax", 0, second.scales.view(-1)[:blocks])
    write(f"{name}.nested_absmax", 0, second.group_scale)
    write(f"{name}.quant_map", 0, torch.tensor(reference.NF4_LEVELS, dtype=torch.float32))
    write(f"{name}.nested_quant_map", 0, reference.dynamic_map())
    state = {
        "quant_type": "nf4",
        "blocksize": nf4.BLOCK,
        "dtype": dtype,
        "shape": list(weight.shape),
        "nested_blocksize": nf4.BLOCKS_PER_GROUP,
        "nested_dtype": "float32",
        "nested_offset": float(second.offset),
    }
    text = json.dumps(state).encode().ljust(STATE_BYTES)
    assert len(text) == STATE_BYTES
    write(f"{name}.{STATE}", 0, torch.frombuffer(bytearray(text), dtype=torch.uint8))
