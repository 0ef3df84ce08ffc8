"""Decide how many trials of a sweep are trained together on one base (`sweep.packed`)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from distlora.config import AdapterConfig, Config, UserError
from distlora.config.sweep import SweepConfig
from distlora.planner import plan_of
from distlora.planner.report import packed_trials
from distlora.planner.suggest import MOST, Packing, largest, packing
from distlora.run_folder.sweep import words_of
from distlora.training.multi_trial.protocol import check_trial
from distlora_launcher.compose.compose import Composed, compose_run, section_of
from distlora_launcher.compose.planning import choices, machine_here, planned_model
from distlora_launcher.jobs.submit import in_job
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.space import Dimension, Values, count_cells, is_finite, read_section

_OF_SIZE = ("adapter", "recipe")
"""Sections whose values change a trial's memory and may differ between trials trained together."""
MOST_SIZES = 16
"""Most trials that are compared to find the largest."""
AT_ONCE = 2
"""Trials of a rank search that are due at once: its first two ranks."""


def largest_values(space: Sequence[Dimension], settings: SweepConfig) -> Iterator[Mapping[str, Any]]:
    """Yield the combinations that may need most memory.

    Settings that affect memory take their largest number, or every value if they are not numbers; others take their
    first. In a rank search it is the larger of the two ranks that run at once; later ones run alone.
    """
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


def plan_together(settings: SweepConfig, trials: Sequence[Composed], *, most: int = MOST) -> Packing:
    """Return the plan for trials that run together, sized by the largest of `trials`; `most` trials at most."""
    plans = [choices(trial.config, trial.fixed).plan for trial in trials]
    most = min(MOST, most, settings.trials or MOST)
    requested = settings.packed if settings.packed == "auto" else min(settings.packed, most)
    return packing(largest(plans), requested, most=most)


def largest_trials(sweep: Sweep) -> list[Composed]:
    """Return the trials that may need most memory and can be trained together. Raises UserError if none can."""
    trials = []
    refused: UserError | None = None
    for values in itertools.islice(largest_values(sweep.space, sweep.settings), MOST_SIZES):
        try:
            trial = sweep.compose(0, values)
            check_trial(trial.config)
            choices(trial.config, trial.fixed)
            trials.append(trial)
        except UserError as error:  # It will be recorded as failed; the others run.
            refused = error
    if not trials:
        assert refused is not None, "a sweep has a trial"
        raise refused
    return trials


def count_trials(sweep: Sweep) -> int:
    """Return the most trials that can run together."""
    if sweep.settings.method == "rank_search":
        return AT_ONCE
    return count_cells(sweep.space) if is_finite(sweep.space) else MOST


def plan_first_run(sweep: Sweep) -> Packing:
    """Return the plan of the first trials that run together: as many as requested or fit, and as there are.

    Raises UserError if none of the trials can be trained together.
    """
    return plan_together(sweep.settings, largest_trials(sweep), most=count_trials(sweep))


def plan_beside(sweep: Sweep, config: Config, others: Iterable[AdapterConfig]) -> Packing:
    """Return the plan for trials with the shared settings of `config` and any of the adapters `others`."""
    model, machine = planned_model(config), machine_here(config, runs_here=in_job())
    adapters = [config.adapter, *(each for each in others if each.use_dora == config.adapter.use_dora)]
    different = {repr(adapter): dataclasses.replace(config, adapter=adapter) for adapter in adapters}
    trial = largest(plan_of(each, model, machine) for each in different.values())
    most = min(MOST, count_trials(sweep), sweep.settings.trials or MOST)
    requested = sweep.settings.packed if sweep.settings.packed == "auto" else min(sweep.settings.packed, most)
    return packing(trial, requested, most=most)


def check_memory(sweep: Sweep) -> str:
    """Describe the memory of trials trained together. Raises UserError if so many do not fit."""
    found = plan_first_run(sweep)
    text = packed_trials(found)
    plan = found.plan
    if found.trials > 1 and found.most and plan.fits is False and plan.config.plan.refuse:
        raise UserError(
            f"sweep.packed={found.requested}: {text}; set sweep.packed={found.most}, or auto, which leaves some memory "
            "free; plan.refuse=false starts it anyway"
        )
    return text


def compose_for_plan(
    overrides: Sequence[str], *, config_dir: str | None = None
) -> tuple[SweepConfig | None, list[Composed]]:
    """Return the section `sweep` (None without one) and the trials that may be largest, for `distlora plan`."""
    if all(section_of(word) != "sweep" for word in overrides):
        return None, [compose_run(overrides, config_dir=config_dir, may_lack_paths=True)]
    settings, space, shared = read_section(overrides, config_dir=config_dir)
    trials = [
        compose_run([*shared, *words_of(values)], config_dir=config_dir, may_lack_paths=True)
        for values in itertools.islice(largest_values(space, settings), MOST_SIZES)
    ]
    return settings, trials
