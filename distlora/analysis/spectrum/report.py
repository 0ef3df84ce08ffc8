"""Show the figures of an analysis as tables, Markdown and a plot. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.analysis.spectrum.request import PLOT_NAME
from distlora.results.tables import COLOURS, Table, as_markdown, as_text, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 40
"""Lines of a table; of more, the rest is left to spectrum.json."""
SIDES = ("first", "against")


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """All of them, the most important first."""
    sides = [side for side in SIDES if side in found]
    yield _table(found, "Together", {found["runs"][side]["name"]: found[side]["overall"] for side in sides})
    for side in sides:
        of = f" of {found['runs'][side]['name']}" if len(sides) > 1 else ""
        layers = {f"layer {number}": values for number, values in found[side]["layers"].items()}
        yield _table(found, f"By layer{of}", layers)
        yield _table(found, f"By linear{of}", found[side]["linears"])
    if "against" in found:
        yield _angles(found)
    yield _weights(found)


def _table(found: Mapping[str, Any], heading: str, lines: Mapping[str, Mapping[str, Any]]) -> Table:
    head = ["", "||dW||/||W||", "share of ||dW||^2", "effective rank", "stable rank"]
    head += [f"intruders < {threshold:g}" for threshold in found["thresholds"]]
    rows = [[*head, "of"]]
    for name, values in list(lines.items())[:MOST_ROWS]:
        cells = [name, percent(values["relative_norm"]), percent(values["energy_share"])]
        cells += [number(values["effective_rank"]), number(values["stable_rank"])]
        cells += [counted(values["counts"][f"{threshold:g}"]) for threshold in found["thresholds"]]
        rows.append([*cells, f"{values['vectors']:,}"])
    more = f" (the first {MOST_ROWS} of {len(lines)})" if len(lines) > MOST_ROWS else ""
    return Table(heading + more, rows)


def _angles(found: Mapping[str, Any]) -> Table:
    head = [
        "principal angles of the two dW",
        "rank",
        "largest cosine",
        "shared, left",
        "right",
        "by chance, left",
        "right",
    ]
    rows = [[*head, "energy inside, left", "right"]]
    for weight in found["weights"][:MOST_ROWS]:
        angles = weight["angles"]
        if angles is None:
            continue
        left, right = angles["left"], angles["right"]
        cells = [f"{left['cosines'][0]:.3f}"]
        cells += [percent(side[key]) for key in ("shared", "by_chance", "energy") for side in (left, right)]
        rows.append([short(weight), str(angles["rank"]), *cells])
    return Table("Do they change the same directions?", rows)


def _weights(found: Mapping[str, Any]) -> Table:
    rows = [
        ["weight", "shape", "rank of dW", "||dW||/||W||", "s1(dW)/s1(W)", "effective rank", "cosines, lowest first"]
    ]
    for weight in found["weights"][:MOST_ROWS]:
        delta, cosines = weight["delta"], sorted(pair[0] for pair in weight["intruders"]["cosines"])
        rows.append(
            [
                short(weight),
                " x ".join(map(str, weight["shape"])),
                "-" if delta["rank"] is None else str(delta["rank"]),
                percent(delta["relative_norm"]),
                percent(delta["relative_spectral_norm"]),
                number(delta["effective_rank"]),
                " ".join(f"{cosine:.2f}" for cosine in cosines[:4]),
            ]
        )
    return Table(f"By weight: {found['runs']['first']['name']}", rows)


def reading(found: Mapping[str, Any]) -> list[str]:
    """Return the totals of each run, and what limits them."""
    sentences = []
    for side in (side for side in SIDES if side in found):
        run, values = found["runs"][side], found[side]["overall"]
        counts = [f"{counted(values['counts'][f'{limit:g}'])} below {limit:g}" for limit in found["thresholds"]]
        sentences.append(
            f"{run['name']} ({run['method']}): dW is {percent(values['relative_norm'])} of the weights' norm, of "
            f"effective rank {number(values['effective_rank'])} in the mean. Of the first {found['top']} singular "
            f"vectors of each of {values['weights']:,} matrices, {values['vectors']:,} together, the intruders are "
            f"{', '.join(counts)}."
        )
        if run["rounded"]:
            sentences.append(
                f"The weights of {run['name']} are read as {run['rounded']}, so its dW holds their rounding too, which "
                "has no rank: take effective ranks with care."
            )
    if found["left_out"]:
        sentences.append(f"{found['left_out']:,} weights that only the first changed are left out.")
    return sentences


NOTES = """**What is measured.** dW is W' - W; W is the weight as training held it (of a 4-bit base: dequantized).
Effective rank is exp of the entropy of the singular values' shares, stable rank ||dW||_F^2 / s_1^2. An intruder is a
left singular vector among the first of W' whose largest |cosine| with all left singular vectors of W is below a
threshold (Shuttleworth et al. 2024, arXiv 2410.21228). Shared is the mean squared cosine of the principal angles."""


def markdown(found: Mapping[str, Any]) -> str:
    """report.md."""
    names = " against ".join(found["runs"][side]["name"] for side in SIDES if side in found)
    return as_markdown(
        f"What {names} learned, in singular values",
        f"`{found['command']}`, {found['date']}, torch {found['versions']['torch']}, {found['device']}.",
        reading(found),
        ("singular values of dW, where it is, intruders, angles", PLOT_NAME),
        tables(found),
        NOTES,
    )


def terminal(found: Mapping[str, Any]) -> str:
    """Return the tables and conclusions for the terminal."""
    return as_text(tables(found), reading(found))


def short(weight: Mapping[str, Any]) -> str:
    """Layer 3 mlp.up_proj, of an expert with its number."""
    expert = weight["name"].partition("[")[2]
    return f"{weight['layer']} {weight['linear']}" + (f" [{expert}" if expert else "")


def percent(value: float | None) -> str:
    """Format a share as a percentage, "-" for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """Format a value with one decimal, "-" for None."""
    return "-" if value is None else f"{value:.1f}"


