"""Write and read merge.json, the receipt of a merge, and merge.md, the same for people. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.config.json_files import check_shape, read_object
from distlora.output.tables import Table
from distlora.system import atomic_io

RECEIPT_NAME = "merge.json"
FORMAT = 1
_AGAIN = "merge again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """The content of merge.json. Later commands add sections of their own."""

    onto: str
    """trained or original."""
    dtype: str
    """fp32, bf16 or fp16."""
    date: str
    versions: dict[str, str]
    base: dict[str, Any]
    """path, fingerprint, and `files`: SHA-256 of the weight files by name."""
    adapter: dict[str, Any] | None
    """place as it was typed, folder, `files`; None for the base alone."""
    weights: dict[str, dict[str, Any]]
    """By changed tensor: `ratio` ||dW||/||W||, `kept` by dtype (rounding_loss.py), `base_norm` ||W||."""
    total: dict[str, Any]
    """The same over all tensors; `kept.nf4` covers only those that would be quantized."""
    files: dict[str, str]
    """SHA-256 of each file in the folder except the receipt's."""
    seconds: float
    measured: dict[str, Any] = field(default_factory=dict)
    """Figures of the merged model (distlora/post/evaluate)."""

    def write(self, folder: Path) -> None:
        """Replace merge.json and merge.md in the folder."""
        atomic_io.write_json(folder / RECEIPT_NAME, {"format": FORMAT, **dataclasses.asdict(self)})
        atomic_io.write_text(folder / PAGE_NAME, markdown(self))

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """Read a folder's receipt. Raises UserError if it is missing or damaged."""
        path = folder / RECEIPT_NAME
        values = read_object(path, _AGAIN)
        check_shape(values, _SHAPE, path, _AGAIN)
        known = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


_SHAPE: dict[str, Any] = {
    "format": int,
    "onto": str,
    "dtype": str,
    "date": str,
    "versions": {"*": str},
    "base": {"path": str, "fingerprint": str, "files": {"*": str}},
    "adapter": (dict, type(None)),
    "weights": {"*": dict},
    "total": dict,
    "files": {"*": str},
    "seconds": float,
    "measured": dict,
}


if TYPE_CHECKING:
    from distlora.post.merge.receipt import Receipt

PAGE_NAME = "merge.md"
ONTO = {
    "trained": "the base as it was trained on, dequantized",
    "original": "the base as it is on disk, which is not what was trained on where that was quantized",
}
_SHOWN = 10
"""Tensors per table; merge.json has all."""


def markdown(receipt: Receipt) -> str:
    """Return merge.md."""
    parts = ["# Receipt of a merge", "\n".join(_what(receipt))]
    if receipt.weights:
        parts += [_kept(receipt).markdown()]
    if receipt.measured:
        parts += ["\n".join(measured_in_words(receipt.measured)), measured_table(receipt.measured).markdown()]
    else:
        parts += ["What the merged model computes was not measured (`distlora eval RUN THIS_FOLDER` does it)."]
    if receipt.weights:
        parts += [_tensors(receipt).markdown()]
    parts += [_files(receipt).markdown()]
    return "\n\n".join(parts) + "\n"


def _what(receipt: Receipt) -> Iterator[str]:
    adapter = receipt.adapter or {}
    yield f"- base: `{receipt.base['path']}`, fingerprint `{receipt.base['fingerprint']}`"
    yield f"- adapter: `{adapter['place']}`" if adapter else "- adapter: none"
    yield f"- onto: {ONTO.get(receipt.onto, receipt.onto)}"
    versions = ", ".join(f"{name} {version}" for name, version in receipt.versions.items())
    yield f"- stored in {receipt.dtype}, {receipt.date}, {receipt.seconds:,.1f} s; {versions}"


