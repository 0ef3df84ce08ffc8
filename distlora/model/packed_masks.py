"""Attention masks that keep packed documents apart, without a wait of the host for the device.

transformers' mask functions read on the device whether positions restart within a row. The host knows it, so our
decoders get a second instance of transformers' masking_utils, which asks the host first. No other model is affected.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import types
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from distlora.model.hf_model import with_globals

_is_packed: ContextVar[bool | None] = ContextVar("is_packed", default=None)


@contextlib.contextmanager
def rows_known(is_packed: bool | None) -> Iterator[None]:
    """Tell the masks made within whether a row has several documents; None: they ask the device."""
    token = _is_packed.set(is_packed)
    try:
        yield
    finally:
        _is_packed.reset(token)


@functools.cache
def _masking() -> Any:
    """Return our own instance of transformers' masking_utils, which asks `rows_known` before the device."""
    from transformers import masking_utils

    spec = masking_utils.__spec__
    assert spec is not None, "it was imported"
    assert spec.loader is not None, "it is a file"
    own: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    own.ALL_MASK_ATTENTION_FUNCTIONS = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS  # Registrations hold for both.
    read_from_device = own.find_packed_sequence_indices

    def find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
        """Return the number of each position's document in its row (B, T); None if no row has several."""
        if (is_packed := _is_packed.get()) is None:
            found: Tensor | None = read_from_device(position_ids)
            return found
        if not is_packed:
            return None
        return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    own.find_packed_sequence_indices = find_packed_sequence_indices
    return own


def ask_host_for_masks(decoder: nn.Module) -> None:
    """Let the masks that a transformers decoder makes in its forward heed `rows_known`."""
    from transformers import masking_utils

    forward: Any = type(decoder).forward
    known = inspect.unwrap(forward).__globals__
    theirs = {name for name, value in known.items() if callable(value) and vars(masking_utils).get(name) is value}
    makers = {name: getattr(_masking(), name) for name in theirs if name.startswith("create_")}
    if makers:
        decoder.forward = types.MethodType(with_globals(forward, makers), decoder)


def masks_of_documents(decoder: nn.Module, position_ids: Tensor) -> Tensor | dict[str, Tensor | None] | None:
    """Build masks that separate documents, for decoders that ignore positions (B, T) in their own masks.

    One mask for each layer type if the config names them, otherwise one for all layers: transformers' function decides.
    """
    config: Any = decoder.config
    weight = decoder.get_input_embeddings().weight  # type: ignore[operator]
    # Only its dtype, device and first two dimensions are read.
    embeds = torch.empty((*position_ids.shape, 0), dtype=weight.dtype, device=position_ids.device)
    # The fourth argument is a cache, named past_key_values by older versions.
    masks: Tensor | dict[str, Tensor | None] | None = _masking().create_masks_for_generate(
        config, embeds, None, None, position_ids=position_ids
    )
    return masks
