"""`distlora analyze quantization`: its arguments, and its figures as a record. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distlora.config import AdapterConfig, DataConfig, ModelConfig, ModelSpec, QuantConfig, require
from distlora.results.figures import Curve, Figure
from distlora.results.record import Record, Table

NAMES = {
    "data.path": "--text",
    "data.eval_path": "--text",
    "data.sequence_length": "--sequence-length",
    "model.path": "MODEL",
}
"""Arguments of the command, by the settings that its errors name."""
HARM_ROWS = 32
"""Sequences that harm is measured on where --harm-rows does not say it."""
MOST_ROWS = 40
"""Layers that a table shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationRequest:
    """Measure the quantization error of a base: NF4 with double quantization, uniform int4 at the same bits, and bf16.

    With --formats, measure other formats, and how much harm each does to each weight, from which quant=mixed chooses.

    Prints the error per weight, layer and linear, bits per weight, and perplexity on a text; FOLDER gets a report with
    plots. Weights are read one at a time. Perplexity needs the whole model in the memory of one process.

    example: distlora analyze quantization meta-llama/Llama-3.2-1B --no-perplexity
    """

    model: str
    """MODEL: folder in Hugging Face format with 16- or 32-bit weights, or a model on the hub."""
    text: str | None = None
    """FILE: documents to measure perplexity on, in any format of data.path (default: Python's language reference,
    which large models were trained on)."""
    no_perplexity: bool = False
    """Measure only the weights; with --formats their harm too, on the base in NF4, and no held-out loss."""
    formats: tuple[str, ...] = ()
    """FORMAT,...: formats to measure: nf4, int8, fp8 (blocks of 128 x 128), bf16. Adds the harm of each to each weight
    on every second sequence of the text, in nats per token; the others are held out for the loss of each format."""
    harm_rows: int | None = None
    """N: maximum number of sequences that harm is measured on (default: 32)."""
    out: str = ""
    """FOLDER: folder for the results, without earlier ones (default: analysis/MODEL-quantization)."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype of the model."""
    rows: int = 128
    """N: maximum number of sequences of the text, evenly spaced."""
    sequence_length: int | None = None
    """N: tokens per sequence (default: 1024, or the model's context length if shorter)."""

    # Found by the launcher, which resolves those above; a field with a docstring would be an argument.
    model_name: str = ""
    text_name: str | None = None
    # Cache of tokenized rows.
    cache_dir: str = ""

    def __post_init__(self) -> None:
        require(self.rows > 0, f"--rows={self.rows} is not a valid number of rows; write 1 or more")
        require(
            self.sequence_length is None or self.sequence_length >= 2,
            f"--sequence-length={self.sequence_length} leaves no token to predict; write 2 or more",
        )

    def spec(self, quant: Literal["nf4", "none"]) -> ModelSpec:
        """Return the model; its adapter, which every model has, adds zero."""
        return ModelSpec(
            model=ModelConfig(path=self.model),
            quant=QuantConfig(method=quant, cache=False),
            adapter=AdapterConfig(r=1),
            dtype=self.dtype,
        )

    def data(self) -> DataConfig:
        """Return the data settings of the text."""
        assert self.text is not None
        assert self.sequence_length is not None
        return DataConfig(
            path=self.text, eval_fraction=0.0, sequence_length=self.sequence_length, cache_dir=self.cache_dir
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


def record(figures: Mapping[str, Any]) -> Record:
    """Return the figures of quantization.json as a record."""
    return Record(
        title=f"What {'formats' if _by_harm(figures) else '4 bits'} cost {figures['model_name']}",
        made_by=f"`{figures['command']}`, {figures['date']}, torch {figures['versions']['torch']}, "
        f"{figures['device']}.",
        findings=list(_findings(figures)),
        tables=list(_tables(figures)),
        figures=list(_figures(figures)),
        notes=NOTES + (HARM_NOTE if _by_harm(figures) else ""),
        data=figures,
    )


def _by_harm(figures: Mapping[str, Any]) -> bool:
    """Return whether formats were named, and so measured by their harm, or by their errors alone without a text."""
    return "int4" not in figures["formats"]


def _tables(figures: Mapping[str, Any]) -> Iterator[Table]:
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


def _formats(figures: Mapping[str, Any]) -> Table:
    perplexity, dense = figures["perplexity"], figures["dtype"]
    columns = {
        "format": "",
        "relative error": ".4f",
        "SNR, dB": ".2f",
        "largest error": ".2g",
        "bits a weight": ".3f",
        "model, MiB": ",.1f",
    }
    rows = []
    for name in figures["formats"]:
        values = figures["overall"]["formats"][name]
        snr = "lossless" if values["snr_db"] is None else values["snr_db"]
        cells = [name, values["relative_error"], snr, values["largest_error"], values["bits"]]
        rows.append([*cells, figures["model"]["bytes"][name] / 2**20])
    if perplexity:
        columns |= {"perplexity": ",.2f", "points": "", "KL, nats": ".5f"}
        if dense not in figures["formats"]:
            rows.insert(0, [dense, *[""] * 5])
        for row in rows:
            of = perplexity["formats"].get(row[0])  # bf16 has none where the model computed in fp32.
            row += [of["perplexity"] if of else ""]
            row += ["", ""] if row[0] in ("bf16", dense) or not of else [_points(of), of["divergence"]]
    computed = f", computed in {dense}" if perplexity else ""
    heading = f"{figures['model_name']}: {figures['overall']['weights']:,} weights of its blocks{computed}"
    return Table(heading, columns, rows)


def _errors(heading: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = {"": "", "weights": ",", "excess kurtosis": "+.2f"}
    columns |= {"NF4 error": ".4f", "int4 error": ".4f", "NF4 over int4, dB": "+.2f"}
    rows = [
        [name, v["weights"], v["excess_kurtosis"]]
        + [v["formats"][format]["relative_error"] for format in ("nf4", "int4")]
        + [_gain_db(v)]
        for name, v in groups.items()
    ]
    return Table(heading, columns, rows, most=MOST_ROWS)


def _harms(heading: str, formats: Sequence[str], groups: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = {"": "", "weights": ","} | dict.fromkeys(formats, ".3g")
    rows: list[list[Any]] = []
    for name, values in groups.items():
        harms = [values["formats"][format].get("harm") for format in formats]
        rows.append([name, values["weights"], *(None if harm is None else 1000 * harm for harm in harms)])
    return Table(heading, columns, rows, most=MOST_ROWS)


def _gain_db(values: Mapping[str, Any]) -> float | None:
    """Return NF4's gain over int4 in dB; None if one of them loses nothing."""
    nf4, int4 = (values["formats"][name]["snr_db"] for name in ("nf4", "int4"))
    return None if nf4 is None or int4 is None else nf4 - int4


def _points(values: Mapping[str, Any]) -> str:
    """Return `+0.31 ± 0.05`: perplexity over the dense model's."""
    error = values["points_standard_error"]
    return f"{values['points']:+,.2f}" + ("" if error is None else f" ± {error:,.2f}")


def _findings(figures: Mapping[str, Any]) -> Iterator[str]:
    measured, formats = figures["perplexity"], figures["overall"]["formats"]
    if _by_harm(figures):
        for name, values in formats.items():
            sentence = f"{name} at {values['bits']:.3f} bits per weight"
            sentence += f" harms by {values['harm']:.3g} nats per token, estimated" if "harm" in values else ""
            if measured and name in measured["formats"]:
                sentence += f", and {measured['formats'][name]['divergence']:.3g} measured on held-out sequences"
            yield f"{sentence}."
        return
    better = sum((_gain_db(tensor) or 0) > 0 for tensor in figures["tensors"])
    nf4, int4 = formats["nf4"], formats["int4"]
    yield (
        f"At the same {nf4['bits']:.3f} bits a weight NF4 loses {nf4['relative_error']:.2%} of the weights' norm and "
        f"int4 {int4['relative_error']:.2%}; NF4 is the better one on {better:,} of {len(figures['tensors']):,} "
        "tensors."
    )
    if measured:
        dense = measured["formats"][figures["dtype"]]["perplexity"]
        costs = {name: _points(measured["formats"][name]) for name in ("nf4", "int4")}
        yield (
            f"On {measured['targets']:,} tokens of {measured['text']} NF4 costs {costs['nf4']} points of "
            f"perplexity over {dense:,.2f} and int4 {costs['int4']}; the errors are of the paired difference "
            f"over {measured['rows']:,} rows. Points depend on the luck of one rounding, divergence does not."
        )


_COLOURS = {"bf16": 6, "fp32": 6, "nf4": 0, "int4": 1, "int8": 2, "fp8_block": 3}
"""Colour of each format in all figures."""


def _figures(figures: Mapping[str, Any]) -> Iterator[Figure]:
    tensors, measured = figures["tensors"], figures["perplexity"]
    names = [name for name in figures["formats"] if name != "bf16"]
    yield Figure(
        title="Relative error of a tensor by layer",
        kind="share",
        x_name="layer",
        curves=[
            Curve(
                name=name,
                x=[tensor["layer"] + 0.24 * (number - (len(names) - 1) / 2) for tensor in tensors],
                y=[tensor["formats"][name]["relative_error"] for tensor in tensors],
                style="dots",
                colour=_COLOURS[name],
            )
            for number, name in enumerate(names)
        ],
        from_zero=True,
    )
    if not _by_harm(figures):
        linears = list(dict.fromkeys(tensor["linear"] for tensor in tensors))
        groups = {name.rpartition(".")[2]: [t for t in tensors if t["linear"] == name] for name in linears}
        curves = [_gains(name, group, number) for number, (name, group) in enumerate(groups.items())]
        curves += [
            _gains(name, [values], 6 + number) for number, (name, values) in enumerate(figures["references"].items())
        ]
        yield Figure(
            title="Gain of NF4 over int4 by excess kurtosis",
            unit="dB",
            x_name="excess kurtosis of the tensor (crosses: known distributions)",
            x_scale="linear",
            y_scale="linear",
            curves=curves,
        )
    if measured:
        formats = measured["formats"]
        others = [name for name in formats if name != figures["dtype"]]
        errors = [formats[name]["points_standard_error"] or 0.0 for name in others]
        for title, unit, key, lengths in (
            (f"Perplexity over {figures['dtype']}'s", "points", "points", errors),
            (f"KL from {figures['dtype']}'s predictions", "nats per token", "divergence", []),
        ):
            bars = [
                Curve(
                    x=[place],
                    y=[formats[name][key]],
                    errors=lengths[place : place + 1],
                    style="bars",
                    colour=_COLOURS[name],
                    is_named=False,
                )
                for place, name in enumerate(others)
            ]
            yield Figure(title=title, unit=unit, curves=bars, x_name="format", x_words=others, y_scale="linear")


def _gains(name: str, group: Sequence[Mapping[str, Any]], colour: int) -> Curve:
    points = [(values["excess_kurtosis"], _gain_db(values)) for values in group]
    known = [(kurtosis, gain) for kurtosis, gain in points if kurtosis is not None and gain is not None]
    x, y = [kurtosis for kurtosis, _ in known], [gain for _, gain in known]
    return Curve(name=name, x=x, y=y, style="cross" if "layer" not in group[0] else "dots", colour=colour)
