"""`distlora export RUN`: what a run trained, as a whole model (--format) or an adapter for its consumer (--for)."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from distlora.config import UserError, nearest, require
from distlora.post.export.formats import FORMATS, RENAMED, ExportRequest, refuse
from distlora.post.export.llama_cpp import converter
from distlora.post.trained import Trained
from distlora.system.exit_codes import require_package
from distlora.system.host_memory import available_bytes
from distlora_launcher.cli.named import Named, default_place, named, num_weights
from distlora_launcher.compose.checks import check_writable
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import listed, read
from distlora_launcher.terminal.output import shown

WORKER = "distlora.post.export.worker:main"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportArguments(Named):
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
    out: str | None = None
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


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    whole, adapters = (
        {name: form.summary for name, form in FORMATS.items() if form.adapter is alone} for alone in (False, True)
    )
    epilog = f"formats:\n{listed(whole)}\n\nconsumers:\n{listed(adapters)}"
    options = read(ExportArguments, "distlora export", arguments, epilog=epilog)
    require(
        bool(options.format) != bool(options.for_),
        f"write --format ({', '.join(whole)}) for a whole model, or --for ({', '.join(adapters)}) for its adapter",
    )
    if options.format in RENAMED:
        raise UserError(
            f"--format={options.format}: adapters are named by their consumer; write {RENAMED[options.format]}"
        )
    for flag, value, known in (("--format", options.format, whole), ("--for", options.for_, adapters)):
        require(
            value in ("", *known),
            f"{flag}={value} is not known{nearest(value, known)}; write one of {', '.join(known)}",
        )
    request, trained = checked(options)
    require_client(request, trained)
    if FORMATS[request.format].suffix:  # GGUF.
        request = replace(request, converter=str(converter(options.llama_cpp)))
    place = shown(Path(trained.place))
    print(
        f"exporting {place} {'for' if options.for_ else 'as'} {request.format} (importing torch takes a few seconds)",
        file=sys.stderr,
        flush=True,
    )
    become(WORKER, request)


def checked(options: ExportArguments) -> tuple[ExportRequest, Trained]:
    """Return the request. Raises UserError for anything that can be checked before the run."""
    name, trained = named(options)
    stem = options.format or options.for_
    form = FORMATS[stem]
    format, suffix, dtype = stem, form.suffix, form.dtype_for(trained, options.dtype)
    if suffix:  # A file is moved without its folder, so its name says what it is.
        run = None if trained.run_dir is None else trained.run_dir.name
        stem = "-".join(word for word in (run, "lora" if form.adapter else None, dtype) if word)
    out = default_place(trained, options, stem, inside="exports", suffix=suffix)
    if options.out is not None:
        out = Path(options.out).expanduser().absolute()
    require(
        options.llama_cpp is None or bool(suffix),
        f"--llama-cpp={options.llama_cpp}: {format} is no GGUF file; leave --llama-cpp out",
    )
    if out.exists():
        raise UserError(f"--out={shown(out)} exists already; remove it, or name another place with --out")
    if suffix and out.suffix != suffix:
        raise UserError(f"--out={shown(out)}: {format} is a file that ends in {suffix}; name it {out.name}{suffix}")
    check_writable(out, "--out")
    request = ExportRequest(
        name=name,
        format=format,
        out=str(out),
        dtype=dtype,
        onto=options.onto,
        version=options.version,
        check=not options.no_check,
    )
    refuse(trained, request)
    return request, trained


def require_client(request: ExportRequest, trained: Trained) -> None:
    """Refuse a check that this node cannot do. Raises UserError."""
    form = FORMATS[request.format]
    option = f"--{'for' if form.adapter else 'format'}={request.format}"
    for package in form.packages:
        require_package(package, option)
    if not (request.check and form.clients):
        return
    for package in form.clients:
        require_package(package, f"the check of {option}", otherwise=", or add --no-check")
    # The client's model in fp32, and what is beside it.
    needed, available = 4 * num_weights(trained) + 10**9, available_bytes()
    require(
        available is None or needed <= available,
        f"loading it again takes about {needed / 1e9:.1f} GB, the model in fp32, and {(available or 0) / 1e9:.1f} GB "
        "are available; add --no-check, or export on a node with more memory",
    )
