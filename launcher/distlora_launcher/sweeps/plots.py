"""The plots of a sweep: parallel coordinates of its trials, importance of its settings."""

from __future__ import annotations

from collections.abc import Sequence

from distlora.sweep_folder import TrialRecord
from distlora_launcher.sweeps.folder import Sweep


def write_plots(sweep: Sweep, trials: Sequence[TrialRecord]) -> None:
    """SWEEP/parallel_coordinates.png and SWEEP/importance.png, where there is something to show."""
