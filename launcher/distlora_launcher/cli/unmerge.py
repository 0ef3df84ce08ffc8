"""`distlora unmerge MERGED --out FOLDER`: the base of a merge, from the merged model and what was kept beside it.

Everything that can be refused is refused here, before torch is imported. Then this process becomes the worker
(`python -m distlora.post.merge`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from distlora.config import require
from distlora.post.merge.receipt import RECEIPT_NAME, Receipt
from distlora.post.merge.request import UnmergeRequest
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.checks import check_writable
from distlora_launcher.launch.exec_worker import become
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import shown

WORKER = "distlora.post.merge"

USAGE = """usage: distlora unmerge MERGED --out FOLDER

Write the base that a model was merged from, its files bit for bit, each checked against its SHA-256 of that day. MERGED
is a folder that `distlora merge --residual` made; nothing else is needed.

  --out FOLDER   where it goes: a new folder"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    request = checked(arguments)
    print(
        f"unmerging into {shown(Path(request.out))} (importing torch takes a few seconds)", file=sys.stderr, flush=True
    )
    become(WORKER, request.as_json())


def checked(arguments: list[str]) -> UnmergeRequest:
    """The request. Raises UserError for whatever can be told here."""
    parser = Parser("distlora unmerge")
    parser.add_argument("merged", metavar="MERGED")
    parser.add_argument("--out", required=True)
    options = parser.parse_args(arguments)
    merged, out = (Path(place).expanduser().absolute() for place in (options.merged, options.out))
    require(
        (merged / RECEIPT_NAME).is_file(),
        f"{options.merged} holds no {RECEIPT_NAME}; name a folder that `distlora merge --residual` made",
    )
    require(
        bool(Receipt.read(merged).residual),
        f"{options.merged} was merged without --residual, so the base is not in it; merge again with --residual while "
        "the base is still there",
    )
    require(not out.exists(), f"--out={shown(out)} exists already; name another folder, or remove it")
    check_writable(out, "--out")
    return UnmergeRequest(merged=str(merged), out=str(out))
