"""Which adapter a name means, and the base that it belongs to, by its hash. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.checkpoint.state import load_state
from distlora.config import Config, UserError, require
from distlora.config.file import load_config
from distlora.config.json_files import read_object
from distlora.post.combine.request import RECORD_NAME, Member
from distlora.post.trained import named_by_place
from distlora.run_folder.layout import (
    CHECKPOINTS,
    checkpoint_folders,
    find_result,
    read_result,
)
from distlora.weights.initial_adapter_file import read_initial_adapter_record
from distlora.weights.peft_folder import CONFIG_NAME, read_peft_adapter


def find_member(place: str, weight: float, base: str | None = None) -> Member:
    """The adapter at `place`: a run's result, one of its folders in PEFT's format, or an adapter that is no run's,
    whose base is `base` where it names none that is here.

    Raises UserError for a folder that is neither, has nothing trained yet, or holds no plain LoRA or DoRA.
    """
    folder = Path(place).expanduser().absolute()
    require(folder.is_dir(), f"{place} is no folder; name a run's, or one that holds an adapter in PEFT's format")
    run_dir = run_of(folder)
    if run_dir is None and not (folder / CONFIG_NAME).is_file():
        run_dir = folder
    if run_dir is None:
        with named_by_place(place):
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
    with named_by_place(place):
        read_peft_adapter(folder)
    base_folder = Path(config.model.path)
    return Member(
        place=place,
        folder=str(folder),
        weight=weight,
        base=base_of_run(run_dir, config),
        base_folder=str(base_folder) if base_folder.is_dir() else None,
        quant=config.quant.method,
        dtype=config.train.dtype,
        pissa=config.adapter.pissa,
    )


def run_of(folder: Path) -> Path | None:
    """The run that a folder in PEFT's format lies in: RUN/adapter, RUN/best or RUN/checkpoints/step_N."""
    if not (folder / CONFIG_NAME).is_file():
        return None
    above = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder.parent
    return above if (above / "config.yaml").is_file() else None


def base_of_run(run_dir: Path, config: Config) -> str | None:
    """`fingerprint` of the checkpoint that a run trained on: what its own records say, else of what is there now."""
    if config.adapter.pissa:
        record = read_initial_adapter_record(run_dir, config.adapter, None)
        return None if record is None else record.base
    states = [folder for folder in checkpoint_folders(run_dir) if (folder / "state.json").is_file()]
    if states:
        return load_state(states[-1]).identity.base_fingerprint
    return fingerprint_of(config.model.path)


def fingerprint_of(folder: str | None) -> str | None:
    """None where there is no such folder."""
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
    """The fingerprint of the base of them all. Raises UserError where they have several, and where nothing says which
    one has and the user did not say that it is the same (`same_base`)."""
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
