"""Copy tensors to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device. The host does not wait for the copy.

    It would from memory that is not pinned. torch keeps pinned memory, and takes it again once its copy is done.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
