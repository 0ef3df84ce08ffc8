"""Read the quantized weights of a checkpoint: values of any range, and stored blocks."""

from __future__ import annotations

from distlora.weights.low_bit.codecs import (
    AwqCodec,
    BnbInt8Codec,
    Codec,
    Fp4Codec,
    GgufCodec,
    GptqCodec,
    Nf4Codec,
    PackedCodec,
    ScaledCodec,
)
from distlora_kernels.formats.fp4 import MXFP4, NVFP4

CODECS: dict[str, Codec] = {
    "scaled": ScaledCodec(),
    "bnb_int8": BnbInt8Codec(),
    "bnb_nf4": Nf4Codec(),
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
