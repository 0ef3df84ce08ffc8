"""Define the formats of `distlora export`, its request, and what each format refuses. Imports no torch.

A format is a row of FORMATS: a whole model (--format) or an adapter for a consumer (--for). Its module, imported by the
worker alone, has write(export) that makes `export.place`, and check(export, ours) that loads it with its real client in
another process and returns readings. A format without clients is checked by its write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distlora.architecture.config_checks import read_config
from distlora.architecture.low_bit_methods import BNB_NF4, quantization_method
from distlora.architecture.spec import architecture_of
from distlora.architecture.targets import select_adapted
from distlora.config import require
from distlora.post.export.consumers import CONSUMERS, served, targets, unserved
from distlora.post.merge import check_mergeable
from distlora.post.trained import UNNAMED, Name, Named, Trained

DTYPES = ("fp32", "bf16", "fp16")
PEFT_OLDEST = "0.17"
"""First release of PEFT with adapters of fused weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest(Named):
    """Export a trained model, or its adapter, to the format of another tool, and check it.

    The tool loads the export in another process, on the CPU, and its outputs are compared with the model as trained.
    For vLLM and SGLang every tensor is bound by the rules of their loaders, and the change of each weight compared. An
    export that differs by more than the printed bound is removed.

    example: distlora export runs/first --format gguf
    """

    format: str = ""
    """FORMAT: write the whole model; one of the formats below."""
    for_: str = ""
    """CONSUMER: write the adapter alone, in the layout that this consumer reads; one of the consumers below."""
    version: str | None = None
    """X: release of the consumer (default: the one that the layout was written from)."""
    out: str = ""
    """PLACE: new folder or file for the export (default: RUN/exports/NAME or ADAPTER-NAME; of GGUF
    RUN/exports/RUN-DTYPE.gguf)."""
    dtype: str | None = None
    """DTYPE: dtype of the weights, or the tool's compute dtype: fp32, bf16, fp16, q8_0 (default: that of the base)."""
    llama_cpp: str | None = None
    """FOLDER: a checkout of llama.cpp whose converter writes GGUF (default: one that pip downloads once, 77 MB)."""
    onto: Literal["trained", "original"] = "trained"
    """Base of a merged format: as in training, dequantized (trained), or as on disk (original)."""
    no_check: bool = False
    """Skip the check; needs neither the other tool nor memory for a whole model."""

    # Found by the launcher, which resolves those above; a field with a docstring would be an argument.
    name: Name = UNNAMED
    # Checkout or archive with llama.cpp's converter, for GGUF (llama_cpp.py).
    converter: str | None = None
    # Temporary place of the export, for the check.
    place: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """Arguments of a format's write and check."""

    request: ExportRequest
    trained: Trained
    place: Path
    """New place to write to; it is renamed to `request.out` after the check."""
    say: Callable[[str], None]
    """Prints a line."""
    progress: Callable[[str], None]
    """Takes a progress line; prints one now and then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientReading:
    """A client's logits or weights compared with the trained model's in fp32."""

    what: str
    """The client and how it computed."""
    difference: float
    """Largest absolute difference."""
    kl: float | None = None
    """KL divergence from our predictions, in nats per token; None for weights."""
    same_top: float | None = None
    """Share of positions with the same likeliest token."""
    bound: float | None = None
    """Bound of `difference`; None if the format itself changes the values."""

    @property
    def within(self) -> bool:
        """Return True if the difference is finite and within the bound."""
        return math.isfinite(self.difference) and (self.bound is None or self.difference <= self.bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportFormat:
    """A format of `distlora export`."""

    summary: str
    """Line of --help."""
    module: str
    """Module that writes and checks it."""
    clients: tuple[str, ...]
    """Packages that the check imports, under the names they are imported by."""
    packages: tuple[str, ...] = ()
    """Optional packages that writing the format imports."""
    dtypes: tuple[str, ...] = ()
    """Choices of --dtype; empty for none."""
    default: Callable[[Trained], str | None] | None = None
    """Returns the dtype without --dtype; None for the first choice."""
    merged: bool = False
    """True if it contains merged weights, so that --onto applies."""
    adapter: bool = False
    """True if it is the adapter alone, which --for names by its consumer; else --format names it."""
    suffix: str = ""
    """Suffix of a single file; "" for a folder."""

    def dtype_for(self, trained: Trained, requested: str | None) -> str | None:
        """Return the dtype to use; None if there is no choice."""
        if requested is not None or not self.dtypes:
            return requested
        return self.dtypes[0] if self.default is None else self.default(trained)


def dtype_of_base(trained: Trained) -> str:
    """Return the dtype in the base's config.json; fp32 if it is missing or another."""
    folder = trained.base
    model = read_config(folder)
    settings = architecture_of(model, folder / "config.json").text(model)
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    names = (of.get(key) for of in (model, settings) for key in ("dtype", "torch_dtype"))
    return next((short[name] for name in names if name in short), "fp32")


