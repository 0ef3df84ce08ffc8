"""`distlora analyze WHAT ...`: what can be learned of a base and of an adapter by looking at them."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from distlora.analysis import intrinsic, quantization, spectrum
from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.low_bit_headers import in_nf4
from distlora.config import UserError, require
from distlora.config.base import MIXED_FORMATS, cache_root, place_of
from distlora.config.errors import named_settings, require_choice
from distlora.post.trained import BASE_ALONE, Named
from distlora.results.record import REPORT_NAME
from distlora.system import atomic_io
from distlora.system.command_worker import to_json
from distlora_launcher.cli.named import check_text, named
from distlora_launcher.compose.checks import ROW_TOKENS, check_base, check_writable, row_tokens
from distlora_launcher.compose.hub import localize, with_small_files
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import read, subject
from distlora_launcher.terminal.output import name_of, shown, warn

ANALYSES = {
    "quantization": "MODEL: quantization error of NF4 and int4 by layer, bits per weight, perplexity, with plots",
    "spectrum": "RUN: singular values of the weight update dW, its rank by layer, intruder dimensions",
    "intrinsic": "MODEL ...: intrinsic dimension of fine-tuning, for pretrained and random weights",
}
TEXT_NAME = "text.jsonl"
"""In the result's folder: the documents that perplexity is measured on where the user names none."""


def main(arguments: list[str]) -> int:
    """Check the arguments of the named analysis, then become its worker. Returns for the help text alone."""
    name, rest = subject("analyze", arguments, ANALYSES), arguments[1:]
    program = f"distlora analyze {name}"
    request: quantization.QuantizationRequest | spectrum.SpectrumRequest | intrinsic.IntrinsicRequest
    if name == "quantization":
        with named_settings(quantization.NAMES):
            request = check_quantization(read(quantization.QuantizationRequest, program, rest))
        what = request.model_name
    elif name == "spectrum":
        request = check_spectrum(read(spectrum.SpectrumRequest, program, rest))
        what = request.first_name + (f" against {request.second_name}" if request.second else "")
    else:
        with named_settings(intrinsic.NAMES):
            request = check_intrinsic(read(intrinsic.IntrinsicRequest, program, rest))
        what = ", ".join(request.names)
    warn(f"analysing {what} (importing torch takes a few seconds)")
    become(f"distlora.analysis.{name}_worker:run", request)


def place_for(out: str | None, name: str, analysis: str) -> Path:
    """Return the folder of the results, `out` or the default. Raises UserError if it holds an earlier analysis."""
    folder = Path(out or f"analysis/{name.replace('/', '-')}-{analysis}").expanduser().absolute()
    if any((folder / result).exists() for result in (REPORT_NAME, f"{analysis}.json")):
        raise UserError(f"{shown(folder)} holds an earlier analysis; remove it, or name another folder with --out")
    check_writable(folder, "--out")
    return folder


def check_quantization(options: quantization.QuantizationRequest) -> quantization.QuantizationRequest:
    """Return the request, with its model on this node and its folder made.

    Raises UserError for anything that can be checked before the run.
    """
    formats = tuple(dict.fromkeys({"fp8": "fp8_block"}.get(name, name) for name in options.formats))
    for name in formats:
        require_choice("--formats", name, MIXED_FORMATS)
    require(
        options.harm_rows is None or (options.harm_rows > 0 and len(formats) > 0),
        f"--harm-rows={options.harm_rows} needs --formats and a number of 1 or more",
    )
    require(
        options.text is None or not options.no_perplexity or len(formats) > 0,
        f"--text={options.text} has no effect with --no-perplexity; leave one of them out",
    )
    model = place_of(options.model)
    name = name_of(model)
    out = place_for(options.out, name, "quantization")
    text = None if options.text is None else place_of(options.text)
    request = dataclasses.replace(
        options,
        model=model,
        model_name=name,
        # Where nothing is named, a file that is written once everything is checked.
        text=None if options.no_perplexity and not formats else text or str(out / TEXT_NAME),
        text_name=name_of(text) if text else "Python's language reference",
        out=str(out),
        cache_dir=str(cache_root() / "data"),
        formats=formats,
        sequence_length=options.sequence_length or ROW_TOKENS,
    )
    with with_small_files(request.spec("nf4").model) as small:
        folder = Path(small.path)
        if folder.is_dir() and options.sequence_length is None:
            request = dataclasses.replace(request, sequence_length=row_tokens(folder))
        length = request.sequence_length or ROW_TOKENS
        check_base(dataclasses.replace(request.spec("nf4"), model=small), sequence_length=length)
        number = sum(map(in_nf4, CheckpointFiles(folder).headers.values()))
        require(
            not number,
            f"{name} is quantized already ({number:,} weights in NF4), so there are no 16-bit weights to compare "
            "with; name the checkpoint that it was made from",
        )
    if text is not None:
        check_text(request.data())
    local = localize(request.spec("nf4").model)
    out.mkdir(parents=True, exist_ok=True)
    if options.text is None and request.text is not None:
        write_default_text(Path(request.text))
    return dataclasses.replace(request, model=local.path)


