"""`distlora analyze WHAT ...`: what can be learned of a base and of an adapter by looking at them."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distlora.analysis.intrinsic import request as intrinsic
from distlora.analysis.quantization import request as quantization
from distlora.analysis.spectrum import request as spectrum
from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.low_bit_headers import in_nf4
from distlora.config import UserError, require
from distlora.config.base import MIXED_FORMATS, cache_root, place_of
from distlora.config.errors import named_settings, require_choice
from distlora.post.trained import BASE_ALONE
from distlora.system import atomic_io
from distlora.system.command_worker import to_json
from distlora_launcher.cli.named import Named, check_base, check_text, named
from distlora_launcher.compose.checks import ROW_TOKENS, check_writable, row_tokens
from distlora_launcher.compose.hub import localize, with_small_files
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import read, subject
from distlora_launcher.terminal.output import name_of, shown

ANALYSES = {
    "quantization": "MODEL: quantization error of NF4 and int4 by layer, bits per weight, perplexity, with plots",
    "spectrum": "RUN: singular values of the weight update dW, its rank by layer, intruder dimensions",
    "intrinsic": "MODEL ...: intrinsic dimension of fine-tuning, for pretrained and random weights",
}
TEXT_NAME = "text.jsonl"
"""In the result's folder: the documents that perplexity is measured on where the user names none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationArguments:
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
    out: str | None = None
    """FOLDER: folder for the results, without earlier ones (default: analysis/MODEL-quantization)."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype of the model."""
    rows: int = 128
    """N: maximum number of sequences of the text, evenly spaced."""
    sequence_length: int | None = None
    """N: tokens per sequence (default: 1024, or the model's context length if shorter)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrumArguments(Named):
    """Analyze how an adapter, or full fine-tuning, changed the weights of a base.

    Prints the singular values of the update dW, its effective rank, its norm per layer and linear, and the intruder
    dimensions (arXiv 2410.21228): singular vectors among the first K of W + dW that no singular vector of W resembles.
    FOLDER gets a report, a plot and JSON. Weights are read one at a time. A 4096 x 4096 matrix needs about 0.7 GB of
    memory; a dense dW (full fine-tuning, DoRA) needs twice as much.

    example: distlora analyze spectrum runs/lora --against runs/full
    """

    against: str | None = None
    """RUN: second run of the same base, such as full fine-tuning (adapter=full), to compare with; adds the angles
    between the two updates."""
    top: int = spectrum.TOP
    """K: number of singular vectors of W + dW to test."""
    threshold: str | None = None
    """T,...: cosine thresholds below which a singular vector is an intruder (default: 0.3,0.5,0.7,0.9)."""
    exact_up_to: int = spectrum.EXACT_UP_TO
    """N: largest smaller side of a matrix that is decomposed exactly; for larger ones the first K vectors come from a
    Krylov space with bounds, so some counts may stay undecided."""
    out: str | None = None
    """FOLDER: folder for the results, without earlier ones (default: analysis/RUN-spectrum)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IntrinsicArguments:
    """Measure how many dimensions fine-tuning needs (arXiv 1804.08838, 2012.13255).

    All parameters are trained in one random subspace of d dimensions; d90 is the smallest d that reaches 90 % of full
    fine-tuning's gain on held-out text. It takes dozens of short fp32 training runs in one process, whose memory must
    fit full fine-tuning. FOLDER gets a report with plots. The same command continues a stopped analysis.

    example: distlora analyze intrinsic HuggingFaceTB/SmolLM2-135M --data pairs.jsonl
    """

    models: list[str]
    """MODEL: folder in Hugging Face format with 16- or 32-bit weights, or a model on the hub; several are compared."""
    data: str = ""
    """FILE: documents to train on, in any format of data.path (required)."""
    eval_data: str | None = None
    """FILE: held-out documents (default: a tenth of the data)."""
    random: bool = False
    """Measure each model from randomly initialized weights too."""
    scaling: tuple[str, ...] = ("none", "layers")
    """WHICH: method or methods: none (DID), layers (SAID: one trained factor per layer), or both."""
    share: float | None = None
    """S: fraction of full fine-tuning's gain to reach (default: 0.9)."""
    steps: int | None = None
    """N: optimizer steps per training run (default: 100)."""
    batch: int | None = None
    """N: sequences per step (default: 8)."""
    sequence_length: int | None = None
    """N: tokens per sequence (default: 128)."""
    lr: float | None = None
    """X: first learning rate to try; the others differ by powers of 3 (default: 1e-3)."""
    seeds: int | None = None
    """N: seeds of full fine-tuning and of the dimensions around d90 (default: 2)."""
    start: int | None = None
    """D: first dimension to try (default: 1024)."""
    most: int | None = None
    """D: largest dimension to try (default: 100000, or half of the parameters)."""
    resolution: float | None = None
    """X: end the search when d90 is known up to this factor (default: 2)."""
    also: tuple[int, ...] = ()
    """D,D: additional dimensions to try, for the curves."""
    out: str | None = None
    """FOLDER: folder for the results (default: analysis/MODEL-intrinsic)."""