def is_packed(trained: Trained) -> bool:
    """Return True if the base is stored in NF4."""
    return quantization_method(read_config(trained.base), trained.base) == BNB_NF4


FORMATS: dict[str, ExportFormat] = {
    "hf": ExportFormat(
        summary="the merged model as a Hugging Face folder, with its receipt (`distlora merge`)",
        module="distlora.post.export.hf_folder",
        clients=("transformers",),
        dtypes=DTYPES,
        default=dtype_of_base,
        merged=True,
    ),
    "bnb": ExportFormat(
        summary="the base in the NF4 that was trained on, as bitsandbytes stores it, with the adapter beside it",
        module="distlora.post.export.bnb_folder",
        clients=("peft", "bitsandbytes", "accelerate"),
        dtypes=DTYPES,
        default=lambda trained: None if is_packed(trained) else trained.spec.dtype,
    ),
    "gguf": ExportFormat(
        summary="one file for llama.cpp, merged, by its own converter; also q8_0",
        module="distlora.post.export.gguf_model",
        clients=("gguf",),
        packages=("gguf",),
        dtypes=(*DTYPES, "q8_0"),
        default=dtype_of_base,
        merged=True,
        suffix=".gguf",
    ),
    "peft": ExportFormat(
        summary="PEFT: the adapter with a model card, for the base as it is",
        module="distlora.post.export.peft_folder",
        clients=("peft",),
        adapter=True,
    ),
    "vllm": ExportFormat(
        summary="vLLM: experts one by one or stacked as it reads them; every tensor bound by its rules",
        module="distlora.post.export.served_folder",
        clients=(),
        adapter=True,
    ),
    "sglang": ExportFormat(
        summary="SGLang: one rank and one scale, whole groups of modules; every tensor bound by its rules",
        module="distlora.post.export.served_folder",
        clients=(),
        adapter=True,
    ),
    "llama.cpp": ExportFormat(
        summary="llama.cpp: one file beside a GGUF file of the base, by its own converter",
        module="distlora.post.export.gguf_adapter",
        clients=(),
        packages=("gguf",),
        dtypes=DTYPES,
        suffix=".gguf",
        adapter=True,
    ),
}


def refuse(trained: Trained, request: ExportRequest) -> None:
    """Raise UserError for a request that its format cannot meet."""
    name, form, spec, place = request.format, FORMATS[request.format], trained.spec, trained.place
    option = f"--for={name}" if form.adapter else f"--format={name}"
    if request.dtype is not None:
        require(
            request.dtype in form.dtypes,
            f"--dtype={request.dtype}: {name} "
            + (f"is written in {', '.join(form.dtypes)}" if form.dtypes else "keeps the dtypes that there are")
            + ("; write one of them" if form.dtypes else "; leave --dtype out"),
        )
    require(
        form.merged or request.onto == "trained",
        f"--onto={request.onto}: {name} holds no merged weights; leave --onto out, or write --format hf",
    )
    if name != "gguf":
        require(
            spec.adapter.method != "full",
            f"{option}: {place} trained the whole model (adapter=full), and has no adapter; {place}/model is a "
            "Hugging Face folder already",
        )
        require(
            trained.weights is not None,
            f"{option}: the base alone has nothing trained to export; leave --adapter base out",
        )
    if name == "peft":
        require(
            not trained.foreign or bool(spec.adapter.target_parameters),
            f"--for=peft: {trained.weights} is an adapter in PEFT's format already; copy that folder",
        )
    elif name == "bnb":
        _refuse_bnb(trained, request)
    elif form.merged and spec.adapter.method == "lora":
        check_mergeable(trained, request.onto)
    if name == "gguf":
        _refuse_unread(read_config(trained.base), trained.base / "config.json")
    _check_version(trained, request)
    if form.adapter and name != "peft":
        _refuse_beyond_lora(trained, option)
    if name in CONSUMERS:
        _refuse_unserved(trained, name)


PLAIN = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Types whose llama.cpp computes silu and rotates whole heads, whatever config.json says."""
ROPES = {
    "default": "",
    "dynamic": "",  # It differs beyond max_position_embeddings alone, the file's context length.
    "mrope": "",
    "linear": "rope.scaling.type",
    "yarn": "rope.scaling.type",
    "llama3": "rope_freqs.weight",
    "proportional": "rope_freqs.weight",
    "longrope": "rope_factors_long.weight",
    "su": "rope_factors_long.weight",
}
"""Rope types that llama.cpp's converter knows, with the key or tensor of the file that shows it ("" for none)."""


