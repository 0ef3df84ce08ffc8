"""Show the figures of an analysis as tables, Markdown and a plot. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.analysis.quantization.request import PLOT_NAME
from distlora.results.tables import COLOURS, Table, as_markdown, as_text, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 40
"""Layers that a table shows; of more, the middle is left to quantization.json."""


def tables(figures: Mapping[str, Any]) -> Iterator[Table]:
    """All of them, the most important first."""
    yield _formats(figures)
    layers = {f"layer {number}": values for number, values in figures["layers"].items()}
    if not _by_harm(figures):
        yield _errors("By layer", layers)
        yield _errors("By linear", figures["linears"])
        yield _errors("Beside them: 2 million weights drawn from a distribution", figures["references"])
        return
    first = figures["formats"][0]
    tensors = sorted(figures["tensors"], key=lambda t: -t["formats"][first].get("harm", 0.0) / t["weights"])
    yield _harms("Harm by layer, nats per token / 1,000", figures["formats"], layers)
    yield _harms("Harm by linear", figures["formats"], figures["linears"])
    heading = f"Harm of the {MOST_ROWS} tensors with the most per weight in {first}"
    yield _harms(heading, figures["formats"], {tensor["name"]: tensor for tensor in tensors[:MOST_ROWS]})


def _by_harm(figures: Mapping[str, Any]) -> bool:
    """Return whether formats were named, and so measured by their harm, or by their errors alone without a text."""
    return "int4" not in figures["formats"]


def _formats(figures: Mapping[str, Any]) -> Table:
    """One line a format."""
    perplexity = figures["perplexity"]
    dense, formats = figures["dtype"], figures["overall"]["formats"]
    head = ["format", "relative error", "SNR, dB", "largest error", "bits a weight", "model, MiB"]
    rows = [head + (["perplexity", "points", "KL, nats"] if perplexity else [])]
    for name in figures["formats"]:
        values, model_bytes = formats[name], figures["model"]["bytes"][name]
        cells = [
            name,
            f"{values['relative_error']:.4f}",
            "lossless" if values["snr_db"] is None else f"{values['snr_db']:.2f}",
            f"{values['largest_error']:.2g}",
            f"{values['bits']:.3f}",
            f"{model_bytes / 2**20:,.1f}",
        ]
        of = perplexity and perplexity["formats"].get(name)  # bf16 has none where the model computed in fp32.
        if perplexity:
            cells.append(f"{of['perplexity']:,.2f}" if of else "")
            cells += ["", ""] if name == "bf16" or not of else [points(of), f"{of['divergence']:.5f}"]
        rows.append(cells)
    if perplexity and dense not in figures["formats"]:
        rows.insert(1, [dense, *[""] * 5, f"{perplexity['formats'][dense]['perplexity']:,.2f}", "", ""])
    computed = f", computed in {dense}" if perplexity else ""
    return Table(f"{figures['model_name']}: {figures['overall']['weights']:,} weights of its blocks{computed}", rows)


def _errors(heading: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [["", "weights", "excess kurtosis", "NF4 error", "int4 error", "NF4 over int4, dB"]]
    for name, values in groups.items():
        nf4, int4 = (values["formats"][format]["relative_error"] for format in ("nf4", "int4"))
        kurtosis, gain = values["excess_kurtosis"], gain_db(values)
        rows.append(
            [
                name,
                f"{values['weights']:,}",
                "-" if kurtosis is None else f"{kurtosis:+.2f}",
                f"{nf4:.4f}",
                f"{int4:.4f}",
                "-" if gain is None else f"{gain:+.2f}",
            ]
        )
    return _shortened(heading, rows)


def _harms(heading: str, formats: Sequence[str], groups: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [["", "weights", *formats]]
    for name, values in groups.items():
        harms = [values["formats"][format].get("harm") for format in formats]
        rows.append([name, f"{values['weights']:,}", *("-" if h is None else f"{1000 * h:.3g}" for h in harms)])
    return _shortened(heading, rows)


def _shortened(heading: str, rows: list[list[str]]) -> Table:
    if len(rows) > MOST_ROWS + 1:
        half = MOST_ROWS // 2
        left = [f"({len(rows) - 1 - 2 * half} more in quantization.json)", *[""] * (len(rows[0]) - 1)]
        rows = [*rows[: half + 1], left, *rows[-half:]]
    return Table(heading, rows)


def gain_db(figures: Mapping[str, Any]) -> float | None:
    """Return NF4's gain over int4 in dB; None if one of them loses nothing."""
    nf4, int4 = (figures["formats"][name]["snr_db"] for name in ("nf4", "int4"))
    return None if nf4 is None or int4 is None else nf4 - int4


