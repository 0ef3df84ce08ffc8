"""The linears of the models that are timed, as groups that share an input.

Letters: M rows, I in features, O out features.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ROWS = (1, 16, 64, 128, 256, 512, 2048, 8192)
"""M: from decoding one row to a training batch."""


@dataclass(frozen=True, slots=True)
class Group:
    """Linears of one input."""

    name: str
    """As the table shows it: `llama-70b/down`, or the shapes themselves."""
    shapes: tuple[tuple[int, int], ...]
    """(O, I) of each."""

    @property
    def features(self) -> int:
        """I."""
        return self.shapes[0][1]

    @property
    def label(self) -> str:
        shapes = " + ".join(f"{out}x{features}" for out, features in self.shapes)
        return shapes if self.name == shapes else f"{self.name} {shapes}"


def _model(name: str, *, hidden: int, queries: int, keys: int, intermediate: int) -> tuple[Group, ...]:
    """A model's four groups; `queries` and `keys` are heads times head dimension."""
    return (
        Group(f"{name}/qkv", ((queries, hidden), (keys, hidden), (keys, hidden))),
        Group(f"{name}/o", ((hidden, queries),)),
        Group(f"{name}/gate-up", ((intermediate, hidden), (intermediate, hidden))),
        Group(f"{name}/down", ((hidden, intermediate),)),
    )


GROUPS = (
    *_model("llama-8b", hidden=4096, queries=4096, keys=1024, intermediate=14336),
    *_model("llama-70b", hidden=8192, queries=8192, keys=1024, intermediate=28672),
    *_model("qwen3-32b", hidden=5120, queries=8192, keys=1024, intermediate=25600),
)


def groups_named(names: str) -> tuple[Group, ...]:
    """`llama-70b`, `llama-70b/down` and `128x64+64x64` (O x I), separated by commas. Raises ValueError."""
    found: list[Group] = []
    for name in names.split(","):
        known = [group for group in GROUPS if group.name == name or group.name.startswith(name + "/")]
        found += known or [_group_of_shapes(name)]
    return tuple(found)


def _group_of_shapes(text: str) -> Group:
    parts = [re.fullmatch(r"(\d+)x(\d+)", part) for part in text.split("+")]
    shapes = tuple((int(part[1]), int(part[2])) for part in parts if part is not None)
    if len(shapes) != len(parts) or len({features for _, features in shapes}) != 1:
        models = ", ".join(sorted({group.name.partition("/")[0] for group in GROUPS}))
        raise ValueError(f"shapes are {models}, one of their groups (llama-70b/down) or OxI+OxI..., not {text!r}")
    return Group(" + ".join(f"{out}x{features}" for out, features in shapes), shapes)
