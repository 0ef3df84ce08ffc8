"""`distlora export RUN`: what a run trained, as a whole model (--format) or an adapter for its consumer (--for)."""

from dataclasses import replace
from pathlib import Path

from distlora.config import UserError, nearest, require
from distlora.post.export.formats import FORMATS, RENAMED, ExportRequest, refuse
from distlora.post.export.llama_cpp import converter
from distlora.post.trained import Trained
from distlora.system.exit_codes import require_package
from distlora.system.host_memory import available_bytes
from distlora_launcher.cli.named import default_place, named, new_place, num_weights
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import listed, read
from distlora_launcher.terminal.output import shown, warn

WORKER = "distlora.post.export.worker:run"


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    whole, adapters = (
        {name: form.summary for name, form in FORMATS.items() if form.adapter is alone} for alone in (False, True)
    )
    epilog = f"formats:\n{listed(whole)}\n\nconsumers:\n{listed(adapters)}"
    options = read(ExportRequest, "distlora export", arguments, epilog=epilog)
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
    warn(f"exporting {place} {'for' if options.for_ else 'as'} {request.format} (importing torch takes a few seconds)")
    become(WORKER, request)


def checked(options: ExportRequest) -> tuple[ExportRequest, Trained]:
    """Return the request. Raises UserError for anything that can be checked before the run."""
    name, trained = named(options)
    stem = options.format or options.for_
    form = FORMATS[stem]
    format, suffix, dtype = stem, form.suffix, form.dtype_for(trained, options.dtype)
    if suffix:  # A file is moved without its folder, so its name says what it is.
        run = None if trained.run_dir is None else trained.run_dir.name
        stem = "-".join(word for word in (run, "lora" if form.adapter else None, dtype) if word)
    require(
        options.llama_cpp is None or bool(suffix),
        f"--llama-cpp={options.llama_cpp}: {format} is no GGUF file; leave --llama-cpp out",
    )
    out = new_place(options.out, default_place(trained, options, stem, inside="exports", suffix=suffix))
    if suffix and out.suffix != suffix:
        raise UserError(f"--out={shown(out)}: {format} is a file that ends in {suffix}; name it {out.name}{suffix}")
    request = replace(options, name=name, format=format, out=str(out), dtype=dtype)
    refuse(trained, request)
    return request, trained


def require_client(request: ExportRequest, trained: Trained) -> None:
    """Refuse a check that this node cannot do. Raises UserError."""
    form = FORMATS[request.format]
    option = f"--{'for' if form.adapter else 'format'}={request.format}"
    for package in form.packages:
        require_package(package, option)
    if request.no_check or not form.clients:
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
