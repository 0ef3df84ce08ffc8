"""Define the request of `distlora merge`, and its receipt: merge.json, and merge.md for people. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distlora.architecture.config_checks import read_config
from distlora.architecture.low_bit_methods import NF4, quantization_method
from distlora.config import require
from distlora.config.json_files import check_shape, read_object
from distlora.output.results import Table
from distlora.post.trained import Name, Trained
from distlora.system import atomic_io

Onto = Literal["trained", "original"]
"""The base as it was trained on (dequantized NF4, less PiSSA's initial adapter), or as it is stored."""
Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeRequest:
    """The request of `distlora merge`. Folders are absolute, defaults filled in."""

    name: Name
    """The run or adapter."""
    out: str
    """New folder for the result."""
    onto: Onto = "trained"
    dtype: Dtype = "fp32"
    """Storage dtype of the merged weights."""


def check_mergeable(trained: Trained, onto: Onto) -> None:
    """Raise UserError for a fully trained model, or an adapter that does not belong to the form of the base `onto`.

    The base alone is accepted: its trained-on form as a dense model.
    """
    spec, place = trained.spec, trained.place
    require(
        spec.adapter.method == "lora",
        f"{place} trained the whole model (adapter=full), so there is nothing to merge: {place}/model is the result; "
        "use that folder",
    )
    if onto == "trained":
        return
    require(
        trained.weights is None or not spec.adapter.for_nf4,
        f"--onto=original: {place} started by LoftQ, so its A and B hold a correction of what NF4 loses of the base, "
        "and the base on disk has lost nothing; leave --onto out",
    )
    require(
        quantization_method(read_config(Path(spec.path)), spec.path) != NF4,
        f"--onto=original: {spec.model.path} is quantized on disk, so there are no 16-bit weights to merge onto; "
        "leave --onto out",
    )


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
    """`ratio` ||dW||/||W||, `kept` by dtype (merge.py) and `base_norm` ||W||, by changed tensor."""
    total: dict[str, Any]
    """The same over all tensors; `kept.nf4` covers only those that would be quantized."""
    files: dict[str, str]
    """SHA-256 of each file in the folder except the receipt's."""
    seconds: float
    measured: dict[str, Any] = field(default_factory=dict)
    """Figures of the merged model (distlora/post/evaluate)."""

    def write(self, folder: Path) -> None:
        """Replace merge.json and merge.md in the folder."""
        atomic_io.write_json(folder / "merge.json", {"format": 1, **dataclasses.asdict(self)})
        atomic_io.write_text(folder / "merge.md", markdown(self))

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """Read a folder's receipt. Raises UserError if it is missing or damaged."""
        path = folder / "merge.json"
        values = read_object(path, "merge again")
        check_shape(values, _SHAPE, path, "merge again")
        return cls(**{entry.name: values[entry.name] for entry in dataclasses.fields(cls)})


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


def markdown(receipt: Receipt) -> str:
    """Return merge.md."""
    onto = {
        "trained": "the base as it was trained on, dequantized",
        "original": "the base as it is on disk, which is not what was trained on where that was quantized",
    }
    versions = ", ".join(f"{name} {version}" for name, version in receipt.versions.items())
    parts = [
        "# Receipt of a merge",
        f"- base: `{receipt.base['path']}`, fingerprint `{receipt.base['fingerprint']}`\n"
        f"- adapter: {'none' if receipt.adapter is None else '`' + receipt.adapter['place'] + '`'}\n"
        f"- onto: {onto[receipt.onto]}\n"
        f"- stored in {receipt.dtype}, {receipt.date}, {receipt.seconds:,.1f} s; {versions}",
    ]
    if receipt.weights:
        ratio, kept = receipt.total["ratio"], receipt.total["kept"]
        heading = f"{len(receipt.weights):,} tensors changed, ||dW||/||W|| = {ratio:.3g}; kept of dW by storing in"
        names = [f"{name} (this)" if name == receipt.dtype else name for name in kept]
        parts.append(Table(heading, [names, [f"{value:.2%}" for value in kept.values()]]).markdown())
    if receipt.measured:
        parts += ["\n".join(_measured_in_words(receipt.measured)), measured_table(receipt.measured).markdown()]
    else:
        parts += ["What the merged model computes was not measured (`distlora eval RUN THIS_FOLDER` does it)."]
    if receipt.weights:
        parts.append(_tensors(receipt).markdown())
    files = [[name, f"`{digest}`"] for name, digest in receipt.files.items()]
    parts.append(Table("Files", [["file", "SHA-256"], *files]).markdown())
    return "\n\n".join(parts) + "\n"


def measured_table(figures: Mapping[str, Any]) -> Table:
    """Return a table with one line per model; differences are to the first."""
    rows = [["", "loss", "perplexity", "difference", "std. error", "KL, nats", "max |logit diff.|", "other top token"]]
    for model in figures["models"]:
        cells = ["", "", "", "", ""]
        if model["label"] != figures["compared_with"]:
            cells = [
                signed(model["loss_difference"]),
                written(model["loss_standard_error"], ".1g"),
                written(model["divergence"], ".2g"),
                written(model["largest_logit_difference"], ".2g"),
                written(model["changed_tokens"], ".2%"),
            ]
        rows.append([model["label"], written(model["loss"], ".4f"), written(model["perplexity"], ",.3f"), *cells])
    text = figures["text"]
    of = "" if text["rows"] == text["rows_in_all"] else f" of {text['rows_in_all']:,}"
    heading = (
        f"{text['targets']:,} tokens in {text['rows']:,}{of} rows of {text['name']}, computed in {figures['dtype']}; "
        f"differences of the loss, nats per token, to {figures['compared_with']}"
    )
    return Table(heading, rows)


def written(value: float | None, form: str) -> str:
    """Format a figure; a missing or non-finite one is a dash."""
    return "-" if value is None else format(value, form)


def signed(value: float | None) -> str:
    """Format a difference of losses: four decimals, or the first digits of a small one."""
    if value is None:
        return "-"
    return f"{value:+.4f}" if abs(value) >= 5e-4 or value == 0 else f"{value:+.1e}"


def _measured_in_words(figures: Mapping[str, Any]) -> Iterator[str]:
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
        text += f"it was trained, {model['divergence']:.2g} nats per token of divergence"
        if base is not None and base["divergence"]:
            text += f" ({model['divergence'] / base['divergence']:.2g} of what the adapter itself moves)"
        yield text + f", the loss {signed(model['loss_difference'])}."


def _tensors(receipt: Receipt) -> Table:
    """Return a table of the ten tensors that lose most."""
    forms = list(next(iter(receipt.weights.values()))["kept"])
    by_loss = sorted(receipt.weights.items(), key=lambda item: item[1]["kept"].get(receipt.dtype, 1.0))
    rows = [["tensor", "||dW||/||W||", *forms]]
    for name, values in by_loss[:10]:
        kept = values["kept"]
        rows.append([name, f"{values['ratio']:.3g}", *(f"{kept[form]:.2%}" if form in kept else "" for form in forms)])
    of = f", 10 of {len(by_loss):,}" if len(by_loss) > 10 else ""
    return Table(f"Kept of dW by tensor, those first of which {receipt.dtype} keeps least{of}", rows)
