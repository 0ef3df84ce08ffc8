"""The formats of frozen weights, by name. `format_layouts.py` has their parts and sizes without torch."""

from __future__ import annotations

from distlora_kernels.formats import fp4, fp8_block, gguf, integers, nf4
from distlora_kernels.formats.base import Format as Format

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        *(nf4.NF4, nf4.NF4_ABSMAX, fp4.MXFP4, fp4.NVFP4, *integers.INT4),
        *(integers.INT8, fp8_block.FP8_BLOCK, *gguf.GGUF),
    )
}
