"""Define the request of `distlora combine`, find its adapters, and refuse what cannot be combined. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.checkpoint.state import load_state
from distlora.config import UserError, nearest, require
from distlora.config.errors import named_settings
from distlora.config.file import load_config
from distlora.config.json_files import read_object
from distlora.post.merge.request import Onto
from distlora.post.trained import BY_PLACE, Quant
from distlora.run_folder.layout import CHECKPOINTS, checkpoint_folders, find_result, read_result
from distlora.weights.initial_adapter_file import read_initial_adapter_record
from distlora.weights.peft_folder import CONFIG_NAME, PeftAdapter, read_peft_adapter

RECORD_NAME = "combine.json"
"""The record in the result's folder: its members and what truncation lost."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method of PEFT's add_weighted_adapter."""

    on: Literal["sum", "factors", "weights"]
    """Input of the method: the exact sum; A and B separately; dense dW, one weight at a time, truncated to --rank."""
    function: str = ""
    """Function of peft.utils.merge_utils."""
    what: str = ""

    @property
    def has_density(self) -> bool:
        """Return True if --density applies."""
        return self.function not in ("", "task_arithmetic")

    @property
    def elects(self) -> bool:
        """Return True if adapters vote on the sign of each element."""
        return self.function.endswith("ties")

    @property
    def draws(self) -> bool:
        """Return True if the method draws random numbers (DARE)."""
        return self.function.startswith("dare")


METHODS = {
    "cat": Method("sum", what="the exact sum, as a LoRA of all ranks together"),
    "svd": Method("weights", what="the exact sum, then its best approximation of --rank"),
    "linear": Method(
        "factors", "task_arithmetic", "A and B summed separately, as PEFT's linear; not the sum of the updates"
    ),
    "magnitude_prune": Method("factors", "magnitude_prune", "as linear, the largest elements of each A and B"),
    "ties": Method("factors", "ties", "TIES on A and on B"),
    "dare_linear": Method("factors", "dare_linear", "as linear, a random fraction of each A and B"),
    "dare_ties": Method("factors", "dare_ties", "DARE and TIES on A and on B"),
    "magnitude_prune_svd": Method("weights", "magnitude_prune", "the largest elements of each B A, summed, truncated"),
    "ties_svd": Method("weights", "ties", "TIES on B A, truncated"),
    "dare_linear_svd": Method("weights", "dare_linear", "DARE on B A, summed, truncated"),
    "dare_ties_svd": Method("weights", "dare_ties", "DARE and TIES on B A, truncated"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """An adapter and its weight in the sum."""

    place: str
    """The folder as it was typed."""
    folder: str
    """Absolute folder in PEFT's format, for the base as its checkpoint has it."""
    weight: float
    base: str | None = None
    """`fingerprint` of its base; None if unknown."""
    base_folder: str | None = None
    quant: str | None = None
    """quant.method of its run; None without a run."""
    dtype: Literal["bf16", "fp32"] | None = None
    """train.dtype of its run, which rounded the base's unquantized weights."""
    pissa: bool = False
    """True if its run trained on the base without PiSSA's initial adapter."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.weight) and self.weight != 0,
            f"{self.place}={self.weight:g} is not a valid weight: write a number other than 0, such as "
            f"{self.place}=0.5; leave an adapter of weight 0 out",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CombineRequest:
    """The request of `distlora combine`. Folders are absolute, defaults filled in."""

    members: tuple[Member, ...]
    out: str
    """New folder for the result."""
    method: str = "cat"
    rank: int | None = None
    """Largest rank of a method that truncates."""
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0
    base_folder: str | None = None
    """Folder of the base; None if its values are not needed."""
    quant: Quant = "nf4"
    """Quantization of the base."""
    held: Literal["bf16", "fp32"] = "fp32"
    """Dtype that training rounded the base's unquantized weights to; fp32: as stored."""
    onto: Literal["trained", "original"] | None = None
    """Form of the base for a merged model; None to write an adapter."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Storage dtype of a merged model."""
    command: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(
                f"--method={self.method} is not known{nearest(self.method, METHODS)}; write one of {', '.join(METHODS)}"
            )
        method = METHODS[self.method]
        require(
            self.rank is None or method.on == "weights",
            f"--rank={self.rank} has no effect with --method {self.method}, which keeps the ranks that it finds; "
            "leave it out, or write --method svd",
        )
        require(self.rank is None or self.rank > 0, f"--rank={self.rank} is not a valid rank; write 1 or more")
        require(
            self.density is None or method.has_density,
            f"--density={self.density} has no effect with --method {self.method}, which keeps every element; leave it "
            "out",
        )
        if method.has_density:
            require(
                self.density is not None and 0 < self.density <= 1,
                f"--method {self.method} keeps a fraction of the elements: add --density "
                f"{0.1 if method.draws else 0.2} (above 0, at most 1)"
                + ("" if self.density is None else f"; {self.density:g} is none"),
            )
        require(
            self.majority_sign_method in ("total", "frequency"),
            f"--majority-sign-method={self.majority_sign_method} is not known; write total or frequency",
        )

    @property
    def how(self) -> Method:
        """Return the combination method."""
        return METHODS[self.method]


