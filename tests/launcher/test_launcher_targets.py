"""adapter.target_modules: presets, lists, regular expressions mean what PEFT's mean; nothing matches silently."""

from __future__ import annotations

import pytest

from distlora.architecture.targets import select_targets
from distlora.config import UserError

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in range(2)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
]


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("qv", [0, 2, 5, 7]),
        ("attention", [0, 1, 2, 3, 5, 6, 7, 8]),
        ("mlp", [4, 9]),
        ("all-linear", list(range(10))),
        (("q_proj",), [0, 5]),
        (("up_proj", "self_attn.q_proj"), [0, 4, 5, 9]),
        (("model.layers.1.mlp.up_proj",), [9]),
        (r"model\.layers\.0\..*_proj", [0, 1, 2, 3, 4]),
        (r".*\.(q|k)_proj", [0, 1, 5, 6]),
    ],
)
def test_targets_come_in_the_models_order(target_modules: str | tuple[str, ...], expected: list[int]):
    assert select_targets(target_modules, iter(NAMES)) == [NAMES[index] for index in expected]


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (("proj",), "no module is named 'proj'"),  # The end of a name is not a name.
        (("q_proj", "queries"), "no module is named 'queries'"),
        ("q_proj", r"write adapter.target_modules=\[q_proj\]"),
        ("atention", "did you mean 'attention'"),
        ("(", "neither a preset"),
        ("layers.0.*", "such as model.layers.0.self_attn.q_proj"),
    ],
)
def test_targets_that_match_nothing_are_refused(target_modules: str | tuple[str, ...], expected: str):
    with pytest.raises(UserError, match=expected):
        select_targets(target_modules, NAMES)
    with pytest.raises(UserError, match="no linear"):
        select_targets("attention", [])
