"""Parse the arguments that name a run, or an adapter and its base."""

import contextlib
import dataclasses
import sys
from pathlib import Path

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import DataConfig, require
from distlora.config.base import place_of
from distlora.post.trained import Name, Named, Trained, read_combined
from distlora.system.progress import say
from distlora_launcher.compose.checks import check_data, check_writable
from distlora_launcher.compose.hub import localize, restore
from distlora_launcher.terminal.output import shown


def named(options: Named) -> tuple[Name, Trained]:
    """Return the named model, with its base on this node.

    Raises UserError for missing folders and parts that do not belong together.
    """
    if options.adapter is not None:
        require(options.checkpoint is None, "--adapter and --checkpoint exclude each other; give one of them")
    name = Name(
        place=str(Path(options.run).expanduser().absolute()),
        adapter=options.adapter,
        checkpoint=options.checkpoint,
        base=None if options.model is None else place_of(options.model),
        quant=options.quant,
    )
    trained = name.read()
    if trained.run_dir is None:
        unused = [flag for flag in ("checkpoint", "adapter") if getattr(options, flag) is not None]
        require(
            not unused,
            f"{options.run} is an adapter, and --{unused[0] if unused else ''} applies only to a run; leave it out",
        )
        is_known = options.quant is not None or read_combined(Path(name.place)).quants
        if not is_known and trained.spec.quant.is_nf4:
            say(f"{options.run}: assuming a base in NF4 during training; if it was in 16 bits, add --quant none")
    own = trained.spec.quant.method
    require(
        options.quant in (None, own),
        f"--quant={options.quant}: {options.run} was trained with quant={own}; leave --quant out",
    )
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results.
        if trained.run_dir is None:
            base = localize(trained.spec.model).path
            name = dataclasses.replace(name, base=str(Path(base).expanduser().absolute()))
            trained = name.read()
        else:
            restore(trained.spec.model)
    folder = trained.base
    where = f"model.path in {shown(trained.run_dir)}/config.yaml" if trained.run_dir else "--model"
    require(
        folder.is_dir(), f"the base is missing: {where} is {folder}, which does not exist; put the model back there"
    )
    return name, trained


def default_place(trained: Trained, options: Named, name: str, *, inside: str = ".", suffix: str = "") -> Path:
    """Return the default place of a result: in the run's folder (`inside` it), or beside an adapter without a run."""
    which = options.checkpoint or (Path(options.adapter).name if options.adapter else None)
    full = "-".join(word for word in (name, which) if word) + suffix
    if trained.run_dir is not None:
        return trained.run_dir / inside / full
    place = Path(trained.place).expanduser().absolute()
    return place.with_name(f"{place.name}-{full}")


def new_place(out: str, default: Path | None = None) -> Path:
    """Return the absolute place of --out, or the default. Raises UserError if it exists or cannot be made."""
    place = Path(out).expanduser().absolute() if out or default is None else default
    require(not place.exists(), f"--out={shown(place)} exists already; remove it, or name another place with --out")
    check_writable(place, "--out")
    return place


def num_weights(trained: Trained) -> int:
    """Return the number of weights of the base."""
    return sum(segment.numel for segment in CheckpointFiles(trained.base).headers.values())


def check_text(data: DataConfig) -> None:
    """Refuse documents that cannot be read. Raises UserError."""
    check_data(data, "sft", str(data.path))
