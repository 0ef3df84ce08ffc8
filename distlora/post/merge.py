"""Define the request of `distlora merge`, and its receipt: merge.json, and merge.md for people. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.config_checks import read_config
from distlora.architecture.low_bit_headers import LowBitSegment, LowBitTensor, in_nf4
from distlora.architecture.low_bit_methods import BNB_NF4, quantization_method
from distlora.config import require
from distlora.config.json_files import check_shape, read_object
from distlora.post.evaluate import measured_table, signed
from distlora.post.trained import UNNAMED, Name, Named, Trained, read_combined
from distlora.results.record import Record, Table
from distlora.system import atomic_io

Onto = Literal["trained", "original"]
"""The base as it was trained on (dequantized NF4, less PiSSA's initial adapter), or as it is stored."""
Dtype = Literal["fp32", "bf16", "fp16", "shipped"]
SHIPPED = "shipped"
"""The low-bit format in which the base is stored."""
REQUANTIZED = ("scaled", "mxfp4", "nvfp4", "modelopt_nvfp4", "packed")
"""Codecs that can be written: keys of distlora.weights.low_bit.requantize.GRIDS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeRequest(Named):
    """Merge a base and the adapter trained on it into one model in Hugging Face format, on the CPU.

    An unfinished run is merged from its newest checkpoint. merge.json lists the sources, SHA-256 hashes, and per tensor
    how much of the adapter's change survived rounding. Then the merged model is compared with the model as trained:
    loss, KL divergence and the largest logit difference are added to merge.json and merge.md.

    example: distlora merge runs/first --dtype bf16
    """

    out: str = ""
    """FOLDER: new folder for the model (default: RUN/merged, RUN/merged-CHECKPOINT or ADAPTER-merged)."""
    onto: Onto = "trained"
    """Base to merge into: trained is the dequantized base that training computed with; original is the base on disk,
    whose outputs differ by the NF4 error."""
    dtype: Dtype | None = None
    """Dtype of the weights: fp32 is exact; bf16 and fp16 round; shipped quantizes what the adapter changes to the low
    bits that the base is shipped in, and copies the rest (default: fp32; bf16 for a base that is shipped in low
    bits)."""
    text: str | None = None
    """FILE: text to measure on, in any format of data.path (default: the run's held-out data)."""
    rows: int | None = None
    """N: maximum number of sequences to measure, evenly spaced (default: 128; without a GPU as many as take ten
    minutes)."""
    compare: bool = False
    """Measure the other options too: bf16, fp16, NF4 again, and --onto original."""
    processes: int = 1
    """N: shard each measured model over N processes, one per GPU."""
    no_measure: bool = False
    """Only write the folder; needs no memory for a whole model."""

    # The run or adapter, which the launcher finds; a field with a docstring would be an argument.
    name: Name = UNNAMED


def low_bit_tensors(trained: Trained) -> list[LowBitTensor]:
    """Return the weights that the base is shipped with in low bits other than NF4."""
    headers = CheckpointFiles(trained.base).headers.values()
    return [segment.tensor for segment in headers if isinstance(segment, LowBitSegment) and not in_nf4(segment)]


def default_dtype(trained: Trained) -> Dtype:
    """Return the dtype without --dtype."""
    return "bf16" if low_bit_tensors(trained) else "fp32"


def check_shipped(trained: Trained, onto: Onto) -> None:
    """Raise UserError for a base whose stored format cannot be written again, or was not trained on."""
    place, tensors = trained.spec.model.path, low_bit_tensors(trained)
    instead = "Leave --dtype out for a merge in 16 bits, or serve the base as it is with the adapter beside it"
    require(
        bool(tensors),
        f"--dtype=shipped: the weights of {place} are not in low bits, or in bitsandbytes' NF4, which is not "
        f"written again. {instead}",
    )
    require(
        onto == "original" or trained.spec.quant.method in ("keep", "none"),
        f"--dtype=shipped: {trained.place} was trained on {place} with quant={trained.spec.quant.method}, and what is "
        "not adapted stays as it is shipped; add --onto original, which adds the adapter to the shipped values",
    )
    for tensor in tensors:
        how = f"as {tensor.codec}" if tensor.codec not in REQUANTIZED else "with its columns in activation order"
        require(
            tensor.codec in REQUANTIZED and "order" not in tensor.parts,
            f"--dtype=shipped: {tensor.name} is stored {how}, which can be read only; FP8, MXFP4, NVFP4 and "
            f"compressed-tensors' integers can be written. {instead}",
        )


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
        of_pissa = trained.foreign and trained.weights is not None and read_combined(trained.weights).pissa
        require(
            not of_pissa or spec.quant.method not in ("nf4", "mixed"),
            f"--onto=trained: {trained.weights} is a sum with an adapter that trained with PiSSA on NF4 of the base "
            "without its start, and a sum has no such base: NF4 of the whole base loses something else; write --onto "
            "original, where the sum is exact",
        )
        return
    require(
        trained.weights is None or not spec.adapter.for_nf4,
        f"--onto=original: {place} started by LoftQ, so its A and B hold a correction of what NF4 loses of the base, "
        "and the base on disk has lost nothing; leave --onto out",
    )
    require(
        quantization_method(read_config(Path(spec.path)), spec.path) != BNB_NF4,
        f"--onto=original: {spec.model.path} is quantized on disk, so there are no 16-bit weights to merge onto; "
        "leave --onto out",
    )


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """The content of merge.json. Later commands add sections of their own."""

    onto: str
    """trained or original."""
    dtype: str
    """fp32, bf16, fp16 or shipped."""
    date: str
    versions: dict[str, str]
    base: dict[str, Any]
    """path, fingerprint, and `files`: SHA-256 of the weight files by name."""
    adapter: dict[str, Any] | None
    """place as it was typed, folder, `files`; None for the base alone."""
    weights: dict[str, dict[str, Any]]
    """`ratio` ||dW||/||W||, `kept` by dtype (merge.py) and `base_norm` ||W||, by changed tensor. Of dtype shipped also
    `error` ||M - Q||/||M||, the relative error of the stored weight to the exact sum."""
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
        atomic_io.write_text(folder / "merge.md", record(self).markdown())

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """Read a folder's receipt. Raises UserError if it is missing or damaged."""
        path = folder / "merge.json"
        values = read_object(path, "merge again")
        check_shape(values, _SHAPE, path, "merge again")
        return cls(**{entry.name: values[entry.name] for entry in dataclasses.fields(cls)})


_ONTO = {
    "trained": "the base as it was trained on, dequantized",
    "original": "the base as it is on disk, which is not what was trained on where that was quantized",
}


def record(receipt: Receipt) -> Record:
    """Return merge.json as a record."""
    measured = "What the merged model computes was not measured (`distlora eval RUN THIS_FOLDER` does it)."
    return Record(
        title="Receipt of a merge",
        findings=[
            f"base: `{receipt.base['path']}`, fingerprint `{receipt.base['fingerprint']}`",
            f"adapter: {'none' if receipt.adapter is None else '`' + receipt.adapter['place'] + '`'}",
            f"onto: {_ONTO[receipt.onto]}",
            f"stored in {receipt.dtype}, {receipt.date}, {receipt.seconds:,.1f} s; "
            + ", ".join(f"{name} {version}" for name, version in receipt.versions.items()),
            *(_measured_in_words(receipt.measured) if receipt.measured else [measured]),
            *loss_in_words(receipt),
        ],
        tables=[
            *changes(receipt)[:1],
            *([measured_table(receipt.measured)] if receipt.measured else []),
            *changes(receipt)[1:],
            Table("Files", ["file", "SHA-256"], [[name, f"`{digest}`"] for name, digest in receipt.files.items()]),
        ],
    )


def _measured_in_words(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence per measured form; the base without the adapter is the scale."""
    models = figures["models"]
    base = next((model for model in models if model["kind"] == "base"), None)
    for model in models[1:]:
        if model["kind"] not in ("merged", "form"):
            continue
        if model["divergence"] is None:
            yield f"{model['label']}: its figures are not finite; this model is of no use."
            continue
        text = f"{model['label']}: no logit is further than {model['largest_logit_difference']:.2g} from the model as "
        text += f"it was trained, {model['divergence']:.2g} nats per token of divergence"
        if base is not None and base["divergence"]:
            text += f" ({model['divergence'] / base['divergence']:.2g} of what the adapter itself moves)"
        yield text + f", the loss {signed(model['loss_difference'])}."


def loss_in_words(receipt: Receipt) -> Iterator[str]:
    """Yield what quantizing a merged model again lost, beside the size of the adapter's change."""
    if "error" not in receipt.total:
        return
    error, ratio, kept = receipt.total["error"], receipt.total["ratio"], receipt.total["kept"].get(SHIPPED, 1.0)
    text = f"Relative error of the quantized weights {error:.2g}, of leaving the adapter out {ratio:.2g}."
    if kept < 0.5:
        text += " Less than half of the change is left: serve the shipped base with the adapter, or merge in bf16."
    yield text


def changes(receipt: Receipt) -> list[Table]:
    """Return how much of dW is kept by storing in each form, and of the ten tensors that lose most; [] without dW."""
    if not receipt.weights:
        return []
    forms, kept = list(next(iter(receipt.weights.values()))["kept"]), receipt.total["kept"]
    heading = f"{len(receipt.weights):,} tensors changed, ||dW||/||W|| = {receipt.total['ratio']:.3g}"
    names = [f"{name} (this)" if name == receipt.dtype else name for name in kept]
    columns = {"stored in": "", "of the adapter's change kept": ".2%"}
    whole = Table(heading, columns, list(zip(names, kept.values(), strict=True)))
    by_loss = sorted(receipt.weights.items(), key=lambda item: item[1]["kept"].get(receipt.dtype, 1.0))
    sizes = {"ratio": "||dW||/||W||"} | ({"error": "error"} if "error" in receipt.total else {})
    columns = {"tensor": ""} | dict.fromkeys(sizes.values(), ".3g") | dict.fromkeys(forms, ".2%")
    rows = [
        [name, *(values[key] for key in sizes), *(values["kept"].get(form, "") for form in forms)]
        for name, values in by_loss[:10]
    ]
    of = f", 10 of {len(by_loss):,}" if len(by_loss) > 10 else ""
    heading = f"Kept of dW by tensor, those first of which {receipt.dtype} keeps least{of}"
    return [whole, Table(heading, columns, rows)]