def write_default_text(path: Path) -> None:
    """Write the sections of Python's language reference, one document each."""
    from pydoc_data.topics import topics

    atomic_io.write_text(path, "".join(json.dumps({"text": text}) + "\n" for _, text in sorted(topics.items())))
    warn(f"the text: {len(topics)} sections of Python's language reference, {shown(path)}")


def check_spectrum(options: spectrum.SpectrumRequest) -> spectrum.SpectrumRequest:
    """Return the request, with its base on this node and its folder made.

    Raises UserError for anything that can be checked before the run.
    """
    require(
        options.adapter != BASE_ALONE,
        f"--adapter={BASE_ALONE} changed nothing, so there is no dW; leave it out, or name an adapter",
    )
    name, trained = named(options)
    other = None
    if options.against is not None:
        other, second = named(Named(run=options.against))
        bases = [each.base for each in (trained, second)]
        require(
            bases[0] == bases[1] or CheckpointFiles(bases[0]).fingerprint == CheckpointFiles(bases[1]).fingerprint,
            f"--against={options.against} was trained on {shown(bases[1])} and {options.run} on {shown(bases[0])}, "
            "whose weights differ; name a run of the same base",
        )
    out = place_for(options.out, Path(name.place).name, "spectrum")
    request = dataclasses.replace(
        options,
        first=name,
        first_name=Path(name.place).name,
        second=other,
        second_name=None if other is None else Path(other.place).name,
        out=str(out),
        thresholds=spectrum.THRESHOLDS if options.threshold is None else cosines(options.threshold),
    )
    out.mkdir(parents=True, exist_ok=True)
    return request


def cosines(text: str) -> tuple[float, ...]:
    """Return the cosines of `0.5,0.7`, each once, in ascending order."""
    try:
        return tuple(sorted({float(word) for word in text.split(",")}))
    except ValueError:
        raise UserError(f"--threshold={text} is not a list of numbers; write --threshold 0.5,0.7") from None


def check_intrinsic(options: intrinsic.IntrinsicRequest) -> intrinsic.IntrinsicRequest:
    """Return the request, with its models on this node and its folder made.

    Raises UserError for anything that can be checked before the run.
    """
    require(options.data != "", "--data FILE is missing: the documents to train on")
    models = [place_of(model) for model in options.models]
    names = tuple(name_of(model) for model in models)
    for name in names:
        require(names.count(name) == 1, f"two models are called {name}; give their folders names that differ")
    out = Path(options.out or f"analysis/{names[0].replace('/', '-')}-intrinsic").expanduser().absolute()
    request = dataclasses.replace(
        options,
        models=models,
        names=names,
        data=place_of(options.data),
        eval_data=None if options.eval_data is None else place_of(options.eval_data),
        out=str(out),
        cache_dir=str(cache_root() / "data"),
    )
    check_writable(out, "--out")
    for model in models:
        with with_small_files(request.spec(model).model) as small, for_full_fine_tuning():
            spec = dataclasses.replace(request.spec(model), model=small)
            check_base(spec, sequence_length=request.sequence_length, train=request.train_settings())
    check_text(request.data_settings())
    request = dataclasses.replace(request, models=[localize(request.spec(model).model).path for model in models])
    settle(request, out)
    return request


@contextlib.contextmanager
def for_full_fine_tuning() -> Iterator[None]:
    """Rename refusals of adapter=full, as this command has no other way to train."""
    try:
        yield
    except UserError as error:
        reason = str(error)
        if not reason.startswith("adapter=full"):
            raise
        raise UserError(
            f"this analysis trains all parameters, and {reason.partition(';')[0]}; name a dense text model"
        ) from error


def settle(request: intrinsic.IntrinsicRequest, out: Path) -> None:
    """Make the folder, or continue in it. Raises UserError for a finished analysis and for one with other options."""
    request_file = out / intrinsic.REQUEST_NAME
    if (out / "intrinsic.json").exists():
        raise UserError(f"{shown(out)} holds a finished analysis; remove it, or name another folder with --out")
    if request_file.is_file():
        if request_file.read_text(encoding="utf-8") != to_json(request):
            raise UserError(
                f"{shown(out)} holds an analysis with other options ({shown(request_file)}); use those, "
                "remove the folder, or name another one with --out"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    atomic_io.write_text(request_file, to_json(request))
