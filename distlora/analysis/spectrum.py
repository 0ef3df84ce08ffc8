"""`distlora analyze spectrum`: its request, and its figures as a record. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distlora.config import require
from distlora.post.trained import UNNAMED, Name, Named
from distlora.results.figures import Curve, Figure, Style
from distlora.results.record import Record, Table

TOP, THRESHOLDS, EXACT_UP_TO = 10, (0.3, 0.5, 0.7, 0.9), 4096
"""Shuttleworth et al. take the first 10 and 0.5."""
MOST_ROWS = 40
"""Rows of a table."""
SIDES = ("first", "against")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrumRequest(Named):
    """Analyze how an adapter, or full fine-tuning, changed the weights of a base.

    Prints the singular values of the update dW, its effective rank, its norm per layer and linear, and the intruder
    dimensions (arXiv 2410.21228): singular vectors among the first K of W + dW that no singular vector of W resembles.
    FOLDER gets a report, a plot and JSON. Weights are read one at a time. A 4096 x 4096 matrix needs about 0.7 GB of
    memory; a dense dW (full fine-tuning, DoRA) needs twice as much.

    example: distlora analyze spectrum runs/lora --against runs/full
    """

    against: str | None = None
    """RUN: second run of the same base, such as full fine-tuning (adapter=full), to compare with; adds the angles
    between the two updates."""
    top: int = TOP
    """K: number of singular vectors of W + dW to test."""
    threshold: str | None = None
    """T,...: cosine thresholds below which a singular vector is an intruder (default: 0.3,0.5,0.7,0.9)."""
    exact_up_to: int = EXACT_UP_TO
    """N: largest smaller side of a matrix that is decomposed exactly; for larger ones the first K vectors come from a
    Krylov space with bounds, so some counts may stay undecided."""
    out: str = ""
    """FOLDER: folder for the results, without earlier ones (default: analysis/RUN-spectrum)."""

    # Found by the launcher; a field with a docstring would be an argument. The names are those in the report.
    first: Name = UNNAMED
    first_name: str = ""
    second: Name | None = None
    second_name: str | None = None
    thresholds: tuple[float, ...] = THRESHOLDS

    def __post_init__(self) -> None:
        require(self.top > 0, f"--top={self.top} is not a valid number of singular vectors; write 1 or more")
        require(self.exact_up_to >= 0, f"--exact-up-to={self.exact_up_to} is not a valid size; write 0 or more")
        for value in self.thresholds:
            require(0 < value < 1, f"--threshold={value:g} is not a cosine between 0 and 1; write --threshold 0.5")
        printed = [f"{value:g}" for value in self.thresholds]
        require(
            len(set(printed)) == len(printed),
            f"--threshold={','.join(map(str, self.thresholds))}: two of them are the same in six digits; leave one out",
        )


NOTES = """**What is measured.** dW is W' - W; W is the weight as training held it (of a 4-bit base: dequantized).
Effective rank is exp of the entropy of the singular values' shares, stable rank ||dW||_F^2 / s_1^2. An intruder is a
left singular vector among the first of W' whose largest |cosine| with all left singular vectors of W is below a
threshold (Shuttleworth et al. 2024, arXiv 2410.21228). Shared is the mean squared cosine of the principal angles."""


def record(figures: Mapping[str, Any]) -> Record:
    """Return the figures of spectrum.json as a record."""
    names = " against ".join(figures["runs"][side]["name"] for side in _sides(figures))
    return Record(
        title=f"What {names} learned, in singular values",
        made_by=f"`{figures['command']}`, {figures['date']}, torch {figures['versions']['torch']}, "
        f"{figures['device']}.",
        findings=list(_findings(figures)),
        tables=list(_tables(figures)),
        figures=list(_figures(figures)),
        notes=NOTES,
        data=figures,
    )


def _sides(figures: Mapping[str, Any]) -> list[str]:
    return [side for side in SIDES if side in figures]


def _tables(figures: Mapping[str, Any]) -> Iterator[Table]:
    sides = _sides(figures)
    yield _sums(figures, "Together", {figures["runs"][side]["name"]: figures[side]["overall"] for side in sides})
    for side in sides:
        of = f" of {figures['runs'][side]['name']}" if len(sides) > 1 else ""
        layers = {f"layer {number}": values for number, values in figures[side]["layers"].items()}
        yield _sums(figures, f"By layer{of}", layers)
        yield _sums(figures, f"By linear{of}", figures[side]["linears"])
    if "against" in figures:
        yield _angles(figures)
    yield _weights(figures)


def _sums(figures: Mapping[str, Any], heading: str, lines: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = {"": "", "||dW||/||W||": ".1%", "share of ||dW||^2": ".1%", "effective rank": ".1f", "stable rank": ".1f"}
    columns |= {f"intruders < {threshold:g}": "" for threshold in figures["thresholds"]} | {"of": ","}
    keys = ("relative_norm", "energy_share", "effective_rank", "stable_rank")
    rows = [
        [name, *(values[key] for key in keys)]
        + [_counted(values["counts"][f"{threshold:g}"]) for threshold in figures["thresholds"]]
        + [values["vectors"]]
        for name, values in lines.items()
    ]
    return Table(heading, columns, rows, most=MOST_ROWS)


def _angles(figures: Mapping[str, Any]) -> Table:
    columns = {"principal angles of the two dW": "", "rank": "", "largest cosine": ".3f"}
    shares = {"shared": "shared", "by chance": "by_chance", "energy inside": "energy"}
    columns |= {f"{name}, {side}": ".1%" for name in shares for side in ("left", "right")}
    rows = [
        [_short(weight), angles["rank"], angles["left"]["cosines"][0]]
        + [angles[side][key] for key in shares.values() for side in ("left", "right")]
        for weight in figures["weights"]
        if (angles := weight["angles"]) is not None
    ]
    return Table("Do they change the same directions?", columns, rows, most=MOST_ROWS)


def _weights(figures: Mapping[str, Any]) -> Table:
    columns = {"weight": "", "shape": "", "rank of dW": "", "||dW||/||W||": ".1%", "s1(dW)/s1(W)": ".1%"}
    columns |= {"effective rank": ".1f", "cosines, lowest first": ""}
    keys = ("rank", "relative_norm", "relative_spectral_norm", "effective_rank")
    rows = []
    for weight in figures["weights"]:
        lowest = sorted(pair[0] for pair in weight["intruders"]["cosines"])[:4]
        cells = [_short(weight), " x ".join(map(str, weight["shape"])), *(weight["delta"][key] for key in keys)]
        rows.append([*cells, " ".join(f"{cosine:.2f}" for cosine in lowest)])
    return Table(f"By weight: {figures['runs']['first']['name']}", columns, rows, most=MOST_ROWS)


def _findings(figures: Mapping[str, Any]) -> Iterator[str]:
    for side in _sides(figures):
        run, values = figures["runs"][side], figures[side]["overall"]
        counts = [f"{_counted(values['counts'][f'{limit:g}'])} below {limit:g}" for limit in figures["thresholds"]]
        norm, rank = values["relative_norm"], values["effective_rank"]
        yield (
            f"{run['name']} ({run['method']}): dW is {'-' if norm is None else f'{norm:.1%}'} of the weights' norm, "
            f"of effective rank {'-' if rank is None else f'{rank:.1f}'} in the mean. Of the first {figures['top']} "
            f"singular vectors of each of {values['weights']:,} matrices, {values['vectors']:,} together, "
            f"the intruders are {', '.join(counts)}."
        )
        if run["rounded"]:
            yield (
                f"The weights of {run['name']} are read as {run['rounded']}, so its dW holds their rounding too, which "
                "has no rank: take effective ranks with care."
            )
    if figures["left_out"]:
        yield f"{figures['left_out']:,} weights that only the first changed are left out."


def _short(weight: Mapping[str, Any]) -> str:
    """Return layer and linear, of an expert with its number: `3 mlp.up_proj`."""
    expert = weight["name"].partition("[")[2]
    return f"{weight['layer']} {weight['linear']}" + (f" [{expert}" if expert else "")


def _counted(values: Mapping[str, int]) -> str:
    """Return `3`, or `3 to 5` where two are undecided."""
    low, high = values["intruders"], values["intruders"] + values["undecided"]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


_STYLES: dict[str, Style] = {"first": "line", "against": "dashed"}


def _figures(figures: Mapping[str, Any]) -> Iterator[Figure]:
    sides, name_of = _sides(figures), {side: figures["runs"][side]["name"] for side in _sides(figures)}
    weights = {side: [w if side == "first" else w["against"] for w in figures["weights"]] for side in sides}
    dashed = f" ({name_of['against']}: dashed)" if len(sides) > 1 else ""
    yield Figure(
        title=f"Singular values of dW{dashed}",
        unit="over the largest of W",
        x_name="singular value",
        x_scale="log",
        y_scale="log",
        curves=[
            _by_linear(weights[side], weight, _relative_values(weight), _STYLES[side])
            for side in sides
            for weight in weights[side]
            if weight["before"]["values"] and weight["delta"]["values"]
        ],
    )
    linears = list(figures["first"]["linears"])
    yield Figure(
        title="||dW|| / ||W|| by linear",
        kind="share",
        x_name="",
        x_words=[linear.rpartition(".")[2] for linear in linears],
        curves=[
            Curve(
                name=name_of[side],
                x=[place + shift for place in range(len(figures[side]["linears"]))],
                y=[values["relative_norm"] or 0.0 for values in figures[side]["linears"].values()],
                style="bars",
                colour=number,
            )
            for number, (side, shift) in enumerate(zip(sides, (-0.2, 0.2), strict=False))
        ],
        y_scale="linear",
        from_zero=True,
    )
    yield Figure(
        title=f"Intruders among the first {figures['top']}",
        kind="share",
        x_name="threshold",
        x_scale="linear",
        y_scale="linear",
        curves=[_intruders(weights[side], name_of[side], number, side) for number, side in enumerate(sides)],
    )
    if with_angles := [weight for weight in figures["weights"] if len(sides) > 1 and weight["angles"]]:
        curves = [_by_linear(with_angles, w, w["angles"]["left"]["cosines"], "line points") for w in with_angles]
        chance = [weight["angles"]["left"]["by_chance"] ** 0.5 for weight in with_angles]
        levels = [("random spaces, mean", sum(chance) / len(chance))]
        yield Figure(
            title="Cosines of the principal angles of the outputs",
            x_name="principal angle",
            curves=curves,
            levels=levels,
            y_scale="linear",
            from_zero=True,
        )


def _relative_values(weight: Mapping[str, Any]) -> list[float]:
    values = weight["delta"]["values"]
    return [value / weight["before"]["values"][0] for value in values if value > 1e-6 * values[0]]


def _by_linear(weights: Sequence[Mapping[str, Any]], weight: Mapping[str, Any], y: list[float], style: Style) -> Curve:
    """Return the curve of a weight in the colour of its linear, which the legend shows once."""
    linears = list(dict.fromkeys(each["linear"] for each in weights))
    is_first = style != "dashed" and weight is next(each for each in weights if each["linear"] == weight["linear"])
    colour, name = linears.index(weight["linear"]), weight["linear"].rpartition(".")[2]
    return Curve(name=name, x=range(1, len(y) + 1), y=y, style=style, colour=colour, is_named=is_first)


def _intruders(weights: Sequence[Mapping[str, Any]], name: str, colour: int, side: str) -> Curve:
    """Return the share of vectors below every threshold; between the bounds where these differ."""
    pairs = [pair for weight in weights for pair in weight["intruders"]["cosines"]]
    grid = [step / 200 for step in range(201)]
    low, high = ([sum(pair[end] < t for pair in pairs) / max(len(pairs), 1) for t in grid] for end in (1, 0))
    return Curve(name=name, x=grid, y=low, upper=high, colour=colour, style=_STYLES[side])