def _refuse_unread(model: Mapping[str, Any], place: Path) -> None:
    """Refuse what llama.cpp or its converter reads otherwise, without a word, in a config.json, or has no place for."""
    text = architecture_of(model, place).text(model)
    kind = text.get("model_type", model.get("model_type"))
    plain = kind in PLAIN
    ropes = text.get("rope_parameters") or text.get("rope_scaling") or {}
    wrong = {
        f"hidden_act={text.get('hidden_act')!r}": plain and text.get("hidden_act", "silu") != "silu",
        # The converter writes all biases, and llama.cpp does not load a file with one that it has no place for.
        "attention_bias=true": kind in ("qwen3", "qwen3_moe") and bool(text.get("attention_bias")),
    }
    for rope in [each for each in ropes.values() if isinstance(each, dict)] or [ropes]:
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        yarn, attention = rope_type == "yarn", rope.get("attention_factor")
        usual = 0.1 * math.log(rope.get("factor") or 1) + 1 if yarn else 1.0
        rotated = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1))
        wrong |= {
            f"rope_type={rope_type!r}": rope_type not in ROPES,
            "YaRN with truncate=false": yarn and rope.get("truncate") is False,
            f"YaRN with attention_factor={attention}": (
                yarn and attention is not None and not math.isclose(attention, usual, rel_tol=1e-6)
            ),
            f"partial_rotary_factor={rotated}": plain and rotated not in (None, 1),
        }
    for what, is_there in wrong.items():
        require(
            not is_there,
            f"--format=gguf: {place} has {what}, and llama.cpp computes something else, or does not load the file; "
            "write --format hf",
        )


def _refuse_beyond_lora(trained: Trained, option: str) -> None:
    """Refuse what is not B A on a weight of the stored base."""
    spec = trained.spec
    beyond = {
        "use_dora=true": spec.adapter.use_dora,
        "trainable_token_indices": bool(spec.adapter.trainable_token_indices),
        "modules_to_save": bool(spec.adapter.modules_to_save),
        "model.new_tokens": bool(spec.model.new_tokens),
        "LoftQ's correction of NF4": spec.adapter.for_nf4,
    }
    for what, is_there in beyond.items():
        require(
            not is_there,
            f"{option}: the adapter has {what}, and the server adds B A to the base's weights, nothing else; merge it "
            "(`distlora merge`, or --format gguf for llama.cpp)",
        )


def _refuse_unserved(trained: Trained, name: str) -> None:
    """Refuse an adapter of weights that the server does not wrap with LoRA."""
    consumer, spec = CONSUMERS[name], trained.spec
    model = read_config(trained.base)
    row = served(consumer, model)
    architecture = architecture_of(model, trained.base / "config.json")
    paths = select_adapted(spec.adapter, architecture)
    why = unserved(consumer, row, targets(consumer, row, architecture), paths)
    require(
        not why,
        f"--for={name}: {why}; merge the adapter (`distlora merge`), or train without this module "
        "(adapter.target_modules)",
    )
    # PiSSA is written for the unchanged base, as a plain adapter of twice the rank.
    consumer.limit(max(map(spec.adapter.rank_of, paths)) * (2 if spec.adapter.pissa else 1))


def _check_version(trained: Trained, request: ExportRequest) -> None:
    """Refuse a release of the consumer whose layout for this model type is not known."""
    version, name = request.version, request.format
    if version is None:
        return
    known = {"peft": ("PEFT", PEFT_OLDEST)} | {key: (each.name, each.version) for key, each in CONSUMERS.items()}
    require(name in known, f"--version={version}: {name} has one layout; leave --version out")
    consumer, oldest = known[name]
    run = CONSUMERS[name].run if name in CONSUMERS else {}
    types = [kind for each, kinds in run.items() if release(each) == release(version) for kind in kinds]
    require(
        read_config(trained.base).get("model_type") in types or release(version) >= release(oldest),
        f"--version={version}: the layout is known from {consumer} {oldest} on; update {consumer}, or merge the "
        "adapter (`distlora merge`)",
    )


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a release, as (0, 33, 0). Raises UserError for what is none."""
    require(
        re.fullmatch(r"\d+(\.\d+)*", version) is not None,
        f"--version={version} is not a release; write numbers with dots, as 0.19.0",
    )
    numbers = tuple(map(int, version.split(".")))
    return numbers + (0,) * (3 - len(numbers))


def _refuse_bnb(trained: Trained, request: ExportRequest) -> None:
    spec = trained.spec
    require(
        request.dtype is None or not is_packed(trained),
        f"--dtype={request.dtype}: {spec.model.path} is NF4 on disk and is copied as it is; leave --dtype out",
    )
    require(
        spec.quant.is_nf4 or is_packed(trained),
        f"--format=bnb: {trained.place} was trained on a base of quant={spec.quant.method}, and in NF4 that is "
        "another; write --for peft, and let whoever loads it quantize",
    )
    architecture = architecture_of(read_config(spec.path), spec.path / "config.json")
    fused = {
        weight.path for kind in architecture.kinds for weight in kind.weights if weight.kind in ("experts", "fused")
    }
    require(
        not (fused and spec.quant.is_nf4),
        f"--format=bnb: {architecture.model_type} has {min(fused, default='')}, no linear, which bitsandbytes "
        "leaves in 16 bits, and the run trained on it in NF4; write --format hf, or --for peft",
    )


RENAMED = {"gguf-lora": "--for llama.cpp", "peft": "--for peft"}
"""Arguments to type in place of earlier values of --format."""
