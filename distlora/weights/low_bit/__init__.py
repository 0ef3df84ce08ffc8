"""Weights in low bits as checkpoints ship them: values of any range, and stored blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distlora.architecture.low_bit_headers import LowBitTensor
from distlora.weights.low_bit.codecs import (
    AwqCodec,
    BnbInt8Codec,
    Codec,
    Fp4Codec,
    GptqCodec,
    PackedCodec,
    ScaledCodec,
)
from distlora.weights.low_bit.gguf import GgufCodec
from distlora_kernels.formats.mxfp4 import MXFP4
from distlora_kernels.formats.nvfp4 import NVFP4

if TYPE_CHECKING:
    from distlora.weights.reader import Reader

CODECS: dict[str, Codec] = {
    "scaled": ScaledCodec(),
    "bnb_int8": BnbInt8Codec(),
    "mxfp4": Fp4Codec(MXFP4),
    "nvfp4": Fp4Codec(NVFP4),
    "modelopt_nvfp4": Fp4Codec(NVFP4, reciprocal=True),
    "packed": PackedCodec(),
    "gptq": GptqCodec(first_version=True),
    "gptq_v2": GptqCodec(first_version=False),
    "awq": AwqCodec(),
    "gguf": GgufCodec(),
}
"""Decoders by LowBitTensor.codec."""


def read_low_bit(tensor: LowBitTensor, reader: Reader, start: int, stop: int) -> Tensor:
    """Return the flat weights [start, stop) of a tensor in its logical layout, fp32 or bf16."""
    return torch.cat(list(CODECS[tensor.codec].bands(tensor, reader, start, stop)))
