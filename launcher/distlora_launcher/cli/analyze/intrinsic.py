"""`distlora analyze intrinsic MODEL ... --data FILE`: how many dimensions of a random subspace fine-tuning needs.

Everything that can be refused is refused here, before torch is imported. Then this process becomes the worker
(`python -m distlora.analysis.intrinsic`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distlora.analysis.intrinsic.request import NAMES as NAMES
from distlora.analysis.intrinsic.request import REQUEST_NAME, RESULT_NAME, IntrinsicRequest
from distlora.config import UserError, require
from distlora.config.places import place_of
from distlora.system import atomic_io
from distlora.system.command_worker import to_json
from distlora.system.exit_codes import DONE
from distlora_launcher.cli.named import check_base, check_text
from distlora_launcher.compose.checks import check_writable
from distlora_launcher.compose.hub import localize, with_small_files
from distlora_launcher.demo.base import cache_root
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import Parser, numbers
from distlora_launcher.terminal.output import name_of, shown

WORKER = "distlora.analysis.intrinsic.worker:main"

USAGE = """usage: distlora analyze intrinsic MODEL [MODEL ...] --data FILE [--eval-data FILE] [--random] ...

Measure how many dimensions fine-tuning needs (arXiv 1804.08838, 2012.13255): all parameters move in one random
subspace of d dimensions, and d90 is the least d that reaches 90 % of what full fine-tuning gains on held-out text.
Dozens of short trainings, in fp32, in one process: for models that a step of full fine-tuning fits. Tables on the
terminal, a report with plots in FOLDER. Killed, it goes on where it was by the same command.

MODEL is a folder in Hugging Face format with 16- or 32-bit weights, or a model on the hub; several are compared.

  --data FILE          documents to train on: anything that data.path of `distlora train` takes
  --eval-data FILE     held-out documents; without it a tenth of the data
  --random             each model from random weights too (what transformers starts one of its config.json with)
  --scaling WHICH      none (DID), layers (SAID: a trained factor for each layer), or both (none,layers)
  --share S            of full fine-tuning's gain (0.9)
  --steps N            optimizer steps of a training (100)
  --batch N            rows of a step (8)
  --sequence-length N  tokens in a row (128)
  --lr X               the first learning rate to try; others are powers of 3 from it (1e-3)
  --seeds N            trainings of full fine-tuning and of the dimensions that decide (2)
  --start D            the first dimension to try (1024)
  --most D             the largest dimension to try (100000, or half of the parameters)
  --resolution X       the search ends where d is known to this factor (2)
  --also D,D           dimensions to try besides, for the curves
  --out FOLDER         where the results go (analysis/MODEL-intrinsic)"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    options = parse(arguments)
    request = checked(options)
    names = ", ".join(name for _, name in request.models)
    print(f"analysing {names} (importing torch takes a few seconds)", file=sys.stderr, flush=True)
    become(WORKER, request)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises UserError for an unknown flag, with the nearest, and for values that are not numbers.
    """
    parser = Parser("distlora analyze intrinsic", help="distlora analyze intrinsic --help")
    parser.add_argument("models", metavar="MODEL", nargs="+")
    parser.add_argument("--data")
    parser.add_argument("--eval-data")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--scaling", default="none,layers")
    for name, kind in {
        "share": float,
        "steps": int,
        "batch": int,
        "sequence-length": int,
        "lr": float,
        "seeds": int,
        "start": int,
        "most": int,
        "resolution": float,
    }.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--also")
    parser.add_argument("--out")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("--data FILE is missing: the documents to train on")
    return options


def checked(options: argparse.Namespace) -> IntrinsicRequest:
    """Return the request, with its models on this machine and its folder made.

    Raises UserError for anything that can be checked before the run.
    """
    given = ("share", "steps", "batch", "sequence_length", "lr", "seeds", "start", "most", "resolution")
    models = [place_of(model) for model in options.models]
    names = [name_of(model) for model in models]
    for name in names:
        require(names.count(name) == 1, f"two models are called {name}; give their folders names that differ")
    name = names[0].replace("/", "-")
    out = Path(options.out or f"analysis/{name}-intrinsic").expanduser().absolute()
    request = IntrinsicRequest(
        models=tuple(zip(models, names, strict=True)),
        data=place_of(options.data),
        eval_data=None if options.eval_data is None else place_of(options.eval_data),
        out=str(out),
        cache_dir=str(cache_root() / "data"),
        random=options.random,
        scalings=tuple(options.scaling.split(",")),
        also=() if options.also is None else tuple(numbers("--also", options.also)),
        **{key: value for key in given if (value := getattr(options, key)) is not None},
    )
    check_writable(out, "--out")
    for model in models:
        with with_small_files(request.spec(model).model) as small, for_full_fine_tuning():
            check_base(dataclasses.replace(request.spec(model), model=small), sequence_length=request.sequence_length)
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
            f"all parameters are trained here, and {reason.partition(';')[0]}; name a dense model of text alone"
        ) from error


def settle(request: IntrinsicRequest, out: Path) -> None:
    """Make the folder, or go on in it. Raises UserError where it holds what was asked otherwise, or is finished."""
    asked = out / REQUEST_NAME
    if (out / RESULT_NAME).exists():
        raise UserError(f"{shown(out)} holds a finished analysis; remove it, or name another folder with --out")
    if asked.is_file():
        if asked.read_text(encoding="utf-8") != to_json(request):
            raise UserError(
                f"{shown(out)} holds an analysis that was asked otherwise ({shown(asked)}); go on with that command, "
                "remove the folder, or name another one with --out"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    atomic_io.write_text(asked, to_json(request))
