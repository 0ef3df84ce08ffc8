"""Find the adapters to combine, identify their base by hash, and refuse what cannot be combined. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.families import family_of, is_tied, read_config
from distlora.architecture.tokens import stored_rows
from distlora.checkpoint.state import load_state
from distlora.config import AdapterConfig, UserError, require
from distlora.config.errors import named_settings
from distlora.config.file import load_config
from distlora.config.json_files import read_object
from distlora.post.combine.request import RECORD_NAME, CombineRequest, Member
from distlora.post.merge.request import Onto
from distlora.post.trained import BY_PLACE
from distlora.run_folder.layout import CHECKPOINTS, checkpoint_folders, find_result, read_result
from distlora.weights.initial_adapter_file import read_initial_adapter_record
from distlora.weights.peft_folder import CONFIG_NAME, PeftAdapter, read_peft_adapter


def find_member(place: str, weight: float, base: str | None = None) -> Member:
    """Return the adapter at `place`: a run's result, a PEFT folder inside a run, or an adapter without a run.

    `base` is the base of an adapter that names none on this machine. Raises UserError for a folder that is none of
    these, has nothing trained yet, or holds no plain LoRA or DoRA.
    """
    folder = Path(place).expanduser().absolute()
    require(folder.is_dir(), f"{place} is no folder; name a run's, or one that holds an adapter in PEFT's format")
    run_dir = run_of(folder)
    if run_dir is None and not (folder / CONFIG_NAME).is_file():
        run_dir = folder
    if run_dir is None:
        with named_settings(BY_PLACE):
            says = read_peft_adapter(folder).base
        return _alone(place, folder, weight, says, base)
    config = load_config(run_dir)
    require(
        config.adapter.method == "lora",
        f"{place} trained the whole model (adapter=full), which is no adapter; combine adapters alone",
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
    return Member(
        place=place,
        folder=str(folder),
        weight=weight,
        base=base_of_run(run_dir, base_folder, config.adapter),
        base_folder=str(base_folder) if base_folder.is_dir() else None,
        quant=config.quant.method,
        dtype=config.train.dtype,
        pissa=config.adapter.pissa,
    )


def run_of(folder: Path) -> Path | None:
    """Return the run that contains a folder in PEFT's format: RUN/adapter, RUN/best or RUN/checkpoints/step_N."""
    if not (folder / CONFIG_NAME).is_file():
        return None
    above = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder.parent
    return above if (above / "config.yaml").is_file() else None


def base_of_run(run_dir: Path, base: Path, adapter: AdapterConfig) -> str | None:
    """Return the `fingerprint` of the checkpoint that a run trained on, from its records if possible."""
    if adapter.pissa:
        record = read_initial_adapter_record(run_dir, adapter, None)
        return None if record is None else record.base
    states = [folder for folder in checkpoint_folders(run_dir) if (folder / "state.json").is_file()]
    if states:
        return load_state(states[-1]).identity.base_fingerprint
    return fingerprint_of(str(base))


def fingerprint_of(folder: str | None) -> str | None:
    """Return the fingerprint of a base's folder, None if there is none."""
    return CheckpointFiles(folder).fingerprint if folder is not None and Path(folder).is_dir() else None


def _alone(place: str, folder: Path, weight: float, says: str | None, base: str | None) -> Member:
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
            f"{unknown.place}: nothing here says what its base is"
            f"{f' (it names {says}, which is no folder here)' if says else ''}; name it with --model FOLDER, or write "
            "--same-base if you know that all have one"
        )
    return known[0].base if known else None


def _described(member: Member) -> str:
    assert member.base is not None
    return f"{member.base[:12]}{f' ({member.base_folder})' if member.base_folder else ''}"


def open_adapters(request: CombineRequest) -> list[PeftAdapter]:
    """Return each member's config and header."""
    return [read_peft_adapter(member.folder) for member in request.members]


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
    if request.method == "svd" and request.rank is not None:
        _check_cut(request.rank, adapters)
    _check_whole(members, adapters, tied=request.base_folder is not None and ties(Path(request.base_folder)))


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


def _check_cut(rank: int, adapters: Sequence[PeftAdapter]) -> None:
    """Refuse a rank that truncates nothing: the sum of the adapters' ranks suffices, except for DoRA."""
    if any(adapter.settings["use_dora"] for adapter in adapters):
        return
    sums: dict[str, int] = {}
    for adapter in adapters:
        for path in adapter.paths:
            sums[path] = sums.get(path, 0) + adapter.adapter_config.rank_of(path)
    most = max(sums.values())
    require(
        rank < most,
        f"--rank={rank} cuts nothing: the sum has rank {most}; write --rank {most - 1} or less, or --method cat, which "
        "keeps it as it is",
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


def ties(base: Path) -> bool:
    """Return True if the base's head is its embedding."""
    model = read_config(base)
    return is_tied(model, family_of(model, base / "config.json"))


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
    stored = stored_rows(base, model, family_of(model, base / "config.json"))
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
                    f"{min(theirs.token_rows)}{shared} and such a sum is not made here; leave one of them out"
                )
