"""`distlora combine A=0.6 B=-0.4 --out FOLDER`: one adapter of several of the same base."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distlora.config import ModelConfig, UserError, require
from distlora.config.base import place_of
from distlora.post.combine.request import (
    METHODS,
    CombineRequest,
    Member,
    check,
    check_merged,
    check_one_base,
    find_member,
    fingerprint_of,
    needs_base,
)
from distlora.post.merge.request import Onto, check_mergeable
from distlora.post.trained import Quant, Trained, base_spec, with_adapter
from distlora.system.exit_codes import require_package
from distlora.weights.peft_folder import PeftAdapter, check_quantization, read_peft_adapter
from distlora_launcher.compose.checks import check_writable
from distlora_launcher.compose.hub import localize
from distlora_launcher.launch.workers import become
from distlora_launcher.terminal.arguments import listed, read
from distlora_launcher.terminal.output import shown

WORKER = "distlora.post.combine.worker:main"


@dataclass(frozen=True, kw_only=True, slots=True)
class CombineArguments:
    """Combine several adapters of one base into one: weighted sum, sum truncated to a rank, TIES or DARE.

    Ranks, scales and targets may differ. The result is an adapter in PEFT format, which PEFT and `distlora generate RUN
    --adapter FOLDER` load. combine.json lists its sources and the error of the truncation.

    example: distlora combine runs/code=0.6 runs/math=0.4 --out combined
    """

    adapters: list[str]
    """ADAPTER=WEIGHT: an adapter and its weight, which may be negative. ADAPTER is a run (its result), RUN/best,
    RUN/checkpoints/step_N, or a folder in PEFT format. All must have the same base."""
    out: str = ""
    """FOLDER: new folder for the result (required)."""
    method: str = "cat"
    """METHOD: one of the methods below, named as in PEFT's add_weighted_adapter."""
    rank: int | None = None
    """R: rank of the result, for a method that truncates (default: the largest rank of the adapters)."""
    density: float | None = None
    """D: fraction of elements to keep, for magnitude_prune, ties and dare."""
    majority_sign_method: str | None = None
    """total|frequency: sign election of TIES, by the sum (total) or by counting (frequency)."""
    seed: int | None = None
    """S: random seed of DARE (default: 0)."""
    model: str | None = None
    """BASE: base of adapters whose own base is not on this node: a folder or a name on the hub."""
    quant: Quant | None = None
    """Precision of the base, for DoRA and --merged (default: as in the runs)."""
    same_base: bool = False
    """Treat adapters without a known base as adapters of the same base."""
    merged: bool = False
    """Write the base merged with the result, as `distlora merge` does."""
    onto: Literal["trained", "original"] | None = None
    """For --merged, as in `distlora merge`."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """For --merged, as in `distlora merge`."""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker. Returns for --help alone."""
    methods = listed({name: method.what for name, method in METHODS.items()})
    options = read(CombineArguments, "distlora combine", arguments, epilog=f"methods:\n{methods}")
    request = checked(options, shlex.join(["distlora", "combine", *arguments]))
    names = " and ".join(member.place for member in request.members)
    print(f"combining {names} (importing torch takes a few seconds)", file=sys.stderr, flush=True)
    become(WORKER, request)


def checked(options: CombineArguments, command: str) -> CombineRequest:
    """Return the request. Raises UserError for anything that can be checked before the run."""
    require(options.out != "", "--out FOLDER is missing; name a new folder for the result")
    out = Path(options.out).expanduser().absolute()
    require(not out.exists(), f"--out={options.out} exists already; name another folder, or remove it")
    check_writable(out, "--out")
    base = None if options.model is None else local_base(options.model)
    members = tuple(find_member(*split(word), base) for word in options.adapters)
    twice = next((m for i, m in enumerate(members) if m.folder in [other.folder for other in members[:i]]), None)
    require(twice is None, f"{twice.place if twice else ''} is named twice; give it one weight")
    known = check_one_base(members, same_base=options.same_base)
    request = CombineRequest(
        members=members,
        out=str(out),
        method=options.method,
        rank=options.rank,
        density=options.density,
        majority_sign_method=options.majority_sign_method or "total",
        seed=options.seed or 0,
        command=command,
    )
    method = request.how
    effects = {
        "majority-sign-method": (options.majority_sign_method, method.elects),
        "seed": (options.seed, method.draws),
    }
    for flag, (value, counts) in effects.items():
        require(value is None or counts, f"--{flag}={value} has no effect with --method {request.method}; leave it out")
    for flag in ("onto", "dtype"):
        value = getattr(options, flag)
        require(
            value is None or options.merged, f"--{flag}={value} is of a merged model; add --merged, or leave it out"
        )
    adapters = [read_peft_adapter(member.folder) for member in members]
    if options.merged or needs_base(adapters):
        folder = base or next((member.base_folder for member in members if member.base_folder is not None), None)
        check_unchanged(folder, known)
        dtypes = {member.dtype for member in members if member.dtype is not None}
        held: Literal["bf16", "fp32"] = "bf16" if dtypes == {"bf16"} else "fp32"  # What all runs rounded it to.
        request = dataclasses.replace(request, base_folder=folder, quant=quant_of(members, options.quant), held=held)
        require(folder is not None or not options.merged, "--merged needs the base; name it with --model FOLDER")
    else:
        require(
            options.quant is None,
            "--quant has no effect: these adapters add the same to any form of the base; leave it out",
        )
    check(request, adapters)
    if options.merged:
        check_form(adapters, request, options.onto or "trained")
        check_merged(request, adapters, options.onto or "trained")
        request = dataclasses.replace(request, onto=options.onto or "trained", dtype=options.dtype or "fp32")
    if method.function:
        require_package("peft", f"--method {request.method}")
    return request


def check_form(adapters: Sequence[PeftAdapter], request: CombineRequest, onto: Onto) -> None:
    """Refuse a form of the base that the adapters do not belong to."""
    assert request.base_folder is not None
    for adapter in adapters:
        check_quantization(adapter, request.quant)
        spec = with_adapter(base_spec(request.base_folder, request.quant), adapter.folder)
        check_mergeable(Trained(place=str(adapter.folder), spec=spec, weights=adapter.folder, foreign=True), onto)


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


def check_unchanged(folder: str | None, known: str | None) -> None:
    """Raise UserError unless the base's values are those that the adapters were trained on."""
    if folder is not None and known is not None and fingerprint_of(folder) != known:
        raise UserError(
            f"the adapters belong to the base {known[:12]}, and {shown(Path(folder))} holds another; name it with "
            "--model FOLDER"
        )


def quant_of(members: Sequence[Member], requested: Quant | None) -> Quant:
    """Return the quantization of the base, as in training."""
    trained = sorted({member.quant for member in members if member.quant is not None})
    if requested is None and (len(trained) > 1 or trained == ["mixed"]):
        raise UserError(
            f"the runs held their base as {' and as '.join(trained)}, and what these adapters add depends on that; "
            "write --quant nf4, keep or none for the base of the result"
        )
    known: dict[str, Quant] = {"none": "none", "keep": "keep"}
    return requested or (known.get(trained[0], "nf4") if trained else "nf4")
