"""Plot the parallel coordinates of trials and the importance of settings. Imports matplotlib late."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distlora.output.results import COLOURS, new_figure, save
from distlora.run_folder.sweep import COMPLETE, PRUNED, TrialRecord
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.results import best_of, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COORDINATES_NAME, IMPORTANCE_NAME = "parallel_coordinates.png", "importance.png"

MOST_MARKS = 9
"""Most values of a setting that are all marked at its axis; more get five equidistant marks."""
LOG_RANGE = 20
"""Ratio of the largest to the smallest positive number from which an axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis: the positions of values between 0 and 1, and its marks."""

    places: Mapping[str, float]
    marks: Sequence[tuple[float, str]]

    def place(self, value: Any) -> float:
        """Return the position of a value, between 0 and 1."""
        return self.places[_key(value)]


def make_scale(values: Sequence[Any]) -> Scale:
    """Return the axis of a setting's values: numbers linear or logarithmic, other values equidistant."""
    distinct = {_key(value): value for value in values}
    numbers = [value for value in distinct.values() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(distinct):
        ordered = list(distinct)
        places = {key: index / max(1, len(ordered) - 1) for index, key in enumerate(ordered)}
        return Scale(places, [(places[key], format_value(distinct[key])) for key in ordered[:MOST_MARKS]])
    low, high = min(numbers), max(numbers)
    by_logarithm = low > 0 and high / low >= LOG_RANGE
    position = math.log if by_logarithm else float
    width = (position(high) - position(low)) or 1.0
    places = {key: (position(value) - position(low)) / width for key, value in distinct.items()}
    if len(numbers) <= MOST_MARKS:
        return Scale(places, [(places[_key(value)], f"{value:.4g}") for value in numbers])
    at = [position(low) + width * fifth / 4 for fifth in range(5)]
    return Scale(places, [(n / 4, f"{math.exp(x) if by_logarithm else x:.3g}") for n, x in enumerate(at)])


def plot_coordinates(sweep: Sweep, trials: Sequence[TrialRecord]) -> bool:
    """Draw a line per trial over its settings to the metric; the better, the darker.

    Writes SWEEP/parallel_coordinates.png. Returns False if fewer than two trials have a value.
    """
    from matplotlib import colormaps

    drawn = [trial for trial in trials if trial.state in (COMPLETE, PRUNED) and trial.value is not None]
    names: Sequence[str] = list(dict.fromkeys(name for trial in drawn for name in trial.values))
    names = [name for name in names if all(name in trial.values for trial in drawn)]
    if len(drawn) < 2 or not names:
        return False
    best = best_of(sweep, drawn)
    scales = [make_scale([trial.values[name] for trial in drawn]) for name in names]
    metric = make_scale([trial.value for trial in drawn])
    figure, (panel,) = new_figure(1, width=max(5.0, 1.7 * (len(names) + 1)), height=4.0)
    colours, lower_is_better = colormaps["viridis"], sweep.settings.direction == "minimize"
    for trial in drawn:
        at_end = metric.place(trial.value)
        heights = [*(scale.place(trial.values[name]) for scale, name in zip(scales, names, strict=True)), at_end]
        panel.plot(
            range(len(heights)),
            heights,
            color=COLOURS[1] if trial == best else colours(0.9 * (at_end if lower_is_better else 1 - at_end)),
            linestyle="-" if trial.state == COMPLETE else ":",
            linewidth=2.5 if trial == best else 1.2,
            zorder=3 if trial == best else 2,
            label="best" if trial == best else None,
        )
    if any(trial.state == PRUNED for trial in drawn):
        panel.plot([], [], color="0.3", linestyle=":", label="pruned")
    _draw_axes(panel, [*scales, metric], [*names, sweep.settings.metric])
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=8)
    save(figure, sweep.folder / COORDINATES_NAME)
    return True


def _draw_axes(panel: Axes, scales: Sequence[Scale], names: Sequence[str]) -> None:
    panel.grid(visible=False)
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.set_yticks([])
    panel.set_xlim(-0.3, len(names) - 0.4)
    panel.set_ylim(-0.04, 1.04)
    panel.set_xticks(range(len(names)), [name.replace(".", ".\n") for name in names], fontsize=9)
    panel.tick_params(axis="x", length=0)
    for x, scale in enumerate(scales):
        panel.axvline(x, color="0.75", linewidth=1, zorder=1)
        for height, mark in scale.marks:
            panel.annotate(
                mark,
                (x, height),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                zorder=4,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5},
            )


def plot_importance(sweep: Sweep, shares: Mapping[str, float], how: str) -> None:
    """Write SWEEP/importance.png: the share of each setting in the differences between trials."""
    ordered = sorted(shares.items(), key=lambda item: item[1])
    figure, (panel,) = new_figure(1, width=5.5, height=1.2 + 0.4 * len(ordered))
    bars = panel.barh([name for name, _ in ordered], [share for _, share in ordered], color=COLOURS[0])
    panel.bar_label(bars, [f"{share:.0%}" for _, share in ordered], padding=3, fontsize=8)
    panel.set_xlim(0, 1.08)
    panel.grid(visible=False, axis="y")
    panel.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    panel.set_xlabel(f"share in the differences of {sweep.settings.metric}\n({how})", fontsize=8)
    panel.tick_params(labelsize=8)
    save(figure, sweep.folder / IMPORTANCE_NAME)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
