"""The section `sweep` of a command line, and what of its other words is searched: of `distlora sweep` and of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distlora.config import require
from distlora.config.errors import short
from distlora.config.file import build
from distlora.config.sweep import METHODS, SweepConfig
from distlora_launcher.compose.compose import compose_section, parse_overrides, section_of
from distlora_launcher.sweeps.space import Dimension, flat, split

OWNERS = {"sampler": "optuna"} | dict.fromkeys(
    ("rank_start", "rank_most", "confidence", "bootstrap", "full", "full_lr"), "rank_search"
)
"""Settings of the section sweep that one method alone has."""


def read_section(
    words: Sequence[str], *, config_dir: str | None = None
) -> tuple[SweepConfig, tuple[Dimension, ...], list[str]]:
    """(the section, what is searched, the words that all trials share). Without sweep=METHOD it is a grid. Raises
    UserError for what the section does not have, or has without effect, and for what cannot be searched."""
    of_sweep = [word for word in words if section_of(word) == "sweep"]
    if not any(word.startswith("sweep=") for word in of_sweep):
        of_sweep.insert(0, "sweep=grid")
    for word in of_sweep:
        require(
            not parse_overrides([word])[0].is_sweep_override(),
            f"{word}: one sweep has one value of it; start another sweep for the other",
        )
    _refuse_of_other_methods(of_sweep)
    values: Any = compose_section("sweep", of_sweep, config_dir=config_dir)
    require(isinstance(values, dict), "sweep=null is no sweep; write sweep=grid, or `distlora train`")
    of_space = flat(values.get("space") or {})
    for setting, value in of_space.items():
        require(
            isinstance(value, str),
            f"sweep.space.{setting}={short(value)} is one value; write several, in quotes: "
            f"sweep.space.{setting}='\"a,b\"', or {setting}=a,b without sweep.space",
        )
    settings = build(SweepConfig, values | {"space": of_space}, prefix="sweep.")
    own = [word for word in words if section_of(word) != "sweep"]
    return settings, *split(own, settings.space, config_dir=config_dir)


def _refuse_of_other_methods(of_sweep: Sequence[str]) -> None:
    """Refuse settings that distlora's own option of the group does not have, or that say nothing with it."""
    method = next(word for word in of_sweep if word.startswith("sweep=")).partition("=")[2]
    given = {word.partition("=")[0].lstrip("+"): word for word in of_sweep}
    for name, owner in OWNERS.items():
        word = given.get(f"sweep.{name}", "")
        require(
            method not in METHODS or owner == method or not word,
            f"{word} is of sweep={owner}; add that, or leave it out",
        )
    if method == "grid":
        require(
            "sweep.seed" not in given, "sweep.seed has no effect with sweep=grid, which draws nothing; leave it out"
        )
    pruner = given.get("sweep.pruner", "sweep.pruner=median" if method == "optuna" else "sweep.pruner=none")
    require(
        pruner != "sweep.pruner=none" or "sweep.pruner_warmup" not in given or method not in METHODS,
        "sweep.pruner_warmup has no effect without a pruner; set sweep.pruner=median, or leave it out",
    )