def counted(values: Mapping[str, int]) -> str:
    """`3`, or `3 to 5` where two are undecided."""
    low, high = values["intruders"], values["intruders"] + values["undecided"]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


_STYLES = {"first": "-", "against": "--"}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Singular values of dW, where it is, intruders by threshold, and where there are two runs their angles."""
    sides = [side for side in SIDES if side in found]
    figure, panels = new_figure(4 if len(sides) > 1 else 3, width=15 if len(sides) > 1 else 11.5, height=3.6)
    for side in sides:
        weights = [weight if side == "first" else weight["against"] for weight in found["weights"]]
        _plot_values(panels[0], weights, side)
        _plot_energy(panels[1], found[side], found["runs"][side]["name"], side)
        _plot_intruders(panels[2], weights, found["runs"][side]["name"], side)
    panels[0].set(xlabel="singular value of dW", ylabel="over the largest of W", yscale="log", xscale="log")
    if len(sides) > 1:
        first, against = (found["runs"][side]["name"] for side in sides)
        panels[0].set_title(f"{first} (lines), {against} (dashed)", fontsize=8)
    panels[0].legend(frameon=False, fontsize=7)
    panels[1].set(ylabel="||dW|| / ||W||, %")
    panels[1].set_ylim(bottom=0)
    panels[2].set(
        xlabel="threshold", ylabel=f"intruders among the first {found['top']}, %", xlim=(0, 1), ylim=(-2, 102)
    )
    for panel in panels[1:3]:
        panel.legend(frameon=False, fontsize=7)
    if len(sides) > 1:
        _plot_angles(panels[3], [weight for weight in found["weights"] if weight["angles"]])
    names = " against ".join(found["runs"][side]["name"] for side in sides)
    figure.suptitle(f"What {names} did to the singular values and vectors", fontsize=11)
    save(figure, path)


def _colour(linears: Sequence[str], linear: str) -> str:
    return COLOURS[list(linears).index(linear) % len(COLOURS)]


def _plot_values(panel: Axes, weights: Sequence[Mapping[str, Any]], side: str) -> None:
    """Plot one line per weight, coloured by its linear."""
    linears = list(dict.fromkeys(weight["linear"] for weight in weights))
    labelled = set()
    for weight in weights:
        top, values = weight["before"]["values"][:1], weight["delta"]["values"]
        if not top or not values:
            continue
        y = [value / top[0] for value in values if value > 1e-6 * values[0]]
        label = None if side != "first" or weight["linear"] in labelled else weight["linear"].rpartition(".")[2]
        labelled.add(weight["linear"])
        colour = _colour(linears, weight["linear"])
        panel.plot(range(1, len(y) + 1), y, _STYLES[side], color=colour, linewidth=0.9, alpha=0.7, label=label)


def _plot_energy(panel: Axes, sums: Mapping[str, Any], name: str, side: str) -> None:
    """Plot one bar per linear."""
    linears = sums["linears"]
    shift = -0.2 if side == "first" else 0.2
    heights = [100 * (values["relative_norm"] or 0.0) for values in linears.values()]
    colour = COLOURS[0] if side == "first" else COLOURS[1]
    panel.bar([place + shift for place in range(len(linears))], heights, width=0.4, color=colour, label=name)
    panel.set_xticks(range(len(linears)), [linear.rpartition(".")[2] for linear in linears], rotation=60, fontsize=7)


def _plot_intruders(panel: Axes, weights: Sequence[Mapping[str, Any]], name: str, side: str) -> None:
    """Plot the share of vectors below every threshold; between the bounds where these differ."""
    pairs = [pair for weight in weights for pair in weight["intruders"]["cosines"]]
    grid = [step / 200 for step in range(201)]
    low, high = ([100 * sum(p[end] < t for p in pairs) / max(len(pairs), 1) for t in grid] for end in (1, 0))
    colour = COLOURS[0] if side == "first" else COLOURS[1]
    panel.plot(grid, low, _STYLES[side], color=colour, label=name)
    panel.fill_between(grid, low, high, color=colour, alpha=0.25, linewidth=0)


def _plot_angles(panel: Axes, weights: Sequence[Mapping[str, Any]]) -> None:
    """Cosines of the principal angles of the output directions, and what random spaces would share."""
    linears = list(dict.fromkeys(weight["linear"] for weight in weights))
    for weight in weights:
        cosines, colour = weight["angles"]["left"]["cosines"], _colour(linears, weight["linear"])
        panel.plot(range(1, len(cosines) + 1), cosines, ".-", color=colour, linewidth=0.9, markersize=3, alpha=0.7)
    chance = [weight["angles"]["left"]["by_chance"] ** 0.5 for weight in weights]
    if chance:
        panel.axhspan(min(chance), max(chance), color=COLOURS[7], alpha=0.3, label="random spaces, mean")
        panel.legend(frameon=False, fontsize=7)
    panel.set(xlabel="principal angle", ylabel="cosine, output directions", ylim=(0, 1.02))
    panel.locator_params(axis="x", integer=True)
