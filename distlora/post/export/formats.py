"""The formats of `distlora export`, and what can be refused of each before anything is loaded. Imports no torch.

A format is a row of FORMATS. Its module, imported by the worker alone, has
    write(export: Export) -> None                       makes `export.place`
    check(export: Export, ours: Ours) -> list[Reading]  loads it with its real client, in a process of its own
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distlora.architecture.families import family_of, read_config, text_settings
from distlora.config import UserError, require
from distlora.post.export.gguf.supported import check_adapter, check_model
from distlora.post.merge.request import check_mergeable
from distlora.post.trained import Name, Trained

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """One export. Everything is resolved: folders are absolute, defaults filled in."""

    name: Name
    format: str
    """A key of formats.FORMATS."""
    out: str
    """What is made: a folder or a file that does not exist yet."""
    dtype: str | None
    """Of the weights that are written, or what the client is to compute in; None where the format has no choice."""
    onto: Literal["trained", "original"] = "trained"
    """Of a merged format: the base that dW is added to (`distlora merge`)."""
    check: bool = True
    place: str | None = None
    """For the check: where the export lies for now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What a format's worker has in hand."""

    request: ExportRequest
    trained: Trained
    place: Path
    """To be written: nothing is there yet. It gets the name in the request when it was checked."""
    say: Callable[[str], None]
    """A line now."""
    progress: Callable[[str], None]
    """A line now and then, of those it is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A client's logits on the probe text, or its weights, beside those of the model as it was trained, in fp32."""

    what: str
    """Which client, on what, computing in what."""
    difference: float
    """The largest of all."""
    kl: float | None = None
    """Nats a token, from ours to theirs; None of weights."""
    same_top: float | None = None
    """Share of positions whose likeliest token is the same."""
    bound: float | None = None
    """Of `difference`; None where nothing is promised: what the format itself changes."""

    @property
    def within(self) -> bool:
        return math.isfinite(self.difference) and (self.bound is None or self.difference <= self.bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One way to write what was trained."""

    summary: str
    """A line of --help."""
    module: str
    """Its worker."""
    clients: tuple[str, ...]
    """Packages that the check imports, under the names they are imported by."""
    packages: tuple[str, ...] = ()
    """Optional packages that writing the format imports."""
    dtypes: tuple[str, ...] = ()
    """What --dtype may be; empty: there is no choice."""
    default: Callable[[Trained], str | None] | None = None
    """Which of them without --dtype; None: the first, where there is a choice."""
    merged: bool = False
    """Whether weights with dW in them are written, so that --onto has a meaning."""
    suffix: str = ""
    """Of the file that is made; "": a folder."""
    refuse: Callable[[Trained, ExportRequest], None]
    """Raises UserError for what the format cannot say."""

    def dtype_for(self, trained: Trained, asked: str | None) -> str | None:
        """The dtype that is meant; None where there is no choice."""
        if asked is not None or not self.dtypes:
            return asked
        return self.dtypes[0] if self.default is None else self.default(trained)


def dtype_of_base(trained: Trained) -> str:
    """As config.json says it; fp32 where it says another or none."""
    folder = Path(trained.config.model.path)
    model = read_config(folder)
    settings = text_settings(model, family_of(model, folder / "config.json"))
    names = (of.get(key) for of in (model, settings) for key in ("dtype", "torch_dtype"))
    return next((_DTYPES[name] for name in names if name in _DTYPES), "fp32")


_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def refuse(trained: Trained, request: ExportRequest) -> None:
    """Refuse a request that its format cannot meet. Raises UserError."""
    form = FORMATS[request.format]
    if request.dtype is not None:
        require(
            request.dtype in form.dtypes,
            f"--dtype={request.dtype}: {request.format} "
            + (f"is written in {', '.join(form.dtypes)}" if form.dtypes else "keeps the dtypes that there are")
            + ("; write one of them" if form.dtypes else "; leave --dtype out"),
        )
    if not form.merged:
        require(
            request.onto == "trained",
            f"--onto={request.onto}: {request.format} holds no merged weights; leave --onto out, or write --format hf",
        )
    form.refuse(trained, request)


def refuse_whole_models(trained: Trained, request: ExportRequest) -> None:
    """What has no adapter. Raises UserError."""
    if trained.config.adapter.method == "full":
        raise UserError(
            f"--format={request.format}: {trained.place} trained the whole model (adapter=full), and has no adapter; "
            f"{trained.place}/model is a Hugging Face folder already"
        )
    require(
        trained.weights is not None,
        f"--format={request.format}: the base alone has nothing trained to export; leave --adapter base out",
    )


def refuse_peft(trained: Trained, request: ExportRequest) -> None:
    refuse_whole_models(trained, request)
    if trained.foreign:
        raise UserError(f"--format=peft: {trained.weights} is an adapter in PEFT's format already; copy that folder")


def is_packed(trained: Trained) -> bool:
    """Whether the base is NF4 on disk already."""
    return "quantization_config" in read_config(Path(trained.config.model.path))


def refuse_bnb(trained: Trained, request: ExportRequest) -> None:
    refuse_whole_models(trained, request)
    config = trained.config
    require(
        request.dtype is None or not is_packed(trained),
        f"--dtype={request.dtype}: {config.model.path} is NF4 on disk and is copied as it is; leave --dtype out",
    )
    if not config.quant.is_nf4:
        raise UserError(
            f"--format=bnb: {trained.place} was trained on a base of quant={config.quant.method}, and in NF4 that is "
            "another; write --format peft, and let whoever loads it quantize"
        )
    folder = Path(config.model.path)
    family = family_of(read_config(folder), folder / "config.json")
    if family.experts is not None:
        raise UserError(
            f"--format=bnb: {family.model_type} has fused experts, which bitsandbytes leaves in 16 bits, and the run "
            "trained on theirs in NF4; write --format hf or peft"
        )


def refuse_hf(trained: Trained, request: ExportRequest) -> None:
    refuse_whole_models(trained, request)
    check_mergeable(trained, request.onto)


def refuse_gguf(trained: Trained, request: ExportRequest) -> None:
    folder = Path(trained.config.model.path)
    check_model(read_config(folder), folder / "config.json")
    if trained.config.adapter.method == "lora":
        check_mergeable(trained, request.onto)


def refuse_gguf_lora(trained: Trained, request: ExportRequest) -> None:
    refuse_whole_models(trained, request)
    refuse_gguf(trained, request)
    check_adapter(trained.config)


FORMATS: dict[str, Format] = {
    "hf": Format(
        summary="the merged model as a Hugging Face folder, with its receipt (`distlora merge`)",
        module="distlora.post.export.hf_folder",
        clients=("transformers",),
        dtypes=DTYPES,
        default=dtype_of_base,
        merged=True,
        refuse=refuse_hf,
    ),
    "peft": Format(
        summary="the adapter in PEFT's format with a model card, for the base as it is",
        module="distlora.post.export.peft_folder",
        clients=("peft",),
        refuse=refuse_peft,
    ),
    "bnb": Format(
        summary="the base in the NF4 that was trained on, as bitsandbytes stores it, with the adapter beside it",
        module="distlora.post.export.bnb_folder",
        clients=("peft", "bitsandbytes", "accelerate"),
        dtypes=DTYPES,
        default=lambda trained: None if is_packed(trained) else trained.config.train.dtype,
        refuse=refuse_bnb,
    ),
    "gguf": Format(
        summary="one file for llama.cpp: Llama, Mistral, Qwen 2 and 3, merged; also q8_0",
        module="distlora.post.export.gguf.model_format",
        clients=("gguf",),
        packages=("gguf",),
        dtypes=(*DTYPES, "q8_0"),
        default=dtype_of_base,
        merged=True,
        suffix=".gguf",
        refuse=refuse_gguf,
    ),
    "gguf-lora": Format(
        summary="the adapter alone for llama.cpp, beside a GGUF file of the base",
        module="distlora.post.export.gguf.adapter_format",
        clients=("gguf",),
        packages=("gguf",),
        dtypes=DTYPES,
        suffix=".gguf",
        refuse=refuse_gguf_lora,
    ),
}