def find_member(place: str, weight: float, base: str | None = None) -> Member:
    """Return the adapter at `place`: a run's result, a PEFT folder inside a run, or an adapter without a run.

    `base` is the base of an adapter that names none on this node. Raises UserError for a folder that is none of
    these, has nothing trained yet, or holds no plain LoRA or DoRA.
    """
    folder = Path(place).expanduser().absolute()
    require(folder.is_dir(), f"{place} does not exist; name the folder of a run or of an adapter in PEFT format")
    run_dir = folder
    if (folder / CONFIG_NAME).is_file():  # RUN/adapter, RUN/best, RUN/checkpoints/step_N, or without a run.
        run_dir = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder.parent
        if not (run_dir / "config.yaml").is_file():
            return _alone(place, folder, weight, base)
    config = load_config(run_dir)
    require(
        config.adapter.method == "lora",
        f"{place} trained the whole model (adapter=full), so it has no adapter; name adapters only",
    )
    if folder == run_dir:
        saved = [f"{place}/{CHECKPOINTS}/{step.name}" for step in checkpoint_folders(run_dir)[-1:]]
        require(
            find_result(run_dir) is not None,
            f"{place} is not finished; continue it with `distlora resume {place}`"
            + (f", or write {saved[0]}={weight:g} for its newest checkpoint" if saved else ""),
        )
        folder = read_result(run_dir).folder
    with named_settings(BY_PLACE):
        read_peft_adapter(folder)
    base_folder = Path(config.model.path)
    # The base that the run trained on, from its records if possible.
    states = [step for step in checkpoint_folders(run_dir) if (step / "state.json").is_file()]
    if config.adapter.pissa:
        record = read_initial_adapter_record(run_dir, config.adapter, None)
        fingerprint = None if record is None else record.base
    else:
        known = load_state(states[-1]).identity.base_fingerprint if states else None
        fingerprint = known or fingerprint_of(str(base_folder))
    return Member(
        place=place,
        folder=str(folder),
        weight=weight,
        base=fingerprint,
        base_folder=str(base_folder) if base_folder.is_dir() else None,
        quant=config.quant.method,
        dtype=config.train.dtype,
        pissa=config.adapter.pissa,
    )


def fingerprint_of(folder: str | None) -> str | None:
    """Return the fingerprint of a base's folder, None if there is none."""
    return CheckpointFiles(folder).fingerprint if folder is not None and Path(folder).is_dir() else None


def _alone(place: str, folder: Path, weight: float, base: str | None) -> Member:
    with named_settings(BY_PLACE):
        initial = read_peft_adapter(folder)
    says = initial.base
    require(
        not (initial.is_early and initial.settings["target_parameters"]),
        f"{place}: PEFT before 0.19 wrote it, whose adapters of experts have another layout; write it in the present "
        f"one first: distlora export {place} --model {base or says or 'BASE'} --for peft --out NEW",
    )
    record = folder / RECORD_NAME
    known = read_object(record, "combine again").get("base_fingerprint") if record.is_file() else None
    named = says if says is not None and Path(says).is_dir() else base
    return Member(
        place=place,
        folder=str(folder),
        weight=weight,
        base=known if isinstance(known, str) else fingerprint_of(named),
        base_folder=named if named is not None and Path(named).is_dir() else None,
    )


def check_one_base(members: tuple[Member, ...], *, same_base: bool) -> str | None:
    """Return the fingerprint of the members' base.

    Raises UserError if there are several bases, or if a member's base is unknown and not asserted by `same_base`.
    """
    known = [member for member in members if member.base is not None]
    for member in known[1:]:
        if member.base != known[0].base:
            raise UserError(
                f"{known[0].place} and {member.place} are adapters of different bases, whose sum means nothing: "
                f"{_described(known[0])} and {_described(member)}; combine adapters of one base"
            )
    unknown = next((member for member in members if member.base is None), None)
    if unknown is not None and not same_base:
        says = read_peft_adapter(unknown.folder).base
        raise UserError(
            f"{unknown.place}: its base is unknown"
            f"{f' (it names {says}, which does not exist on this node)' if says else ''}; name it with --model FOLDER, "
            "or write --same-base if you know that all have one"
        )
    return known[0].base if known else None


