"""The figures of an analysis in words and tables: for the terminal, and as Markdown. Pure text; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distlora.analysis.intrinsic.request import PLOT_NAME
from distlora.analysis.intrinsic.search import crossing
from distlora.output.tables import Table, as_markdown, as_text

if TYPE_CHECKING:
    from distlora.analysis.intrinsic.training import Training

SCALING_WORDS = {"none": "no scaling (DID)", "layers": "layers scaled (SAID)"}


def what(training: Training) -> str:
    """Describe a training in one line."""
    start = "random weights" if training.random else "pretrained"
    if training.scaling == "untrained":
        return f"{training.model}, {start}: untrained"
    kind = "full" if training.scaling == "full" else f"d={training.dimension:,}, {SCALING_WORDS[training.scaling]}"
    return f"{training.model}, {start}: {kind}, lr {training.lr:g}, seed {training.seed}"


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def nothing_gained(arm: Mapping[str, Any]) -> str:
    """Return the message for an arm whose full fine-tuning does not lower the loss."""
    return (
        f"{arm['model']}, {arm['start']}: full fine-tuning does not lower the held-out loss ({arm['untrained']:.4f} to "
        f"{arm['full']:.4f}), so there is no gain to reach a share of"
    )


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """All of them, the most important first."""
    yield _dimensions(found)
    for arm in found["arms"]:
        for scaling, subspace in arm["subspaces"].items():
            yield _points(f"{arm['model']}, {arm['start']}, {SCALING_WORDS[scaling]}", subspace)


def _dimensions(found: Mapping[str, Any]) -> Table:
    name = f"d{100 * found['settings']['share']:.0f}"
    rows = [["model", "start", "parameters", "untrained", "full", "gain", "subspace", name, "range", "of all"]]
    for arm in found["arms"]:
        full = f"{arm['full']:.3f}" + ("" if arm["full_noise"] is None else f" ± {arm['full_noise']:.3f}")
        cells = [arm["model"], arm["start"], f"{arm['parameters']:,}", f"{arm['untrained']:.3f}", full]
        cells.append(f"{arm['untrained'] - arm['full']:.3f}")
        for scaling, subspace in arm["subspaces"].items():
            value = subspace["dimension"]
            part = "" if value is None else f"{value / arm['parameters']:.3%}"
            rows.append([*cells, SCALING_WORDS[scaling], dimension(subspace), _range(subspace), part])
        if not arm["subspaces"]:
            rows.append([*cells, "-", "-", "-", "-"])
    return Table(
        "Held-out loss in nats a token, and the dimension that reaches the share of full fine-tuning's gain", rows
    )


def dimension(subspace: Mapping[str, Any]) -> str:
    """`1,234`; `at most 5`, `above 16,384`: the least and the largest that were tried."""
    if subspace["dimension"] is not None:
        return f"{subspace['dimension']:,.0f}"
    tried = [point["dimension"] for point in subspace["points"]]
    return f"{subspace['side']} {(min if subspace['side'] == 'at most' else max)(tried):,}"


def _range(subspace: Mapping[str, Any]) -> str:
    if subspace["range"] is None:
        return "-"
    low, high = (None if value is None else f"{value:,.0f}" for value in subspace["range"])
    tried = [point["dimension"] for point in subspace["points"]]
    return f"{low or f'below {min(tried):,}'} to {high or f'above {max(tried):,}'}"


def _points(heading: str, subspace: Mapping[str, Any]) -> Table:
    rows = [["dimensions", "lr", "held-out loss", "share of the gain", "seeds", "moved"]]
    for point in subspace["points"]:
        rows.append(
            [
                f"{point['dimension']:,}",
                f"{point['lr']:g}",
                "not finite" if None in point["losses"] else f"{mean(point['losses']):.4f}",
                f"{mean(point['shares']):.1%}",
                f"{len(point['losses'])}",
                f"{point['distance']:.1%}",
            ]
        )
    return Table(heading, rows)


def reading(found: Mapping[str, Any]) -> list[str]:
    """Return conclusions, each derived from the figures."""
    return [*_by_start(found), *_by_scaling(found), *_by_size(found), *_noise(found)]


def _arms(found: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(arm["model"], arm["start"]): arm for arm in found["arms"]}


def _times(one: float, other: float) -> str:
    """Return the ratio of `other` to `one` in words."""
    return f"{other / one:.1f} times as many" if other >= one else f"{one / other:.1f} times fewer"


def _by_start(found: Mapping[str, Any]) -> Iterator[str]:
    arms = _arms(found)
    for (model, start), random in arms.items():
        pretrained = arms.get((model, "pretrained"))
        if start != "random" or pretrained is None:
            continue
        for scaling, theirs in random["subspaces"].items():
            ours = pretrained["subspaces"].get(scaling)
            if ours is None:
                continue
            of_words = f"{model}, {SCALING_WORDS[scaling]}: pretrained {dimension(ours)}, random {dimension(theirs)}"
            if ours["dimension"] and theirs["dimension"]:
                of_words += f": random weights need {_times(ours['dimension'], theirs['dimension'])} dimensions"
            losses = [loss for point in theirs["points"] for loss in point["losses"] if loss is not None]
            reached = f"{min(losses):.2f}" if losses else "no number"
            yield (
                f"{of_words}, each for the same share of its own gain. Random weights end at a held-out loss of "
                f"{reached} in a subspace at best and {random['full']:.2f} in full; the pretrained ones begin at "
                f"{pretrained['untrained']:.2f}."
            )


def _by_scaling(found: Mapping[str, Any]) -> Iterator[str]:
    for arm in found["arms"]:
        none, layers = (arm["subspaces"].get(scaling, {"dimension": None})["dimension"] for scaling in SCALING_WORDS)
        if none and layers:
            yield (
                f"{arm['model']}, {arm['start']}: with a factor for each of {len(arm['layers'])} layers "
                f"{layers:,.0f} dimensions do what {none:,.0f} do without ({layers / none:.2f} times)."
            )


def _by_size(found: Mapping[str, Any]) -> Iterator[str]:
    for start in ("pretrained", "random"):
        arms = sorted((arm for arm in found["arms"] if arm["start"] == start), key=lambda arm: arm["parameters"])
        if len(arms) < 2:
            continue
        small, large = arms[0], arms[-1]
        yield from _same_loss(small, large)
        for scaling in SCALING_WORDS:
            a, b = (arm["subspaces"].get(scaling, {"dimension": None})["dimension"] for arm in (small, large))
            if a and b:
                yield (
                    f"{start}, {SCALING_WORDS[scaling]}: {large['model']} with {large['parameters']:,} parameters "
                    f"needs {b:,.0f}, {small['model']} with {small['parameters']:,} {a:,.0f}."
                )


def _same_loss(small: Mapping[str, Any], large: Mapping[str, Any]) -> Iterator[str]:
    """Yield the dimension at which the larger model reaches the loss of the smaller one's full fine-tuning."""
    target = small["full"]
    for scaling, subspace in large["subspaces"].items():
        points = {p["dimension"]: p["losses"] for p in subspace["points"] if None not in p["losses"]}
        found = crossing({d: [-loss for loss in losses] for d, losses in points.items()}, -target)
        if large["untrained"] <= target:
            needs = "is there untrained"
        elif found is not None:
            needs = f"needs {found:,.0f} dimensions"
        elif points and mean(points[min(points)]) <= target:
            needs = f"needs fewer than {min(points):,} dimensions"
        else:
            continue
        yield (
            f"{large['start']}, {SCALING_WORDS[scaling]}: for the {target:.2f} nats that {small['model']} ends at in "
            f"full, {large['model']} {needs}."
        )


