"""How much of the differences between trials each setting explains."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from distlora.run_folder.sweep import COMPLETE, TrialRecord

TOGETHER = "together"
"""What no setting explains alone: that the effect of one depends on the other."""


def effects(trials: Sequence[TrialRecord]) -> dict[str, float] | None:
    """The share of each setting in the variance of the values of a whole grid: the variance of the mean over all else,
    by its value (the main effects of an analysis of variance, which for a whole grid are exact). None for what is no
    whole grid, or has no differences."""
    complete = [trial for trial in trials if trial.state == COMPLETE and trial.value is not None]
    settings = [name for name in (complete[0].values if complete else {}) if len(_by_value(complete, name)) > 1]
    values = [trial.value for trial in complete if trial.value is not None]
    if not settings or not _is_whole(complete, settings) or statistics.pvariance(values) == 0:
        return None
    total = statistics.pvariance(values)
    shares = {
        name: statistics.pvariance([statistics.mean(group) for group in _by_value(complete, name).values()]) / total
        for name in settings
    }
    if len(settings) > 1:
        shares[TOGETHER] = max(0.0, 1 - sum(shares.values()))
    return shares


def _by_value(trials: Sequence[TrialRecord], name: str) -> Mapping[str, list[float]]:
    """The values of the metric by those of a setting."""
    groups: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        if trial.value is not None:
            groups[_key(trial.values.get(name))].append(trial.value)
    return groups


def _is_whole(trials: Sequence[TrialRecord], settings: Sequence[str]) -> bool:
    """Whether every combination of the settings' values is there once."""
    have = sorted(tuple(_key(trial.values.get(name)) for name in settings) for trial in trials)
    wanted = itertools.product(*(_by_value(trials, name) for name in settings))
    return have == sorted(wanted)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