def _described(member: Member) -> str:
    assert member.base is not None
    return f"{member.base[:12]}{f' ({member.base_folder})' if member.base_folder else ''}"


def needs_base(adapters: Sequence[PeftAdapter]) -> bool:
    """Return True if what an adapter adds depends on the base's values."""
    return any(adapter.settings["use_dora"] or adapter.token_rows or adapter.modules for adapter in adapters)


def check(request: CombineRequest, adapters: Sequence[PeftAdapter]) -> None:
    """Raise UserError for what the method cannot do with these adapters."""
    members = request.members
    for member, adapter in zip(members, adapters, strict=True):
        _check_alone(request, member, adapter)
    if needs_base(adapters) and request.base_folder is None:
        what = "DoRA" if any(adapter.settings["use_dora"] for adapter in adapters) else "trained rows or matrices"
        raise UserError(f"{what} cannot be combined without the base's own values; add --model FOLDER, the base")
    if request.how.on == "factors":
        _check_ranks(request, adapters)
    tied = False
    if request.base_folder is not None:
        config = read_config(Path(request.base_folder))
        tied = architecture_of(config, Path(request.base_folder) / "config.json").tied
    _check_whole(members, adapters, tied=tied)


def _check_alone(request: CombineRequest, member: Member, adapter: PeftAdapter) -> None:
    if adapter.settings["use_dora"] and request.how.on != "weights":
        raise UserError(
            f"{member.place} is DoRA: what it adds to a weight is m (W + s B A) / ||W + s B A|| - W, of full rank and "
            f"no sum of factors, so --method {request.method} has no meaning for it; write --method svd --rank R, "
            "which takes that difference and says what the rank loses"
        )
    linear = request.method in ("cat", "svd")
    for what, found in (("trained token rows", adapter.token_rows), ("modules_to_save", adapter.modules)):
        if found and not linear:
            raise UserError(
                f"{member.place} has {what} ({', '.join(sorted(found))}), which --method {request.method} says nothing "
                "of; write --method cat or svd, which sum them as they sum the rest"
            )


def _check_ranks(request: CombineRequest, adapters: Sequence[PeftAdapter]) -> None:
    """Refuse different ranks: A and B are summed separately, so they need one shape."""
    first: dict[str, tuple[Member, int]] = {}
    for member, adapter in zip(request.members, adapters, strict=True):
        settings = adapter.adapter_config
        for path in adapter.paths:
            rank = settings.rank_of(path)
            other, theirs = first.setdefault(path, (member, rank))
            if theirs != rank:
                exact = {"linear": "cat"}.get(request.method, f"{request.method}_svd")
                raise UserError(
                    f"--method {request.method} works on A and B, which must have one rank: {path} has {theirs} in "
                    f"{other.place} and {rank} in {member.place}; write --method {exact}, which takes any"
                )


def check_merged(request: CombineRequest, adapters: Sequence[PeftAdapter], onto: Onto) -> None:
    """Refuse what a merged model cannot hold: rows of new tokens, and PiSSA's change of an NF4 base."""
    assert request.base_folder is not None
    pissa = next((member for member in request.members if member.pissa), None)
    if pissa is not None and onto == "trained" and request.quant == "nf4":
        raise UserError(
            f"--merged: {pissa.place} trained with PiSSA on NF4 of the base without its start, and a sum has no such "
            "base: NF4 of the whole base loses something else; write --onto original, where the sum is exact"
        )
    base = Path(request.base_folder)
    model = read_config(base)
    stored = architecture_of(model, base / "config.json").vocabulary
    for member, adapter in zip(request.members, adapters, strict=True):
        if any(max(rows.ids) >= stored for rows in adapter.token_rows.values()):
            raise UserError(
                f"--merged: {member.place} trained new tokens, whose tokenizer its run makes; leave --merged out, then "
                f"write distlora merge {member.place} --adapter {request.out}"
            )


def _check_whole(members: Sequence[Member], adapters: Sequence[PeftAdapter], *, tied: bool) -> None:
    """Refuse a module trained whole in one adapter and by rows in another."""
    for member, adapter in zip(members, adapters, strict=True):
        for other, theirs in zip(members, adapters, strict=True):
            both = sorted(set(adapter.modules) if tied else set(adapter.modules) & set(theirs.token_rows))
            if both and theirs.token_rows:
                shared = ", which are the head's too, as the base ties them," if tied else ""
                raise UserError(
                    f"{member.place} trained the whole {both[0]} and {other.place} rows of "
                    f"{min(theirs.token_rows)}{shared}, which cannot be summed; leave one of them out"
                )
