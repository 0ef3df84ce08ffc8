"""Optimizers as they lay out their states (distlora/training/optimizers.py). Imports no torch.

torch's AdamW has two moments in fp32; bitsandbytes' have them in 8 bits or in fp32, on the device or paged.
"""

from __future__ import annotations

from collections.abc import Mapping

IN_8_BITS_FROM = 4096
"""Elements from which on a moment of bitsandbytes' 8-bit optimizers is in 8 bits (Optimizer2State: min_8bit_size)."""
BLOCK = 256
"""Elements of such a moment with an absmax in fp32 of their own."""
LEVELS_BYTES = 2 * 256 * 4
"""Of the levels of 8 bits for both moments, fp32, which all parameters share."""
PAGED_FROM = 100_000
"""Elements from which on a paged moment is CUDA's managed memory, which is on the GPU while there is room for it
(Optimizer8bit.get_state_buffer); on the CPU nothing is paged."""

UPDATE_BYTES: Mapping[str, int] = {"adamw": 28, "paged_adamw": 28, "adamw_8bit": 16, "paged_adamw_8bit": 16}
"""That an update moves of a trained number: itself and two moments read and written, its gradient read; moments in 4
bytes or in 1."""


def is_in_8_bits(optimizer: str, numel: int) -> bool:
    """Return True if the optimizer states of a parameter are in 8 bits, by optim.name."""
    return optimizer.endswith("8bit") and numel >= IN_8_BITS_FROM


def absmaxes(numel: int) -> int:
    """Return the number of absmax values of one 8-bit optimizer state."""
    return -(-numel // BLOCK)
