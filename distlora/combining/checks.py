"""What cannot be combined exactly, or not by the method that was asked for: refused by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from distlora.combining.request import Member, Request
from distlora.config import UserError
from distlora.initial_adapter import InitialAdapter, read_initial_adapter


def open_adapters(request: Request) -> list[InitialAdapter]:
    """Each member's config and header."""
    return [read_initial_adapter(member.folder) for member in request.members]


def needs_base(adapters: Sequence[InitialAdapter]) -> bool:
    """Whether what an adapter adds depends on the base's values."""
    return any(adapter.settings["use_dora"] or adapter.token_rows or adapter.modules for adapter in adapters)


def check(request: Request, adapters: Sequence[InitialAdapter]) -> None:
    """Raises UserError for what the method cannot do with these adapters."""
    members = request.members
    for member, adapter in zip(members, adapters, strict=True):
        _check_alone(request, member, adapter)
    if needs_base(adapters) and request.base_folder is None:
        what = "DoRA" if any(adapter.settings["use_dora"] for adapter in adapters) else "trained rows or matrices"
        raise UserError(f"{what} cannot be combined without the base's own values; add --model FOLDER, the base")
    if request.how.on == "factors":
        _check_ranks(request, adapters)
    _check_whole(members, adapters)


def _check_alone(request: Request, member: Member, adapter: InitialAdapter) -> None:
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


def _check_ranks(request: Request, adapters: Sequence[InitialAdapter]) -> None:
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


def _check_whole(members: Sequence[Member], adapters: Sequence[InitialAdapter]) -> None:
    """What is trained beside the adapters: rows of a matrix, or all of it."""
    for member, adapter in zip(members, adapters, strict=True):
        for other, theirs in zip(members, adapters, strict=True):
            both = sorted(set(adapter.modules) & set(theirs.token_rows))
            if both:
                raise UserError(
                    f"{member.place} trained the whole {both[0]} and {other.place} rows of it; such a sum is not made "
                    "here, so leave one of them out"
                )
