"""X"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from distlora.config import AdapterConfig, Config, UserError
from distlora.config.sweep import SweepConfig
from distlora.planner.choice.packing import (
    MOST,
    Packing,
    largest,
    packing,
)
from distlora.planner.pages.report import packed_trials
from distlora.run_folder.sweep import words_of
from distlora.training.multi_trial.protocol import check_trial
from distlora_launcher.compose.compose import Composed, compose_run, section_of
from distlora_launcher.compose.planning import choices, machine_here
from distlora_launcher.compose.this_machine import planned_model
from distlora_launcher.jobs.step import in_job
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.space import Dimension, Values, count_cells, is_finite, read_section

_OF_SIZE = ("adapter", "recipe")
"""Sections whose values change what a trial takes in memory; those of others that do so may not differ in a pack."""
MOST_SIZES = 16
"""Trials that are looked at for the largest."""
AT_ONCE = 2
"""Trials of a rank search that are due at once: its first two ranks."""


def sizes(space: Sequence[Dimension], settings: SweepConfig) -> Iterator[Mapping[str, Any]]:
    """The combinations that may take most memory: the largest of numbers that a trial's size depends on and every other
    value of such, the first of what else is searched. Of a rank search the larger of the two ranks that run at once;
    the others run alone."""
    if settings.method == "rank_search":
        yield {"adapter.r": 2 * settings.rank_start}
        return
    lists: list[tuple[Any, ...]] = []
    for dimension in space:
        values = dimension.values if isinstance(dimension, Values) else (dimension.high,)
        is_of_size = dimension.setting.partition(".")[0] in _OF_SIZE
        are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        lists.append(values[:1] if not is_of_size else (max(values),) if are_numbers else values)
    names = [dimension.setting for dimension in space]
    for combination in itertools.product(*lists):
        yield dict(zip(names, combination, strict=True))


def packing_of(settings: SweepConfig, trials: Sequence[Composed], *, most: int = MOST) -> Packing:
    """Packs of a sweep whose largest trial is one of these, on the machines that they are for; of `most` trials."""
    plans = [choices(trial.config, trial.fixed).plan for trial in trials]
    model, machine = plans[0].model, plans[0].machine
    trial = largest([plan.config for plan in plans], model, machine)
    most = min(MOST, most, settings.trials or MOST)
    asked = settings.packed if settings.packed == "auto" else min(settings.packed, most)
    return packing(trial, model, machine, asked, most=most)


def valid_sizes(sweep: Sweep) -> list[Composed]:
    """The trials that may take most memory, of those that can be in a pack. Raises UserError where none can."""
    trials = []
    refused: UserError | None = None
    for values in itertools.islice(sizes(sweep.space, sweep.settings), MOST_SIZES):
        try:
            trial = sweep.compose(0, values)
            check_trial(trial.config)
            choices(trial.config, trial.fixed)
            trials.append(trial)
        except UserError as error:  # Such a trial is recorded as failed, and the others run.
            refused = error
    if not trials:
        assert refused is not None, "a sweep has a trial"
        raise refused
    return trials


def number_of(sweep: Sweep) -> int:
    """Trials that may be in one pack, at the most."""
    if sweep.settings.method == "rank_search":
        return AT_ONCE
    return count_cells(sweep.space) if is_finite(sweep.space) else MOST


def planned_pack(sweep: Sweep) -> Packing:
    """The first packs of this sweep, with as many trials at once as are asked for or fit, and as there are. Raises
    UserError where none of its trials can be in a pack."""
    return packing_of(sweep.settings, valid_sizes(sweep), most=number_of(sweep))


def packing_beside(sweep: Sweep, config: Config, others: Iterable[AdapterConfig]) -> Packing:
    """Packs of trials that share what a pack has to share with this one, and may have any of these adapters."""
    model, machine = planned_model(config), machine_here(config, runs_here=in_job())
    adapters = [adapter for adapter in others if adapter.use_dora == config.adapter.use_dora]
    trial = largest([config, *(dataclasses.replace(config, adapter=adapter) for adapter in adapters)], model, machine)
    most = min(MOST, number_of(sweep), sweep.settings.trials or MOST)
    asked = sweep.settings.packed if sweep.settings.packed == "auto" else min(sweep.settings.packed, most)
    return packing(trial, model, machine, asked, most=most)


def checked_pack(sweep: Sweep) -> str:
    """What the packs of this sweep take, in words. Raises UserError where so many trials do not fit together."""
    found = planned_pack(sweep)
    said = packed_trials(found)
    plan = found.plan
    if found.trials > 1 and found.most and plan.fits is False and plan.config.plan.refuse:
        raise UserError(
            f"sweep.packed={found.asked}: {said}; set sweep.packed={found.most}, or auto, which leaves some "
            "memory free; plan.refuse=false starts it all the same"
        )
    return said


def composed_for_plan(
    words: Sequence[str], *, config_dir: str | None = None
) -> tuple[SweepConfig | None, list[Composed]]:
    """The sweep that a plan is of, None where it is of a run, and its trials that may be the largest."""
    if all(section_of(word) != "sweep" for word in words):
        return None, [compose_run(words, config_dir=config_dir, may_lack_paths=True)]
    settings, space, shared = read_section(words, config_dir=config_dir)
    trials = [
        compose_run([*shared, *words_of(values)], config_dir=config_dir, may_lack_paths=True)
        for values in itertools.islice(sizes(space, settings), MOST_SIZES)
    ]
    return settings, trials
