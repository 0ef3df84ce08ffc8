"""Compute logits by the forward of transformers' own model, where they are more than a product, a scale and a cap."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Product = Callable[[Tensor], Tensor]
"""(..., H) -> (..., vocabulary): the product with the LM head's weight."""


class OwnForward(nn.Module):
    """Compute logits from hidden states (B, T, H) by the forward of transformers' own model, without its decoder.

    The model here is a copy without decoder and LM head: calls of the decoder return the hidden states, calls of the
    head go to `product`. Of the other modules those in `beside` stay, with their parameters.
    """

    def __init__(self, hf_model: PreTrainedModel, decoder: str, beside: Collection[str]) -> None:
        super().__init__()
        head = hf_model.get_output_embeddings()
        first, *inner = decoder.split(".")
        path = next(path for path, module in hf_model.named_modules() if module is head)
        self._decoder, self._head = _Stub(hf_model.get_submodule(first), inner), _Stub(head)
        self.model: Any = _replaced(_replaced(hf_model, first, self._decoder), path, self._head)
        for name in self.model._modules.keys() - {*beside, path.partition(".")[0]}:
            del self.model._modules[name]

    def forward(self, hidden: Tensor, product: Product) -> Tensor:
        """Return the logits (B, T, vocabulary)."""
        self._decoder.call, self._head.call = (lambda *_, **__: _DecoderOutput((hidden,))), product
        try:
            logits: Tensor = self.model(inputs_embeds=hidden).logits
        finally:
            self._decoder.call = self._head.call = None
        return logits


class _Stub:
    """Stands in a model for a module that it calls, whose other attributes it reads.

    No nn.Module: the parameters of the module belong to others. `inner`: names in the module that lead to what may be
    called instead.
    """

    def __init__(self, module: nn.Module, inner: Collection[str] = ()) -> None:
        self._module, self._inner = module, inner
        self.call: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        assert self.call is not None, "called outside of OwnForward.forward"
        return self.call(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return self if name in self._inner else getattr(self._module, name)

    def __deepcopy__(self, _: Any) -> _Stub:
        return self  # It holds nothing between calls.


class _DecoderOutput(tuple[Tensor]):
    """Output of a decoder: its hidden states, and None for anything else."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def _replaced(module: nn.Module, path: str, stub: _Stub) -> nn.Module:
    """Return a copy of a module, sharing its parameters, with a stub at `path`."""
    first, _, rest = path.partition(".")
    copied: Any = copy.copy(module)
    copied._modules = dict(module._modules)
    child = copied._modules.pop(first)
    setattr(copied, first, _replaced(child, rest, stub) if rest else stub)
    return copied