def _noise(found: Mapping[str, Any]) -> Iterator[str]:
    noises = [s["noise"] for arm in found["arms"] for s in arm["subspaces"].values() if s["noise"] is not None]
    if noises:
        yield (
            f"Between seeds (of the subspace, the order of the rows, and random weights) the share differs by a "
            f"standard deviation of {min(noises):.1%} to {max(noises):.1%}; a range is where the share "
            "crosses with one of it, that of a single training, added or taken away."
        )


def markdown(found: Mapping[str, Any]) -> str:
    """report.md."""
    settings = found["settings"]
    held_out = found["eval_data"] or f"a tenth of {found['data']}"
    if found["arms"]:
        held_out += f" ({found['arms'][0]['held_out_rows']} rows, {found['arms'][0]['held_out_targets']:,} tokens)"
    return as_markdown(
        "How many dimensions fine-tuning needs",
        f"`distlora analyze intrinsic` on {found['data']}, held out {held_out}; {settings['steps']} steps of "
        f"{settings['batch']} rows of {settings['sequence_length']} tokens; {found['date']}, torch "
        f"{found['versions']['torch']}, {found['device']}.",
        reading(found),
        ("share of the gain and held-out loss by dimension", PLOT_NAME),
        tables(found),
        NOTES,
    )


NOTES = """**What is measured.** theta = theta_0 + P u over all parameters, u of d numbers and P a random subspace with
orthonormal columns; SAID multiplies each layer's part by a factor that is trained too, and counts it. Loss after the
last step; the gain is the untrained model's loss less that of full fine-tuning at its own best learning rate. Learning
rates are powers of 3 apart, the best of those that were tried at each dimension. "moved" is
||theta - theta_0|| / ||theta_0||."""


def terminal(found: Mapping[str, Any]) -> str:
    """Return the tables and conclusions for the terminal."""
    return as_text(tables(found), reading(found))
