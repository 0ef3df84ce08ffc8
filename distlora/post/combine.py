"""`distlora combine`: its arguments, the adapters that they name, and refusals of sums without a meaning. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.checkpoint.state import load_state
from distlora.config import UserError, nearest, require
from distlora.config.errors import named_settings
from distlora.config.file import load_config
from distlora.post.trained import BY_PLACE, Quant, read_combined
from distlora.run_folder.layout import CHECKPOINTS, checkpoint_folders, find_result, read_result
from distlora.weights.initial_adapter_file import read_initial_adapter_record
from distlora.weights.peft_folder import CONFIG_NAME, PeftAdapter, read_peft_adapter


class Method(NamedTuple):
    """A method of PEFT's add_weighted_adapter."""

    on: Literal["sum", "factors", "weights"]
    """Input of the method: the exact sum; A and B separately; dense dW, one weight at a time, truncated to --rank."""
    function: str
    """Function of peft.utils.merge_utils."""
    options: str
    """Options that it has, as fields of CombineRequest."""
    what: str


METHODS = {
    "cat": Method("sum", "", "", "the exact sum, as a LoRA of all ranks together"),
    "svd": Method("weights", "", "rank", "the exact sum, then its best approximation of --rank"),
    "linear": Method("factors", "task_arithmetic", "", "sums of A and of B, as PEFT's linear: not the updates' sum"),
    "magnitude_prune": Method("factors", "magnitude_prune", "density", "as linear, largest elements of each A and B"),
    "ties": Method("factors", "ties", "density majority_sign_method", "TIES on A and on B"),
    "dare_linear": Method("factors", "dare_linear", "density seed", "as linear, a random fraction of each A and B"),
    "dare_ties": Method("factors", "dare_ties", "density majority_sign_method seed", "DARE and TIES on A and on B"),
    "magnitude_prune_svd": Method("weights", "magnitude_prune", "rank density", "largest elements of B A, truncated"),
    "ties_svd": Method("weights", "ties", "rank density majority_sign_method", "TIES on B A, truncated"),
    "dare_linear_svd": Method("weights", "dare_linear", "rank density seed", "DARE on B A, summed, truncated"),
    "dare_ties_svd": Method(
        "weights", "dare_ties", "rank density majority_sign_method seed", "DARE and TIES on B A, truncated"
    ),
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
    """Fingerprint of its base; None if unknown."""
    base_folder: str | None = None
    quant: str | None = None
    """quant.method of its run; None without a run. Of a sum that of its runs, "mixed" if they differ."""
    dtype: Literal["bf16", "fp32"] | None = None
    """train.dtype of its run, which rounded the base's unquantized weights."""
    pissa: bool = False
    """True if its run trained with PiSSA, on the base without its start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CombineRequest:
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
    majority_sign_method: Literal["total", "frequency"] | None = None
    """Sign election of TIES, by the sum (total, the default) or by counting (frequency)."""
    seed: int | None = None
    """S: random seed of DARE (default: 0)."""
    model: str | None = None
    """BASE: base of adapters whose own base is not on this node: a folder or a name on the hub."""
    quant: Quant | None = None
    """Precision of the base, for DoRA, trained rows and modules (default: as in the runs)."""
    same_base: bool = False
    """Treat adapters without a known base as adapters of the same base."""

    # Found by the launcher; a field with a docstring would be an argument.
    members: tuple[Member, ...] = ()
    # Folder of the base, if its values are needed.
    base_folder: str | None = None
    # Dtype that training rounded the base's unquantized weights to; fp32: as stored.
    held: Literal["bf16", "fp32"] = "fp32"
    command: str = ""

    def __post_init__(self) -> None:
        """Refuse an unknown method, and options that it does not have."""
        name, rank, density = self.method, self.rank, self.density
        require(
            name in METHODS, f"--method={name} is not known{nearest(name, METHODS)}; write one of {', '.join(METHODS)}"
        )
        for option in ("rank", "density", "majority_sign_method", "seed"):
            value = getattr(self, option)
            require(
                value is None or option in self.how.options.split(),
                f"--{option.replace('_', '-')}={value} has no effect with --method {name}; leave it out"
                + (", or write --method svd" if option == "rank" else ""),
            )
        require(rank is None or rank > 0, f"--rank={rank} is not a valid rank; write 1 or more")
        require(
            "density" not in self.how.options or (density is not None and 0 < density <= 1),
            f"--method {name} keeps a fraction of the elements: add --density "
            f"{0.1 if 'seed' in self.how.options else 0.2} (above 0, at most 1)"
            + ("" if density is None else f"; {density:g} is none"),
        )

    @property
    def how(self) -> Method:
        """Return the combination method."""
        return METHODS[self.method]


def find_member(place: str, weight: float, base: str | None = None) -> Member:
    """Return the adapter at `place`: a run's result, a PEFT folder inside a run, or an adapter without a run.

    `base` is the base of an adapter that names none on this node. Raises UserError for a folder that is none of
    these, has nothing trained yet, or holds no plain LoRA or DoRA, and for a weight that is 0 or not finite.
    """
    require(
        math.isfinite(weight) and weight != 0,
        f"{place}={weight:g} is not a valid weight: write a number other than 0, such as {place}=0.5; leave an adapter "
        "of weight 0 out",
    )
    folder = Path(place).expanduser().absolute()
    require(folder.is_dir(), f"{place} does not exist; name the folder of a run or of an adapter in PEFT format")
    run_dir = folder
    if (folder / CONFIG_NAME).is_file():  # RUN/adapter, RUN/best, RUN/checkpoints/step_N, or without a run.
        run_dir = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder.parent
        if not (run_dir / "config.yaml").is_file():
            return _without_run(place, folder, weight, base)
    config = load_config(run_dir)
    require(
        config.adapter.method == "lora",
        f"{place} trained the whole model (adapter=full), so it has no adapter; name adapters only",
    )
    steps = checkpoint_folders(run_dir)
    if folder == run_dir:
        newest = f", or write {place}/{CHECKPOINTS}/{steps[-1].name}={weight:g} for its newest checkpoint"
        require(
            find_result(run_dir) is not None,
            f"{place} is not finished; continue it with `distlora resume {place}`{newest if steps else ''}",
        )
        folder = read_result(run_dir).folder
    with named_settings(BY_PLACE):
        read_peft_adapter(folder)
    # The base that the run trained on, from its records if possible.
    if config.adapter.pissa:
        record = read_initial_adapter_record(run_dir, config.adapter, None)
        known = None if record is None else record.base
    else:
        states = [step for step in steps if (step / "state.json").is_file()]
        known = load_state(states[-1]).identity.base_fingerprint if states else None
        known = known or fingerprint_of(config.model.path)
    return Member(
        place=place,
        folder=str(folder),
        weight=weight,
        base=known,
        base_folder=config.model.path if Path(config.model.path).is_dir() else None,
        quant=config.quant.method,
        dtype=config.train.dtype,
        pissa=config.adapter.pissa,
    )


def _without_run(place: str, folder: Path, weight: float, base: str | None) -> Member:
    with named_settings(BY_PLACE):
        adapter = read_peft_adapter(folder)
    require(
        not (adapter.is_early and adapter.settings["target_parameters"]),
        f"{place}: PEFT before 0.19 wrote it, whose adapters of experts have another layout; write it in the present "
        f"one first: distlora export {place} --model {base or adapter.base or 'BASE'} --for peft --out NEW",
    )
    quants, pissa, known = read_combined(folder)
    base_folder = next((each for each in (adapter.base, base) if each is not None and Path(each).is_dir()), None)
    return Member(
        place=place,
        folder=str(folder),
        weight=weight,
        base=known or fingerprint_of(base_folder),
        base_folder=base_folder,
        quant="mixed" if len(quants) > 1 else next(iter(quants), None),
        pissa=pissa,
    )


def fingerprint_of(folder: str | None) -> str | None:
    """Return the fingerprint of a base's folder, None if there is none."""
    return CheckpointFiles(folder).fingerprint if folder is not None and Path(folder).is_dir() else None


def check_one_base(members: Sequence[Member], *, same_base: bool) -> str | None:
    """Return the fingerprint of the members' base.

    Raises UserError if there are several bases, or if a member's base is unknown and not asserted by `same_base`.
    """
    bases: dict[str, str] = {}
    for member in members:
        if member.base is not None:
            folder = f" ({member.base_folder})" if member.base_folder else ""
            bases.setdefault(member.base, f"{member.place} of {member.base[:12]}{folder}")
        elif not same_base:
            named = read_peft_adapter(member.folder).base
            raise UserError(
                f"{member.place}: its base is unknown"
                f"{f' (it names {named}, which does not exist on this node)' if named else ''}; name it with --model "
                "FOLDER, or write --same-base if you know that all have one"
            )
    require(
        len(bases) < 2,
        f"these are adapters of different bases, whose sum means nothing: {', '.join(bases.values())}; combine "
        "adapters of one base",
    )
    return next(iter(bases), None)


def needs_base(adapters: Sequence[PeftAdapter]) -> bool:
    """Return True if what an adapter adds depends on the base's values."""
    return any(adapter.settings["use_dora"] or adapter.token_rows or adapter.modules for adapter in adapters)


def check(request: CombineRequest, adapters: Sequence[PeftAdapter]) -> None:
    """Raise UserError for what the method cannot do with these adapters."""
    method, ranks = request.method, dict[str, tuple[str, int]]()
    for member, adapter in zip(request.members, adapters, strict=True):
        if adapter.settings["use_dora"] and request.how.on != "weights":
            raise UserError(
                f"{member.place} is DoRA: what it adds to a weight is m (W + s B A) / ||W + s B A|| - W, of full rank "
                f"and no sum of factors, so --method {method} has no meaning for it; write --method svd "
                "--rank R, which takes that difference and says what the rank loses"
            )
        for what, trained in (("trained token rows", adapter.token_rows), ("modules_to_save", adapter.modules)):
            if trained and method not in ("cat", "svd"):
                raise UserError(
                    f"{member.place} has {what} ({', '.join(sorted(trained))}), which --method {method} says "
                    "nothing of; write --method cat or svd, which sum them as they sum the rest"
                )
        for path in adapter.paths if request.how.on == "factors" else ():
            rank = adapter.adapter_config.rank_of(path)
            other, theirs = ranks.setdefault(path, (member.place, rank))
            exact = "cat" if method == "linear" else f"{method}_svd"
            require(
                theirs == rank,
                f"--method {method} works on A and B, which must have one rank: {path} has {theirs} in "
                f"{other} and {rank} in {member.place}; write --method {exact}, which takes any",
            )
    if needs_base(adapters):
        _check_matrices(request, adapters)


def _check_matrices(request: CombineRequest, adapters: Sequence[PeftAdapter]) -> None:
    """Refuse what is added to the base's values without them, and rows of a matrix beside the whole of it."""
    if request.base_folder is None:
        what = "DoRA" if any(adapter.settings["use_dora"] for adapter in adapters) else "trained rows or matrices"
        raise UserError(f"{what} cannot be combined without the base's own values; add --model FOLDER, the base")
    base = Path(request.base_folder)
    tied = architecture_of(read_config(base), base / "config.json").tied
    shared = ", which are the head's too, as the base ties them," if tied else ""
    members = list(zip(request.members, adapters, strict=True))
    for member, adapter in members:
        for other, theirs in members:
            both = sorted(set(adapter.modules) if tied else set(adapter.modules) & set(theirs.token_rows))
            if both and theirs.token_rows:
                raise UserError(
                    f"{member.place} trained the whole {both[0]} and {other.place} rows of "
                    f"{min(theirs.token_rows)}{shared}, which cannot be summed; leave one of them out"
                )