def reading(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures that matter most, in sentences."""
    tensors, measured = figures["tensors"], figures["perplexity"]
    if _by_harm(figures):
        found = []
        for name, values in figures["overall"]["formats"].items():
            sentence = f"{name} at {values['bits']:.3f} bits per weight"
            sentence += f" harms by {values['harm']:.3g} nats per token, estimated" if "harm" in values else ""
            if measured and name in measured["formats"]:
                sentence += f", and {measured['formats'][name]['divergence']:.3g} measured on held-out sequences"
            found.append(f"{sentence}.")
        return found
    better = sum((gain_db(tensor) or 0) > 0 for tensor in tensors)
    nf4, int4 = (figures["overall"]["formats"][name] for name in ("nf4", "int4"))
    found = [
        f"At the same {nf4['bits']:.3f} bits a weight NF4 loses {nf4['relative_error']:.2%} of the weights' norm and "
        f"int4 {int4['relative_error']:.2%}; NF4 is the better one on {better:,} of {len(tensors):,} tensors."
    ]
    if measured:
        formats = measured["formats"]
        dense = formats[figures["dtype"]]["perplexity"]
        found.append(
            f"On {measured['targets']:,} tokens of {measured['text']} NF4 costs {points(formats['nf4'])} points of "
            f"perplexity over {dense:,.2f} and int4 {points(formats['int4'])}; the errors are of the paired difference "
            f"over {measured['rows']:,} rows. Points depend on the luck of one rounding, divergence does not."
        )
    return found


def points(values: Mapping[str, Any]) -> str:
    """`+0.31 ± 0.05`: perplexity over the dense model's."""
    error = values["points_standard_error"]
    return f"{values['points']:+,.2f}" + ("" if error is None else f" ± {error:,.2f}")


def markdown(figures: Mapping[str, Any]) -> str:
    """report.md."""
    return as_markdown(
        f"What 4 bits cost {figures['model_name']}",
        f"`{figures['command']}`, {figures['date']}, torch {figures['versions']['torch']}, {figures['device']}.",
        reading(figures),
        ("errors by layer, gain by kurtosis, perplexity", PLOT_NAME),
        tables(figures),
        NOTES + (HARM_NOTE if _by_harm(figures) else ""),
    )


NOTES = """**What is measured.** Relative error is ||w - w'|| / ||w|| (Frobenius), SNR 10 log10 of its inverse square,
largest error in the weights' own unit; dequantized in fp32. int4 is QLoRA's: 15 evenly spaced levels of a block's
absmax, in the same blocks of 64 with the same double quantization as NF4, so that bits are equal. Bits are counted
bytes, padding of the last group of 16,384 included. Perplexity is exp of the mean loss of a target token, KL the
mean of KL(unquantized model's prediction || this one's); for int4 a dense model holds what int4 gives back."""


HARM_NOTE = """

**Harm** is the KL per token that a format causes in one weight alone, estimated to second order: half the squared
errors times the diagonal of the Fisher information, from one backward per sequence for tokens that the model itself
draws. `quant=mixed quant.budget=4.5 quant.harm=FOLDER` chooses the format of each weight by it."""


def terminal(figures: Mapping[str, Any]) -> str:
    """Return the tables and conclusions for the terminal."""
    return as_text(tables(figures), reading(figures))


_FORMAT_COLOURS = {"bf16": COLOURS[6], "fp32": COLOURS[6], "nf4": COLOURS[0], "int4": COLOURS[1]}
_FORMAT_COLOURS |= {"int8": COLOURS[2], "fp8_block": COLOURS[3]}


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Errors by layer, NF4's gain over int4 by the tensors' kurtosis, and perplexity where it was measured."""
    has_text = bool(figures["perplexity"])
    left = 1 if _by_harm(figures) else 2
    figure, panels = new_figure(left + 2 * has_text, width=4 * left + 5 * has_text, height=3.4)
    _plot_layers(panels[0], figures["tensors"], [name for name in figures["formats"] if name != "bf16"])
    if left == 2:
        _plot_gains(panels[1], figures["tensors"], figures["references"])
    if has_text:
        _plot_perplexity(panels[left], panels[left + 1], figures["perplexity"]["formats"])
    figure.suptitle(f"What {'formats' if left == 1 else '4 bits'} cost {figures['model_name']}", fontsize=11)
    save(figure, path)


def _plot_layers(panel: Axes, tensors: list[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Every tensor's relative error over its layer: a dot each, and the range of each layer."""
    for number, name in enumerate(names):
        x = [tensor["layer"] + 0.24 * (number - (len(names) - 1) / 2) for tensor in tensors]
        y = [100 * tensor["formats"][name]["relative_error"] for tensor in tensors]
        panel.plot(x, y, ".", color=_FORMAT_COLOURS[name], alpha=0.7, label=name.replace("nf4", "NF4"))
    panel.set(xlabel="layer", ylabel="relative error of a tensor, %")
    panel.locator_params(axis="x", integer=True)
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)


