"""The figures of an analysis in words and tables: for the terminal, and as Markdown. Pure text; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distlora.analysis.quantization.request import PLOT_NAME
from distlora.output.tables import Table, as_markdown, as_text

QLORA_TABLE_2 = {"Int4": 34.34, "Float4 (E2M1)": 31.07, "Float4 (E3M0)": 29.48, "NFloat4 + DQ": 27.41}
"""Mean perplexity on Pile Common Crawl of OPT, BLOOM, LLaMA and Pythia models of 125M to 13B (arXiv 2305.14314)."""

MOST_ROWS = 40
"""Layers that a table shows; of more, the middle is left to quantization.json."""


def tables(figures: Mapping[str, Any]) -> Iterator[Table]:
    """All of them, the most important first."""
    yield _formats(figures)
    layers = {f"layer {number}": values for number, values in figures["layers"].items()}
    yield _errors("By layer", layers)
    yield _errors("By linear", figures["linears"])
    yield _errors("Beside them: 2 million weights drawn from a distribution", figures["references"])


def _formats(figures: Mapping[str, Any]) -> Table:
    """One line a format."""
    perplexity = figures["perplexity"]
    dense, formats = figures["dtype"], figures["overall"]["formats"]
    head = ["format", "relative error", "SNR, dB", "largest error", "bits a weight", "model, MiB"]
    rows = [head + (["perplexity", "points", "KL, nats"] if perplexity else [])]
    for name in ("bf16", "nf4", "int4"):
        values, model_bytes = formats[name], figures["model"]["bytes"][name]
        cells = [
            name,
            f"{values['relative_error']:.4f}",
            _db(values["snr_db"]),
            f"{values['largest_error']:.2g}",
            f"{values['bits']:.3f}",
            f"{model_bytes / 2**20:,.1f}",
        ]
        of = perplexity and perplexity["formats"].get(name)  # bf16 has none where the model computed in fp32.
        if perplexity:
            cells.append(f"{of['perplexity']:,.2f}" if of else "")
            cells += ["", ""] if name == "bf16" else [points(of), f"{of['divergence']:.5f}"]
        rows.append(cells)
    if perplexity and dense == "fp32":
        rows.insert(1, ["fp32", *[""] * 5, f"{perplexity['formats'][dense]['perplexity']:,.2f}", "", ""])
    computed = f", computed in {dense}" if perplexity else ""
    return Table(f"{figures['model_name']}: {figures['overall']['weights']:,} weights of its blocks{computed}", rows)


def _errors(heading: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [["", "weights", "excess kurtosis", "NF4 error", "int4 error", "NF4 over int4, dB"]]
    for name, values in groups.items():
        nf4, int4 = (values["formats"][format]["relative_error"] for format in ("nf4", "int4"))
        kurtosis = values["excess_kurtosis"]
        rows.append(
            [
                name,
                f"{values['weights']:,}",
                "-" if kurtosis is None else f"{kurtosis:+.2f}",
                f"{nf4:.4f}",
                f"{int4:.4f}",
                _signed(gain_db(values)),
            ]
        )
    if len(rows) > MOST_ROWS:
        half = MOST_ROWS // 2
        left = [f"({len(rows) - 1 - 2 * half} more in quantization.json)", *[""] * 5]
        rows = [*rows[: half + 1], left, *rows[-half:]]
    return Table(heading, rows)


def gain_db(figures: Mapping[str, Any]) -> float | None:
    """Return NF4's gain over int4 in dB; None if one of them loses nothing."""
    nf4, int4 = (figures["formats"][name]["snr_db"] for name in ("nf4", "int4"))
    return None if nf4 is None or int4 is None else nf4 - int4


def reading(figures: Mapping[str, Any]) -> list[str]:
    """Return conclusions, each derived from the figures."""
    found = [_weights_read(figures), _references_read(figures["references"])]
    if figures["perplexity"]:
        found += list(_perplexity_read(figures))
    return found


