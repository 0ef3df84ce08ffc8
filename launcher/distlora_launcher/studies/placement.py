"""Place a study's trials: one after the other (alone.py), or together on one base (multi_trial.py)."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedTrial:
    """A trial to train."""

    number: int
    values: Mapping[str, Any]
    overrides: tuple[str, ...]
    """Overrides of `distlora train`, including the run folder."""
    run_dir: Path
    begun: bool
    """True if another worker had the trial before, so that its run folder may exist."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialOutcome:
    """The end of a trial's training."""

    number: int
    state: str
    """COMPLETE, PRUNED, FAILED (distlora/run_folder/sweep.py) or SAVED."""
    seconds: float
    step: int | None = None
    reason: str | None = None
    """Why it failed or was pruned."""
    is_refused: bool = False
    """True if its settings were refused (bad input) before a step."""


class Placement(abc.ABC):
    """Trains the trials of one worker."""

    slots = 1
    """Trials trained at once."""

    @property
    @abc.abstractmethod
    def is_idle(self) -> bool:
        """Return whether its processes have ended: they may outlive their last trial's outcome for a moment."""

    @abc.abstractmethod
    def begin(self, trial: PlacedTrial) -> None:
        """Start or resume a trial. Raises UserError if it cannot run."""

    @abc.abstractmethod
    def verdict(self, number: int, step: int, *, prune: bool) -> None:
        """Take the pruner's decision after an evaluation at `step`; called for each if the sweep has a pruner."""

    @abc.abstractmethod
    def poll(self) -> Sequence[TrialOutcome]:
        """Return the trials that have ended since the last call, without waiting."""

    def close(self) -> None:  # noqa: B027 (only processes of several trials wait for more)
        """Announce that no more trials come."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Have every trial save and stop."""
