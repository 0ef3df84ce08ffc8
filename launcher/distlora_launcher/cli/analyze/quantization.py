"""`distlora analyze quantization MODEL`: what NF4 and int4 cost a base, in its weights and in its perplexity.

Everything that can be refused is refused here, before torch is imported. Then this process becomes the worker
(`python -m distlora.analysis.quantization`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from distlora.analysis.quantization.request import NAMES as NAMES
from distlora.analysis.quantization.request import REPORT_NAME, RESULT_NAME, QuantizationRequest
from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import UserError, require
from distlora.config.places import place_of
from distlora.system.exit_codes import DONE
from distlora.weights.prequantized import read_prequantized_weights
from distlora_launcher.cli.named import check_base, check_text
from distlora_launcher.compose.checks import ROW_TOKENS, check_writable, row_tokens
from distlora_launcher.compose.hub import localize, with_small_files
from distlora_launcher.demo.base import cache_root
from distlora_launcher.demo.corpus import build_corpus, write_jsonl
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import name_of, shown

WORKER = "distlora.analysis.quantization.worker:main"
TEXT_NAME = "text.jsonl"
"""In the result's folder: the documents that perplexity is measured on where the user names none."""
USAGE = """usage: distlora analyze quantization MODEL [--text FILE | --no-perplexity] [--out FOLDER] [--dtype bf16|fp32]
                         [--rows N] [--sequence-length N]

Measure what 4 bits cost a base: NF4 with double quantization, which quant=nf4 trains on, beside uniform int4 at the
same bits, and bf16. Errors of every weight, layer and linear, bits a weight by counted bytes, perplexity on a text;
tables on the terminal, a report with plots in FOLDER.

MODEL is a folder in Hugging Face format with 16- or 32-bit weights, or a model on the hub. Its weights are read one
after the other and never held together; perplexity is measured on a model of one process, which must fit it in DTYPE.

  --text FILE          documents to measure perplexity on: anything that data.path of `distlora train` takes. Without
                       it, docstrings of Python's library, which large models have read
  --no-perplexity      the weights alone
  --out FOLDER         where the results go (analysis/MODEL-quantization); must not hold an earlier one
  --dtype DTYPE        what the model computes in: bf16 or fp32 (bf16)
  --rows N             rows of the text, taken at even distances where there are more (128)
  --sequence-length N  tokens in a row (1024, or what the model has positions for)"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    options = parse(arguments)
    request = checked(options)
    if options.text is None and request.text is not None:
        write_default_text(Path(request.text))
    print(f"analysing {request.model_name} (importing torch takes a few seconds)", file=sys.stderr, flush=True)
    become(WORKER, request)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises UserError for an unknown flag, with the nearest, and for values that are not numbers.
    """
    parser = Parser("distlora analyze quantization", help="distlora analyze quantization --help")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--sequence-length", type=int)
    options = parser.parse_args(arguments)
    if options.text is not None and options.no_perplexity:
        parser.error(f"--text={options.text} is what perplexity is measured on; leave out --no-perplexity, or --text")
    return options


def checked(options: argparse.Namespace) -> QuantizationRequest:
    """Return the request, with its model on this machine and its folder made.

    Raises UserError for anything that can be checked before the run.
    """
    model = place_of(options.model)
    name = name_of(model)
    out = Path(options.out or f"analysis/{name.replace('/', '-')}-quantization").expanduser().absolute()
    if any((out / result).exists() for result in (REPORT_NAME, RESULT_NAME)):
        raise UserError(f"{shown(out)} holds an earlier analysis; remove it, or name another folder with --out")
    check_writable(out, "--out")
    text = None if options.text is None else place_of(options.text)
    request = QuantizationRequest(
        model=model,
        model_name=name,
        # Where nothing is named, a file that is written once everything is checked.
        text=None if options.no_perplexity else text or str(out / TEXT_NAME),
        text_name=name_of(text) if text else "docstrings of Python's library",
        out=str(out),
        cache_dir=str(cache_root() / "data"),
        dtype=options.dtype,
        rows=options.rows,
        sequence_length=ROW_TOKENS if options.sequence_length is None else options.sequence_length,
    )
    with with_small_files(request.spec("nf4").model) as small:
        folder = Path(small.path)
        if folder.is_dir() and options.sequence_length is None:
            request = dataclasses.replace(request, sequence_length=row_tokens(folder))
        check_base(dataclasses.replace(request.spec("nf4"), model=small), sequence_length=request.sequence_length)
        packed = read_prequantized_weights(CheckpointFiles(folder))
        require(
            not packed,
            f"{name} is quantized already ({len(packed):,} weights in NF4), so there are no 16-bit weights to compare "
            "with; name the checkpoint that it was made from",
        )
    if text is not None:
        check_text(request.data())
    local = localize(request.spec("nf4").model)
    out.mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(request, model=local.path)


def write_default_text(path: Path) -> None:
    """Write the docstrings that the demo's base never saw (demo/README.md), one document each."""
    corpus = build_corpus()
    answers = [messages[-1]["content"] for messages in (*corpus.pairs, *corpus.held_out)]
    write_jsonl(path, ({"text": answer} for answer in answers))
    print(f"the text: {len(answers):,} docstrings of Python's library, {shown(path)}", file=sys.stderr)