def _kept(receipt: Receipt) -> Table:
    total = receipt.total
    heading = f"{len(receipt.weights):,} tensors changed, ||dW||/||W|| = {total['ratio']:.3g}; kept of dW by storing in"
    kept = {name: value for name, value in total["kept"].items() if value is not None}
    return Table(heading, [[f"{name} (this)" if name == receipt.dtype else name for name in kept], percents(kept)])


def percents(kept: Mapping[str, float]) -> list[str]:
    """Format the shares as percentages."""
    return [f"{value:.2%}" for value in kept.values()]


def measured_table(figures: Mapping[str, Any]) -> Table:
    """Return a table with one line per model; differences are to the first."""
    rows = [["", "loss", "perplexity", "difference", "std. error", "KL, nats", "max |logit diff.|", "other top token"]]
    for model in figures["models"]:
        is_first = model["label"] == figures["compared_with"]
        cells = ["", "", "", "", ""] if is_first else compared_cells(model)
        rows.append([model["label"], written(model["loss"], ".4f"), written(model["perplexity"], ",.3f"), *cells])
    return Table(_heading(figures), rows)


def compared_cells(model: Mapping[str, Any]) -> list[str]:
    """Return the cells of a model's differences from the first."""
    return [
        signed(model["loss_difference"]),
        written(model["loss_standard_error"], ".1g"),
        written(model["divergence"], ".2g"),
        written(model["largest_logit_difference"], ".2g"),
        written(model["changed_tokens"], ".2%"),
    ]


def written(value: float | None, form: str) -> str:
    """Format a figure; a missing or non-finite one is a dash."""
    return "-" if value is None else format(value, form)


def signed(value: float | None) -> str:
    """Format a difference of losses: four decimals, or the first digits of a small one."""
    if value is None:
        return "-"
    return f"{value:+.4f}" if abs(value) >= 5e-4 or value == 0 else f"{value:+.1e}"


def _heading(figures: Mapping[str, Any]) -> str:
    text = figures["text"]
    of = "" if text["rows"] == text["rows_in_all"] else f" of {text['rows_in_all']:,}"
    return (
        f"{text['targets']:,} tokens in {text['rows']:,}{of} rows of {text['name']}, computed in {figures['dtype']}; "
        f"differences of the loss, nats a token, to {figures['compared_with']}"
    )


def measured_in_words(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence per measured form; the base without the adapter is the scale."""
    models = figures["models"]
    base = next((model for model in models if model["kind"] == "base"), None)
    for model in models[1:]:
        if model["kind"] not in ("merged", "form"):
            continue
        if model["divergence"] is None:
            yield f"- {model['label']}: its figures are not finite; this model is of no use."
            continue
        text = (
            f"- {model['label']}: no logit is further than {model['largest_logit_difference']:.2g} from the model as "
        )
        text += f"it was trained, {model['divergence']:.2g} nats a token of divergence"
        if base is not None and base["divergence"]:
            text += f" ({model['divergence'] / base['divergence']:.2g} of what the adapter itself moves)"
        yield text + f", the loss {signed(model['loss_difference'])}."


def _tensors(receipt: Receipt) -> Table:
    """Return a table of the tensors that lose most."""
    forms = list(next(iter(receipt.weights.values()))["kept"])
    by_loss = sorted(receipt.weights.items(), key=lambda item: item[1]["kept"].get(receipt.dtype, 1.0))
    rows = [["tensor", "||dW||/||W||", *forms]]
    for name, values in by_loss[:_SHOWN]:
        kept = values["kept"]
        rows.append([name, f"{values['ratio']:.3g}", *(f"{kept[form]:.2%}" if form in kept else "" for form in forms)])
    of = f", {_SHOWN} of {len(by_loss):,}" if len(by_loss) > _SHOWN else ""
    return Table(f"Kept of dW by tensor, those first of which {receipt.dtype} keeps least{of}", rows)


def _files(receipt: Receipt) -> Table:
    return Table("Files", [["file", "SHA-256"], *([name, f"`{digest}`"] for name, digest in receipt.files.items())])
