"""Run modules that carry state along a row (Mamba, gated delta rule, short convolutions) on each packed document alone.

Such a module reads earlier tokens without a mask, so a packed document would leak into the next one.

Letters: B rows, T tokens per row, L tokens of one document.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distlora.system.exit_codes import EXTRAS

if TYPE_CHECKING:
    from distlora.model.adapters import BlockContext, Rows


_PLAIN = (type(None), bool, int, float, str, torch.dtype)


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


class DocumentRows:
    """Documents of the rows that run. The layers share the slices of a batch, which are made once."""

    def __init__(self, starts: Sequence[Sequence[int]], length: int) -> None:
        self.starts, self.length = starts, length
        self.is_packed = any(len(row) > 1 for row in starts)
        """True if a row has more than one document."""
        self._parts: dict[tuple[int, int], DocumentRows] = {}

    @classmethod
    def of(cls, position_ids: Tensor) -> DocumentRows:
        """Find the documents from positions (B, T) that restart at 0 with each; the host waits for them."""
        starts = [[at for at, position in enumerate(row) if position == 0] for row in position_ids.tolist()]
        assert all(row[:1] == [0] for row in starts), "a row begins within a document"
        return cls(starts, position_ids.shape[1])

    def part(self, span: slice) -> DocumentRows:
        """Return the rows of a slice of the batch."""
        key = (span.start, span.stop)
        if key not in self._parts:
            self._parts[key] = DocumentRows(self.starts[span], self.length)
        return self._parts[key]


class ByDocument(Wrapper):
    """Module that runs on each packed document alone. Rows of one document each run as without it."""

    def __init__(self, inner: nn.Module, context: BlockContext) -> None:
        super().__init__(inner)
        self.context = context
        """Context of the layer, with the documents of the rows that run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and return its outputs with each document's in the place of its tokens."""
        rows, packed = self.context.rows, self.context.rows.packed
        if packed is None or not packed.is_packed:
            return self.inner(*args, **kwargs)
        output = self._run_each(rows, packed, args, kwargs)
        return map_leaves(lambda tensor: tensor.unflatten(1, (-1, packed.length)).flatten(0, 1), output)

    def _run_each(self, rows: Rows, packed: DocumentRows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs of all documents in one row: (1, B T, ...)."""
        assert self.context.first_token == 0, "a tile of an MLP begins within a document"
        outputs, leading, balances = [], [], []
        try:
            for row, starts in enumerate(packed.starts):
                alone, sums = rows.part(slice(row, row + 1)), []
                for start, end in itertools.pairwise([*starts, packed.length]):
                    balanced = None if alone.balanced is None else alone.balanced[:, start:end]
                    counted = None if alone.counted is None else alone.counted[:, start:end]
                    self.context.rows = alone._replace(packed=None, balanced=balanced, counted=counted)
                    self.context.first_token = start
                    given, named = map_leaves(functools.partial(_cut, packed, row, start, end), (args, kwargs))
                    outputs.append(self.inner(*given, **named))
                    leading.append((1, end - start))
                    sums.append(self.context.take_balance())
                balances += [] if sums[0] is None else [torch.stack(sums).sum(dim=0)]  # type: ignore[arg-type]
        finally:
            self.context.rows, self.context.first_token = rows, 0
        if balances:
            self.context.leave_balance(torch.cat(balances))
        return join(outputs, leading, dim=1, drop_weights=isinstance(outputs[0], tuple))


def slow_scan_note(decoder: nn.Module) -> str | None:
    """Return a line for the log if packages are missing that transformers would use for layers with a state, else None.

    The module of a class in transformers quotes the names of the packages that it looks for. No interface lists them.
    """
    inner = (module.inner for module in decoder.modules() if isinstance(module, ByDocument))
    sources = {inspect.getsource(module) for kind in set(map(type, inner)) if (module := inspect.getmodule(kind))}
    missing = [
        package
        for package, extra in EXTRAS.items()
        if extra == "hybrid" and importlib.util.find_spec(package) is None
        if any(re.search(f"[\"']{package.replace('_', '[-_]')}[\"']", source) for source in sources)
    ]
    if not missing:
        return None
    return (
        f"layers with a state run transformers' slow reference code: {', '.join(missing)} not installed; "
        "`pip install --no-build-isolation 'distlora[hybrid]'`"
    )


def _token_dims(packed: DocumentRows, leaf: Any) -> tuple[int, ...]:
    """Return the dimensions of an argument that count tokens; refuse it where they are not known."""
    if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] in (1, len(packed.starts)):
        if leaf.dim() == 4 and leaf.shape[2:] == (packed.length, packed.length):
            return (2, 3)
        if leaf.dim() > 1 and leaf.shape[1] == packed.length:
            return (1,)
        if packed.length not in leaf.shape[1:]:
            return ()
    raise TypeError(f"{describe(leaf)}, given to a module that runs each document alone, has no known token dimension")


def _cut(packed: DocumentRows, row: int, start: int, end: int, leaf: Any) -> Tensor:
    dims = _token_dims(packed, leaf)
    cut: Tensor = leaf[row : row + 1] if leaf.shape[0] == len(packed.starts) else leaf
    for dim in dims:
        cut = cut.narrow(dim, start, end - start)
    return cut


def join(outputs: Sequence[Any], leading: Sequence[tuple[int, ...]], dim: int, *, drop_weights: bool = False) -> Any:
    """Join the outputs of calls along `dim`: tensors whose shapes begin with `leading`, in tuples item by item.

    `drop_weights`: attention's weights and states, 4-D of other shapes, become None. Other outputs are refused.
    """
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(join(items, leading, dim, drop_weights=drop_weights) for items in zip(*outputs, strict=True))
    if first is None or (len(outputs) == 1 and not drop_weights):
        return first
    calls = zip(outputs, leading, strict=True)
    if all(isinstance(tensor, Tensor) and tensor.shape[: len(sizes)] == sizes for tensor, sizes in calls):
        return torch.cat(list(outputs), dim)
    if drop_weights and isinstance(first, Tensor) and first.dim() == 4:
        return None
    raise TypeError(f"an output, {describe(first)}, cannot be joined along dim {dim} of {leading[0][dim]}")


def describe(leaf: Any) -> str:
    """Return what an error says about an argument or output."""
    return f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to what an argument holds, in tuples, lists and dicts too, but not to plain values.

    Copies of lists and dicts cannot be written: a layer that hands something on in them fails.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (tuple, list)):
        items = [map_leaves(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if type(value) in (dict, MappingProxyType):
        return MappingProxyType({name: map_leaves(function, item) for name, item in value.items()})
    return function(value)
