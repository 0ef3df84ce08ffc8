"""`distlora combine A=0.6 B=-0.4 --out FOLDER`: one adapter of several of the same base."""

import contextlib
import dataclasses
import shlex
import sys
from pathlib import Path

from distlora.config import ModelConfig, UserError, require
from distlora.config.base import place_of
from distlora.post.combine import (
    METHODS,
    CombineRequest,
    check,
    check_one_base,
    find_member,
    fingerprint_of,
    needs_base,
)
from distlora.post.trained import quant_of
from distlora.system.exit_codes import require_package
from distlora.weights.peft_folder import read_peft_adapter
from distlora_launcher.cli.named import new_place
from distlora_launcher.compose.hub import localize
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import listed, read
from distlora_launcher.terminal.output import shown, warn

WORKER = "distlora.post.combine_worker:main"


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    for word in arguments:
        require(
            word.partition("=")[0] not in ("--merged", "--onto", "--dtype"),
            f"{word} is gone; write `distlora combine ... --out SUM`, then `distlora merge SUM --model BASE`, which "
            "takes --onto and --dtype",
        )
    methods = listed({name: method.what for name, method in METHODS.items()})
    options = read(CombineRequest, "distlora combine", arguments, epilog=f"methods:\n{methods}")
    request = checked(options, shlex.join(["distlora", "combine", *arguments]))
    names = " and ".join(member.place for member in request.members)
    warn(f"combining {names} (importing torch takes a few seconds)")
    become(WORKER, request)


def checked(options: CombineRequest, command: str) -> CombineRequest:
    """Return the request with what the arguments name. Raises UserError for anything that can be checked before."""
    require(options.out != "", "--out FOLDER is missing; name a new folder for the result")
    out = new_place(options.out)
    base = None if options.model is None else local_base(options.model)
    members = tuple(find_member(*split(word), base) for word in options.adapters)
    folders = [member.folder for member in members]
    for index, member in enumerate(members):
        require(member.folder not in folders[:index], f"{member.place} is named twice; give it one weight")
    known = check_one_base(members, same_base=options.same_base)
    request = dataclasses.replace(options, members=members, out=str(out), command=command)
    adapters = [read_peft_adapter(folder) for folder in folders]
    if needs_base(adapters):
        folder = base or next((member.base_folder for member in members if member.base_folder is not None), None)
        if folder is not None and known is not None and fingerprint_of(folder) != known:
            raise UserError(
                f"the adapters belong to the base {known[:12]}, and {shown(Path(folder))} holds another; name it with "
                "--model FOLDER"
            )
        quant = quant_of((member.quant for member in members if member.quant is not None), options.quant)
        all_bf16 = {member.dtype for member in members if member.dtype is not None} == {"bf16"}
        request = dataclasses.replace(request, base_folder=folder, quant=quant, held="bf16" if all_bf16 else "fp32")
    else:
        require(
            options.quant is None,
            "--quant has no effect: these adapters add the same to any form of the base; leave it out",
        )
    check(request, adapters)
    if request.how.function:
        require_package("peft", f"--method {request.method}")
    return request


def split(word: str) -> tuple[str, float]:
    """`runs/a=-0.5`."""
    place, equals, text = word.rpartition("=")
    if not equals or not place:
        raise UserError(f"{word!r} names no weight; write {word.rstrip('=')}=1, or another number")
    try:
        return place, float(text)
    except ValueError:
        raise UserError(f"{word!r}: {text!r} is not a number; write for example {place}=1") from None


def local_base(model: str) -> str:
    """Return the folder of --model on this node."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results.
        path = Path(localize(ModelConfig(path=place_of(model))).path).expanduser().absolute()
    require(path.is_dir(), f"--model={model} does not exist; name one in Hugging Face format, or a model on the hub")
    return str(path)
