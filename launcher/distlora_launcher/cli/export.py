"""`distlora export RUN --format FORMAT`: what a run trained, in the formats that others load.

Everything that can be refused is refused here, before torch is imported. Then this process becomes the worker
(`python -m distlora.post.export`), which has the real client load what it wrote in another process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distlora.config import UserError, nearest, require
from distlora.post.export.formats import DTYPES, FORMATS, ExportRequest, refuse
from distlora.post.trained import Trained
from distlora.system.exit_codes import DONE
from distlora.system.extras import require_package
from distlora.system.host_memory import available_bytes
from distlora_launcher.cli.named import ARGUMENTS, add_arguments, default_place, named, num_weights
from distlora_launcher.compose.checks import check_writable
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import shown

WORKER = "distlora.post.export.worker:main"

USAGE = """usage: distlora export RUN --format {names} [--out PLACE] [--dtype {dtypes}]
                       [--onto trained|original] [--no-check] [--checkpoint NAME] [--adapter PATH|base]

Write what the run trained in a format that others load:

{formats}

and load it again with its real client, in another process, on the CPU: what the client computes is compared with the
model as it was trained, and nothing is left behind that differs by more than the bound that is printed.

{arguments}
  --out PLACE          a folder or file that does not exist yet (RUN/exports/FORMAT, or ADAPTER-FORMAT)
  --dtype DTYPE        of the weights that are written, or what the client is to compute in; what the base has
  --onto BASE          of a merged format: the base as it was trained on (trained), or as it is on disk (original)
  --no-check           do not load it again; the client's packages are not needed then, nor memory for a whole model"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return DONE
    options = parse(arguments)
    request, trained = checked(options)
    require_client(request, trained)
    place = shown(Path(trained.place))
    print(f"exporting {place} as {request.format} (importing torch takes a few seconds)", file=sys.stderr, flush=True)
    become(WORKER, request)


def usage() -> str:
    """Return the usage text with the formats filled in."""
    width = max(map(len, FORMATS)) + 2
    return USAGE.format(
        names="|".join(FORMATS),
        dtypes="|".join(DTYPES),
        formats="\n".join(f"  {name:{width}}{form.summary}" for name, form in FORMATS.items()),
        arguments=ARGUMENTS,
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError for an unknown flag or format, with the nearest."""
    parser = Parser("distlora export")
    add_arguments(parser)
    for name in ("--format", "--out", "--dtype"):
        parser.add_argument(name)
    parser.add_argument("--onto", choices=("trained", "original"), default="trained")
    parser.add_argument("--no-check", action="store_true")
    options = parser.parse_args(arguments)
    if options.format is None:
        parser.error(f"say which format with --format: {', '.join(FORMATS)}")
    if options.format not in FORMATS:
        parser.error(
            f"--format={options.format} is not known{nearest(options.format, FORMATS)}; write one of "
            f"{', '.join(FORMATS)}"
        )
    return options


def checked(options: argparse.Namespace) -> tuple[ExportRequest, Trained]:
    """Return the request. Raises UserError for anything that can be checked before the run."""
    name, trained = named(options)
    suffix = FORMATS[options.format].suffix
    out = default_place(trained, options, options.format, inside="exports", suffix=suffix)
    if options.out is not None:
        out = Path(options.out).expanduser().absolute()
    if out.exists():
        raise UserError(f"--out={shown(out)} exists already; remove it, or name another place with --out")
    if suffix and out.suffix != suffix:
        raise UserError(
            f"--out={shown(out)}: {options.format} is a file that ends in {suffix}; name it {out.name}{suffix}"
        )
    check_writable(out, "--out")
    request = ExportRequest(
        name=name,
        format=options.format,
        out=str(out),
        dtype=FORMATS[options.format].dtype_for(trained, options.dtype),
        onto=options.onto,
        check=not options.no_check,
    )
    refuse(trained, request)
    return request, trained


def require_client(request: ExportRequest, trained: Trained) -> None:
    """Refuse a check that this machine cannot do. Raises UserError."""
    form = FORMATS[request.format]
    for package in form.packages:
        require_package(package, f"--format={request.format}")
    if not request.check:
        return
    for package in form.clients:
        require_package(package, f"the check of --format={request.format}", otherwise=", or add --no-check")
    # The client's model in fp32, and what is beside it.
    needed, available = 4 * num_weights(trained) + 10**9, available_bytes()
    require(
        available is None or needed <= available,
        f"loading it again takes about {needed / 1e9:.1f} GB, the model in fp32, and {(available or 0) / 1e9:.1f} GB "
        "can be had here; add --no-check, or export on a larger machine",
    )
