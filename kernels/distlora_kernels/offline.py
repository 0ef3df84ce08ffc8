"""What a kernel compiles to, without a GPU: registers, spills, instructions, from Triton's own compiler and the tools
in its wheel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One specialization of a kernel, as a GPU would be given it, and the bounds that it must keep.

    Every module of Triton kernels has a tuple OFFLINE of them, one for each specialization that runs at full size.
    """

    name: str
    """As the table shows it: `dequantize bf16`, `linear M=16`."""
    kernel: Any
    """The @triton.jit function."""
    signature: Mapping[str, str]
    """Argument -> type, `*bf16:16` for a pointer or number that is divisible by 16; constants are left out."""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    archs: tuple[int, ...] = (80, 89, 90, 100)
    bounds: Mapping[str, Any] = field(default_factory=dict)
    """What must hold beside `no spills`: see `check`."""
