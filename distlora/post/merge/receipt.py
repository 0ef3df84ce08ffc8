"""merge.json: what was merged from what, and what that kept. Imports no torch."""

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
    """What stands in merge.json; what later commands add stands in sections of their own names."""

    onto: str
    """trained or original."""
    dtype: str
    """fp32, bf16 or fp16."""
    date: str
    versions: dict[str, str]
    base: dict[str, Any]
    """path, fingerprint, and `files`: the SHA-256 of its weights' files by name."""
    adapter: dict[str, Any] | None
    """place as it was named, folder, `files`; None for the base alone."""
    weights: dict[str, dict[str, Any]]
    """Of each tensor that something was added to: `ratio` ||dW||/||W||, `kept` by form (kept.py), `base_norm` ||W||."""
    total: dict[str, Any]
    """The same of all of them together; `kept.nf4` is of those alone that would be quantized."""
    files: dict[str, str]
    """The SHA-256 of each file of the folder but this one and its page."""
    seconds: float
    measured: dict[str, Any] = field(default_factory=dict)
    """What the merged model was measured to compute (distlora/post/evaluate)."""

    def write(self, folder: Path) -> None:
        """Replace the folder's merge.json, and merge.md, which says the same to people."""
        atomic_io.write_json(folder / RECEIPT_NAME, {"format": FORMAT, **dataclasses.asdict(self)})
        atomic_io.write_text(folder / PAGE_NAME, markdown(self))

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """Raises UserError for a folder without one, and for one that is damaged."""
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
"""Tensors of a table; merge.json has all."""


def markdown(receipt: Receipt) -> str:
    """The whole page."""
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
    return [f"{value:.2%}" for value in kept.values()]


def measured_table(figures: Mapping[str, Any]) -> Table:
    """A line a model; differences are to the first."""
    rows = [["", "loss", "perplexity", "difference", "std. error", "KL, nats", "max |logit diff.|", "other top token"]]
    for model in figures["models"]:
        is_first = model["label"] == figures["compared_with"]
        cells = ["", "", "", "", ""] if is_first else compared_cells(model)
        rows.append([model["label"], written(model["loss"], ".4f"), written(model["perplexity"], ",.3f"), *cells])
    return Table(_heading(figures), rows)


def compared_cells(model: Mapping[str, Any]) -> list[str]:
    """How a model differs from the first."""
    return [
        signed(model["loss_difference"]),
        written(model["loss_standard_error"], ".1g"),
        written(model["divergence"], ".2g"),
        written(model["largest_logit_difference"], ".2g"),
        written(model["changed_tokens"], ".2%"),
    ]


def written(value: float | None, form: str) -> str:
    """A figure; one that is not there, or not finite, as a dash."""
    return "-" if value is None else format(value, form)


def signed(value: float | None) -> str:
    """A difference of losses: four decimals where that says something, else the first digits."""
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
    """What the figures of a merge say, a sentence each; the base without the adapter is the scale."""
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
    """Those of which storing keeps least."""
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
