"""What cannot be combined exactly, or not by the method that was asked for: refused by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distlora.architecture.families import family_of, is_tied, read_config
from distlora.architecture.tokens import stored_rows
from distlora.config import UserError, require
from distlora.post.combine.request import Member, Request
from distlora.post.merge.request import Onto
from distlora.weights.peft_folder import PeftAdapter, read_peft_adapter


def open_adapters(request: Request) -> list[PeftAdapter]:
    """Each member's config and header."""
    return [read_peft_adapter(member.folder) for member in request.members]


def needs_base(adapters: Sequence[PeftAdapter]) -> bool:
    """Whether what an adapter adds depends on the base's values."""
    return any(adapter.settings["use_dora"] or adapter.token_rows or adapter.modules for adapter in adapters)


def check(request: Request, adapters: Sequence[PeftAdapter]) -> None:
    """Raises UserError for what the method cannot do with these adapters."""
    members = request.members
    for member, adapter in zip(members, adapters, strict=True):
        _check_alone(request, member, adapter)
    if needs_base(adapters) and request.base_folder is None:
        what = "DoRA" if any(adapter.settings["use_dora"] for adapter in adapters) else "trained rows or matrices"
        raise UserError(f"{what} cannot be combined without the base's own values; add --model FOLDER, the base")
    if request.how.on == "factors":
        _check_ranks(request, adapters)
    if request.method == "svd" and request.rank is not None:
        _check_cut(request.rank, adapters)
    _check_whole(members, adapters, tied=request.base_folder is not None and ties(Path(request.base_folder)))


def _check_alone(request: Request, member: Member, adapter: PeftAdapter) -> None:
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


def _check_cut(rank: int, adapters: Sequence[PeftAdapter]) -> None:
    """Refuse a rank that cuts nothing: the sum of the adapters' is as much as there is, but for DoRA's."""
    if any(adapter.settings["use_dora"] for adapter in adapters):
        return
    sums: dict[str, int] = {}
    for adapter in adapters:
        for path in adapter.paths:
            sums[path] = sums.get(path, 0) + adapter.own.rank_of(path)
    most = max(sums.values())
    require(
        rank < most,
        f"--rank={rank} cuts nothing: the sum has rank {most}; write --rank {most - 1} or less, or --method cat, which "
        "keeps it as it is",
    )


def _check_ranks(request: Request, adapters: Sequence[PeftAdapter]) -> None:
    """A and B can be summed apart where they have one shape."""
    first: dict[str, tuple[Member, int]] = {}
    for member, adapter in zip(request.members, adapters, strict=True):
        settings = adapter.own
        for path in adapter.paths:
            rank = settings.rank_of(path)
            other, theirs = first.setdefault(path, (member, rank))
            if theirs != rank:
                exact = {"linear": "cat"}.get(request.method, f"{request.method}_svd")
                raise UserError(
                    f"--method {request.method} works on A and B, which must have one rank: {path} has {theirs} in "
                    f"{other.place} and {rank} in {member.place}; write --method {exact}, which takes any"
                )


def ties(base: Path) -> bool:
    """Whether the base's head is its embedding."""
    model = read_config(base)
    return is_tied(model, family_of(model, base / "config.json"))


def check_merged(request: Request, adapters: Sequence[PeftAdapter], onto: Onto) -> None:
    """Refuse what an adapter can hold and a model merged here cannot: rows of new tokens, and PiSSA's change of a base
    that was in NF4."""
    assert request.base_folder is not None
    pissa = next((member for member in request.members if member.pissa), None)
    if pissa is not None and onto == "trained" and request.quant == "nf4":
        raise UserError(
            f"--merged: {pissa.place} trained with PiSSA on NF4 of the base without its start, and a sum has no such "
            "base: NF4 of the whole base loses something else; write --onto original, where the sum is exact"
        )
    base = Path(request.base_folder)
    model = read_config(base)
    stored = stored_rows(base, model, family_of(model, base / "config.json"))
    for member, adapter in zip(request.members, adapters, strict=True):
        if any(max(rows.ids) >= stored for rows in adapter.token_rows.values()):
            raise UserError(
                f"--merged: {member.place} trained new tokens, whose tokenizer its run makes; leave --merged out, then "
                f"write distlora merge {member.place} --adapter {request.out}"
            )


def _check_whole(members: Sequence[Member], adapters: Sequence[PeftAdapter], *, tied: bool) -> None:
    """What is trained beside the adapters: rows of a matrix, or all of it."""
    for member, adapter in zip(members, adapters, strict=True):
        for other, theirs in zip(members, adapters, strict=True):
            both = sorted(set(adapter.modules) if tied else set(adapter.modules) & set(theirs.token_rows))
            if both and theirs.token_rows:
                shared = ", which are the head's too, as the base ties them," if tied else ""
                raise UserError(
                    f"{member.place} trained the whole {both[0]} and {other.place} rows of "
                    f"{min(theirs.token_rows)}{shared} and such a sum is not made here; leave one of them out"
                )
