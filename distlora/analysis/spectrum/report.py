"""The figures of an analysis in words and tables: for the terminal, and as Markdown. Pure text; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distlora.analysis.spectrum.request import PLOT_NAME
from distlora.output.tables import Table, as_markdown, as_text

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
    """Return conclusions, each derived from the figures."""
    said = []
    for side in (side for side in SIDES if side in found):
        run, values = found["runs"][side], found[side]["overall"]
        counts = [
            f"{values['counts'][f'{threshold:g}']['intruders']:,} below {threshold:g}"
            for threshold in found["thresholds"]
        ]
        undecided = sum(values["counts"][f"{threshold:g}"]["undecided"] for threshold in found["thresholds"])
        said.append(
            f"{run['name']} ({run['method']}): dW is {percent(values['relative_norm'])} of the weights' norm, of "
            f"effective rank {number(values['effective_rank'])} in the mean. Of the first {found['top']} singular "
            f"vectors of each of {values['weights']:,} matrices, {values['vectors']:,} together, the intruders are "
            f"{', '.join(counts)}" + (f"; {undecided:,} counts are undecided." if undecided else ".")
        )
        largest = max(found[side]["linears"].items(), key=lambda item: item[1]["energy_share"] or 0)
        said.append(f"Most of the change is in {largest[0]}: {percent(largest[1]['energy_share'])} of ||dW||^2.")
        if run["rounded"]:
            said.append(
                f"The weights of {run['name']} are read as {run['rounded']}, so its dW holds their rounding too, which "
                "has no rank: take effective ranks with care."
            )
    angles = [weight["angles"] for weight in found["weights"] if weight.get("angles")]
    if angles:
        shared, chance = (sum(a["left"][key] for a in angles) / len(angles) for key in ("shared", "by_chance"))
        energy = sum(a["left"]["energy"] for a in angles) / len(angles)
        said.append(
            f"Their leading output directions share {percent(shared)} (random ones: {percent(chance)}), and those of "
            f"{found['runs']['first']['name']} hold {percent(energy)} of the other's ||dW||^2."
        )
    if found["left_out"]:
        said.append(f"{found['left_out']:,} weights that only the first changed are left out.")
    return said


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