def _plot_gains(panel: Axes, tensors: list[Mapping[str, Any]], references: Mapping[str, Any]) -> None:
    """Plot NF4's gain over int4 by kurtosis, beside known distributions."""
    linears = list(dict.fromkeys(tensor["linear"] for tensor in tensors))
    for index, linear in enumerate(linears):
        points = [(t["excess_kurtosis"], gain_db(t)) for t in tensors if t["linear"] == linear]
        x = [kurtosis for kurtosis, gain in points if gain is not None]
        y = [gain for _, gain in points if gain is not None]
        panel.plot(x, y, ".", color=COLOURS[index % len(COLOURS)], label=linear.rpartition(".")[2])
    for name, values in references.items():
        kurtosis, gain = values["excess_kurtosis"], gain_db(values) or 0.0
        panel.plot([kurtosis], [gain], "x", color="black")
        panel.annotate(name, (kurtosis, gain), textcoords="offset points", xytext=(5, -11), fontsize=8)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(xlabel="excess kurtosis of the tensor", ylabel="NF4 over int4, dB")
    if max((tensor["excess_kurtosis"] or 0) for tensor in tensors) > 8:
        # Else a few heavy-tailed tensors press the others together.
        panel.set_xscale("symlog", linthresh=4)
        panel.set_xticks([-1, 0, 2, 4, 10, 100, 1000], ["-1", "0", "2", "4", "10", "100", "1000"])
    else:
        panel.set_xlim(-1.6, 4.2)
    panel.legend(frameon=False, fontsize=7, ncols=2)


def _plot_perplexity(points: Axes, divergence: Axes, formats: Mapping[str, Any]) -> None:
    """Points over the dense model's, with their standard errors; and how far the predictions are from its own."""
    dense = next(iter(formats))
    names = [name for name in formats if name != dense]
    errors = [formats[name]["points_standard_error"] or 0.0 for name in names]
    values = [formats[name]["points"] for name in names]
    colours = [_FORMAT_COLOURS[name] for name in names]
    points.bar(range(len(names)), values, yerr=errors, capsize=4, color=colours, width=0.6)
    points.set(ylabel=f"perplexity over {dense}'s {formats[dense]['perplexity']:,.2f}")
    divergences = [1000 * formats[name]["divergence"] for name in names]
    divergence.bar(range(len(names)), divergences, color=colours, width=0.6)
    divergence.set(ylabel=f"KL from {dense}'s predictions, millinats")
    for panel in (points, divergence):
        panel.set_xticks(range(len(names)), [name.replace("nf4", "NF4") for name in names])
        panel.axhline(0, color="black", linewidth=0.8)
