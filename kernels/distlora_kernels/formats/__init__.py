"""The formats of frozen weights, by name. A new format is one file, with its class, and one entry here.

`distlora/architecture/low_bit.py` has their sizes for the planner, without torch.
"""

from __future__ import annotations

from distlora_kernels.formats import nf4
from distlora_kernels.formats.base import Format as Format
from distlora_kernels.formats.base import Part as Part

FORMATS: dict[str, Format] = {format.name: format for format in (nf4.NF4, nf4.NF4_ABSMAX)}
