"""The base of modules that stand in a model for another module."""

from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """Module around `inner`, whose attributes it has: transformers' code reads those of what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)
