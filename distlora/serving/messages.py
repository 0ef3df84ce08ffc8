"""Send a round's operations from rank 0 to the others as JSON, which can make nothing but operations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distlora.parallel import Ranks, from_rank_0
from distlora.serving.operations import Adapter, Row

_READ = {
    "adapter": lambda value: Adapter(**value),
    "rows": lambda value: tuple(Row(_array("tokens", row["tokens"]), _arrays(row["inputs"])) for row in value),
    "folder": Path,
    "weights_folder": lambda value: value and Path(value),
    "tokens": tuple,
    "stop_tokens": lambda value: None if value is None else tuple(value),
    "stop_texts": tuple,
}
"""How the values of fields are read that JSON has not as they are."""


def shared(sent: Sequence[Any] | None, kinds: Iterable[type], ranks: Ranks) -> list[Any] | None:
    """Return rank 0's operations on every rank; None for None, which ends the service. `kinds`: their classes."""
    if ranks.control is None:
        return None if sent is None else list(sent)
    text = b"" if ranks.rank else encoded(sent)
    data = torch.empty(from_rank_0(len(text), ranks), dtype=torch.uint8)
    if not ranks.rank:
        data[:] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.broadcast(data, group=ranks.control, group_src=0)
    return decoded(data.numpy().tobytes(), kinds) if ranks.rank or sent is None else list(sent)


def encoded(sent: Sequence[Any] | None) -> bytes:
    """Return operations as JSON. Each fp32 value is written as the number of fp64 that it is, and so read exactly."""
    plain = None if sent is None else [(type(item).__name__, asdict(item)) for item in sent]
    return json.dumps(plain, default=_plain).encode()


def decoded(text: bytes, kinds: Iterable[type]) -> list[Any] | None:
    """Return the operations that `encoded` wrote."""
    named, read = {kind.__name__: kind for kind in kinds}, json.loads(text)
    if read is None:
        return None
    return [
        named[kind](**{name: _READ[name](value) if name in _READ else value for name, value in values.items()})
        for kind, values in read
    ]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else os.fspath(value)


def _array(name: str, values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.int64 if name in ("tokens", "target_tokens") else np.float32)


def _arrays(inputs: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    return {name: _array(name, values) for name, values in inputs.items()}