def _weights_read(figures: Mapping[str, Any]) -> str:
    tensors = figures["tensors"]
    better = sum((gain_db(tensor) or 0) > 0 for tensor in tensors)
    kurtosis = sorted(tensor["excess_kurtosis"] for tensor in tensors if tensor["excess_kurtosis"] is not None)
    nf4, int4 = (figures["overall"]["formats"][name] for name in ("nf4", "int4"))
    text = (
        f"At the same {nf4['bits']:.3f} bits a weight NF4 loses {nf4['relative_error']:.2%} of the weights' norm and "
        f"int4 {int4['relative_error']:.2%}; NF4 is the better one on {better:,} of {len(tensors):,} tensors."
    )
    if kurtosis:
        middle = kurtosis[len(kurtosis) // 2]
        text += (
            f" Their excess kurtosis (0: normal, -1.2: uniform) is {kurtosis[0]:+.2f} to {kurtosis[-1]:+.2f}, "
            f"{middle:+.2f} in the middle."
        )
    return text


def _references_read(references: Mapping[str, Any]) -> str:
    gains = {name: gain_db(values) for name, values in references.items()}
    parts = [
        f"{'NF4' if gain > 0 else 'int4'} by {abs(gain):.2f} dB on {name} weights"
        for name, gain in gains.items()
        if gain is not None
    ]
    return f"Of weights drawn from a distribution the better one is {', '.join(parts)}."


def _perplexity_read(figures: Mapping[str, Any]) -> Iterator[str]:
    measured = figures["perplexity"]
    formats = measured["formats"]
    nf4, int4, dense = formats["nf4"], formats["int4"], formats[figures["dtype"]]
    yield (
        f"On {measured['targets']:,} tokens of {measured['text']} NF4 costs {points(nf4)} points of perplexity over "
        f"{dense['perplexity']:,.2f} ({nf4['points'] / dense['perplexity']:+.2%}) and int4 {points(int4)} "
        f"({int4['points'] / dense['perplexity']:+.2%}); the errors are of the paired difference over "
        f"{measured['rows']:,} rows."
    )
    squared = (figures["overall"]["formats"][name]["relative_error"] ** 2 for name in ("int4", "nf4"))
    apart = [next(squared) / next(squared), int4["divergence"] / nf4["divergence"]]
    yield (
        f"Its predictions diverge from the unquantized model's by {nf4['divergence']:.2g} nats a token in NF4 and by "
        f"{int4['divergence']:.2g} in int4, {apart[1]:.2f} times as much (the weights' squared errors: {apart[0]:.2f} "
        "times). "
        "Points go up or down with the luck of one rounding, divergence does not."
    )
    within = 1 <= nf4["points"] <= 3
    yield (
        f'The field\'s "1 to 3 points" for NF4 {"holds" if within else "does not hold"} here: it is a number of '
        "points, and what a point is depends on the perplexity that it is added to."
    )
    published = ", ".join(f"{name} {value}" for name, value in QLORA_TABLE_2.items())
    yield f"Published beside it (QLoRA, table 2, other models and text): {published}."


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
        NOTES,
    )


NOTES = """**What is measured.** Relative error is ||w - w'|| / ||w|| (Frobenius), SNR 10 log10 of its inverse square,
largest error in the weights' own unit; dequantized in fp32. int4 is QLoRA's: 15 evenly spaced levels of a block's
absmax, in the same blocks of 64 with the same double quantization as NF4, so that bits are equal. Bits are counted
bytes, padding of the last group of 16,384 included. Perplexity is exp of the mean loss of a target token, KL the
mean of KL(unquantized model's prediction || this one's); for int4 a dense model holds what int4 gives back."""


def terminal(figures: Mapping[str, Any]) -> str:
    """Return the tables and conclusions for the terminal."""
    return as_text(tables(figures), reading(figures))


def _db(value: float | None) -> str:
    return "lossless" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
