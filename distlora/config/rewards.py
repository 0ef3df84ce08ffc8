"""Checks of the settings `data.rewards` and `data.reward_*`, which online reinforcement learning reads."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

from distlora.config.errors import nearest, require, require_positive

if TYPE_CHECKING:
    from distlora.config.documents import DataConfig

BUILT_IN = {"exact_match": "answer", "regex": "pattern", "math": "answer", "json_schema": "schema"} | {
    "unit_tests": "tests"
}
"""Built-in rewards, and the column of a record that each reads."""


def check_rewards(data: DataConfig) -> None:
    """Refuse unknown names, settings that exclude each other, and settings without effect."""
    require_positive("data", data, "reward_timeout", "reward_processes", "reward_memory_gb")
    is_own = any(name not in BUILT_IN for name in data.rewards)
    for item in fields(data):
        needs = is_own if item.name in ("reward_folder", "reward_digests") else bool(data.rewards)
        value = getattr(data, item.name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        require(
            needs or value == default or not item.name.startswith("reward"),
            f"data.{item.name}={value} has no effect without "
            f"{'a function of yours in ' * bool(data.rewards)}data.rewards; leave it out",
        )
    for name in data.rewards:
        require(
            name in BUILT_IN or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name) is not None,
            f"data.rewards=[{name}] is neither a built-in reward ({', '.join(BUILT_IN)}) nor a function's name"
            f"{nearest(name, BUILT_IN)}; write a function of yours as module.function",
        )
        require(data.rewards.count(name) == 1, f"data.rewards names {name} twice; leave one of them out")
    require(
        len(data.reward_weights) in (0, len(data.rewards)),
        f"data.reward_weights has {len(data.reward_weights)} numbers, and data.rewards {len(data.rewards)} names; "
        "set one weight per reward, or none",
    )
    require(
        not data.reward_weights or any(data.reward_weights),
        f"data.reward_weights={[*data.reward_weights]} gives each answer a total of 0, so nothing is trained; set "
        "another number for one",
    )
    for weight in data.reward_weights:
        require(math.isfinite(weight), f"data.reward_weights: {weight} is not a valid weight; set a finite number")
    columns = {BUILT_IN[name] for name in data.rewards if name in BUILT_IN}
    for column in data.reward_columns:
        require(
            column in columns,
            f"data.reward_columns={{{column}: ...}} renames a column that no built-in reward of data.rewards reads "
            f"({', '.join(sorted(columns)) or 'there is none'}){nearest(column, columns)}; leave it out",
        )
    require(
        "unit_tests" not in data.rewards or data.rewards_execute_code,
        "data.rewards=[unit_tests] runs code that the model writes, and data.rewards_execute_code=false; read what "
        "docs/rl.md says of its limits, then add data.rewards_execute_code=true",
    )
    for setting, default in (("rewards_execute_code", False), ("rewards_isolation", "namespaces")):
        value = getattr(data, setting)
        require(
            "unit_tests" in data.rewards or value == default,
            f"data.{setting}={str(value).lower()} has no effect without data.rewards=[unit_tests]; leave it out",
        )
