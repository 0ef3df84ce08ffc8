"""The formats of frozen weights, by name. `format_layouts.py` has their parts and sizes without torch."""

from __future__ import annotations

from distlora_kernels.formats import fp8_block, gguf, int4, int8, mxfp4, nf4, nvfp4
from distlora_kernels.formats.base import Format as Format

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        *(nf4.NF4, nf4.NF4_ABSMAX, mxfp4.MXFP4, nvfp4.NVFP4, *int4.INT4),
        *(int8.INT8, fp8_block.FP8_BLOCK, *gguf.GGUF),
    )
}