def main(arguments: list[str]) -> int:
    """Check the arguments of the named analysis, then become its worker. Returns for the help text alone."""
    name, rest = subject("analyze", arguments, ANALYSES), arguments[1:]
    program = f"distlora analyze {name}"
    request: quantization.QuantizationRequest | spectrum.SpectrumRequest | intrinsic.IntrinsicRequest
    if name == "quantization":
        with named_settings(quantization.NAMES):
            request = check_quantization(read(QuantizationArguments, program, rest))
        what = request.model_name
    elif name == "spectrum":
        request = check_spectrum(read(SpectrumArguments, program, rest))
        what = request.first_name + (f" against {request.against_name}" if request.against else "")
    else:
        with named_settings(intrinsic.NAMES):
            request = check_intrinsic(read(IntrinsicArguments, program, rest))
        what = ", ".join(model for _, model in request.models)
    print(f"analysing {what} (importing torch takes a few seconds)", file=sys.stderr, flush=True)
    become(f"distlora.analysis.{name}.worker:main", request)


def check_quantization(options: QuantizationArguments) -> quantization.QuantizationRequest:
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
    out = Path(options.out or f"analysis/{name.replace('/', '-')}-quantization").expanduser().absolute()
    if any((out / result).exists() for result in (quantization.REPORT_NAME, quantization.RESULT_NAME)):
        raise UserError(f"{shown(out)} holds an earlier analysis; remove it, or name another folder with --out")
    check_writable(out, "--out")
    text = None if options.text is None else place_of(options.text)
    request = quantization.QuantizationRequest(
        model=model,
        model_name=name,
        # Where nothing is named, a file that is written once everything is checked.
        text=None if options.no_perplexity and not formats else text or str(out / TEXT_NAME),
        text_name=name_of(text) if text else "Python's language reference",
        out=str(out),
        cache_dir=str(cache_root() / "data"),
        dtype=options.dtype,
        rows=options.rows,
        formats=formats,
        harm_rows=options.harm_rows or 32,
        held_out=not options.no_perplexity,
        sequence_length=ROW_TOKENS if options.sequence_length is None else options.sequence_length,
    )
    with with_small_files(request.spec("nf4").model) as small:
        folder = Path(small.path)
        if folder.is_dir() and options.sequence_length is None:
            request = dataclasses.replace(request, sequence_length=row_tokens(folder))
        check_base(dataclasses.replace(request.spec("nf4"), model=small), sequence_length=request.sequence_length)
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
    print(f"the text: {len(topics)} sections of Python's language reference, {shown(path)}", file=sys.stderr)


def check_spectrum(options: SpectrumArguments) -> spectrum.SpectrumRequest:
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
    out = Path(options.out or f"analysis/{Path(name.place).name}-spectrum").expanduser().absolute()
    if any((out / result).exists() for result in (spectrum.REPORT_NAME, spectrum.RESULT_NAME)):
        raise UserError(f"{shown(out)} holds an earlier analysis; remove it, or name another folder with --out")
    check_writable(out, "--out")
    request = spectrum.SpectrumRequest(
        first=name,
        first_name=Path(name.place).name,
        against=other,
        against_name=None if other is None else Path(other.place).name,
        out=str(out),
        top=options.top,
        thresholds=spectrum.THRESHOLDS if options.threshold is None else cosines(options.threshold),
        exact_up_to=options.exact_up_to,
    )
    out.mkdir(parents=True, exist_ok=True)
    return request


def cosines(text: str) -> tuple[float, ...]:
    """Return the cosines of `0.5,0.7`, each once, in ascending order."""
    try:
        return tuple(sorted({float(word) for word in text.split(",")}))
    except ValueError:
        raise UserError(f"--threshold={text} is not a list of numbers; write --threshold 0.5,0.7") from None


def check_intrinsic(options: IntrinsicArguments) -> intrinsic.IntrinsicRequest:
    """Return the request, with its models on this node and its folder made.

    Raises UserError for anything that can be checked before the run.
    """
    require(options.data != "", "--data FILE is missing: the documents to train on")
    given = ("share", "steps", "batch", "sequence_length", "lr", "seeds", "start", "most", "resolution")
    models = [place_of(model) for model in options.models]
    names = [name_of(model) for model in models]
    for name in names:
        require(names.count(name) == 1, f"two models are called {name}; give their folders names that differ")
    name = names[0].replace("/", "-")
    out = Path(options.out or f"analysis/{name}-intrinsic").expanduser().absolute()
    request = intrinsic.IntrinsicRequest(
        models=tuple(zip(models, names, strict=True)),
        data=place_of(options.data),
        eval_data=None if options.eval_data is None else place_of(options.eval_data),
        out=str(out),
        cache_dir=str(cache_root() / "data"),
        random=options.random,
        scalings=options.scaling,
        also=options.also,
        **{key: value for key in given if (value := getattr(options, key)) is not None},
    )
    check_writable(out, "--out")
    for model in models:
        with with_small_files(request.spec(model).model) as small, for_full_fine_tuning():
            spec = dataclasses.replace(request.spec(model), model=small)
            check_base(spec, sequence_length=request.sequence_length, training=True)
    check_text(request.data_settings())
    local = tuple((localize(request.spec(model).model).path, name) for model, name in request.models)
    request = dataclasses.replace(request, models=local)
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
    if (out / intrinsic.RESULT_NAME).exists():
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
