"""`distlora import TOOL FILE.yaml`: another tool's configuration as a recipe of ours, and what of it is left behind.

The recipe goes to stdout or, with --out, into a file; the report goes to stderr. What was written is composed and
checked before it leaves, so `distlora train` takes it.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.config import UserError, nearest, require
from distlora.config.file import parse_yaml
from distlora.system.exit_codes import BAD_INPUT, DONE
from distlora_launcher.compose.checks import check_writable
from distlora_launcher.terminal.arguments import read

if TYPE_CHECKING:
    from distlora_launcher.importing.recipe import Imported

TOOLS = ("axolotl", "llamafactory")
CURE = "give the path of a YAML file of Axolotl or LLaMA-Factory"
_OF_LLAMAFACTORY = {"finetuning_type", "stage", "cutoff_len", "dataset_dir", "template", "dataset"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportArguments:
    """Convert a file of Axolotl or LLaMA-Factory into a recipe, and list on stderr every key that has no exact equal.

    Keys are listed as changed (something close to it happens), without effect here, not supported, refused or unknown,
    each with the reason. The recipe is printed or written to --out.
    `distlora train --config-dir FOLDER recipe=NAME` runs it.

    example: distlora import axolotl qlora.yml --out mine/recipe/mine.yaml
    """

    tool: str
    """axolotl or llamafactory: the tool whose file it is."""
    file: Path
    """FILE.yaml: configuration file of that tool."""
    processes: int | None = None
    """N: number of GPUs to run on; the global batch is N times the batch per GPU (default: as the file says, or 1)."""
    out: Path | None = None
    """FILE: write the recipe to FOLDER/recipe/NAME.yaml instead of printing it."""
    strict: bool = False
    """Exit with code 2 if a key was not imported exactly."""


def main(arguments: list[str]) -> int:
    """Import the file; return 0, or with --strict 2 when a key was not imported exactly."""
    options = read(ImportArguments, "distlora import", arguments)
    near = nearest(options.tool, TOOLS)
    require(
        options.tool in TOOLS,
        f"cannot import {options.tool!r}{near}; write distlora import {' or '.join(TOOLS)} FILE.yaml",
    )
    require(
        options.processes is None or options.processes > 0,
        f"--processes {options.processes} is not a number of processes; write --processes 1 or more",
    )
    if options.out is not None:
        check_place(options.out)
    from distlora_launcher.importing.recipe import recipe_text, report  # settings_file.py can do without the table.

    imported = import_settings(options.file, processes=options.processes, tool=options.tool)
    text = recipe_text(imported, source=options.file)
    check_composes(text, options.file, starts_from_adapter="init_from" in imported.section("adapter"))
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    print(report(imported, source=options.file, out=options.out), file=sys.stderr)
    return BAD_INPUT if options.strict and imported.not_carried else DONE


def tool_of(values: Mapping[str, Any]) -> str | None:
    """Return the one of TOOLS whose file this is, by its keys."""
    if "base_model" in values:
        return "axolotl"
    return "llamafactory" if "model_name_or_path" in values and _OF_LLAMAFACTORY & values.keys() else None


def import_settings(
    source: Path | Mapping[str, Any], *, processes: int | None = None, tool: str = "axolotl"
) -> Imported:
    """Return a tool's file, or its parsed content, as `options` and `settings` with their differences (`notes`).

    processes: the number of GPUs to run on; None: as many as the file names. Raises UserError for what is no
    configuration of that tool, and for objectives that distlora has not.
    """
    from distlora_launcher.importing import axolotl, llamafactory

    convert = llamafactory.convert if tool == "llamafactory" else axolotl.convert
    return convert(read_yaml(source) if isinstance(source, Path) else dict(source), processes=processes)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the file's mapping. Raises UserError for one that cannot be read, is no YAML or no mapping."""
    if path.exists() and not path.is_file():
        raise UserError(f"cannot read {path}: it is not a file; {CURE}")
    try:
        values = parse_yaml(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {CURE}") from error
    except ValueError as error:
        raise UserError(f"{path} is not YAML ({error}); {CURE}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings; {CURE}, which names the model")
    return {str(key): value for key, value in values.items()}


def check_place(out: Path) -> None:
    """Refuse a place where `recipe=NAME` would not find the file, or would find another."""
    wanted = f"write --out {Path('mine') / 'recipe' / 'NAME.yaml'}"
    if out.suffix != ".yaml" or out.absolute().parent.name != "recipe":
        raise UserError(f"--out {out}: a recipe is a .yaml file in a folder named recipe; {wanted}")
    if re.fullmatch(r"\w[\w-]*", out.stem, re.ASCII) is None:
        raise UserError(f"--out {out}: {out.stem!r} cannot follow recipe=; use letters, digits, _ and -: {wanted}")
    if (resources.files("distlora_launcher.conf") / "recipe" / out.name).is_file():
        raise UserError(f"--out {out}: recipe={out.stem} would find distlora's own recipe; choose another name")
    if out.exists():
        raise UserError(f"--out {out} exists; remove it, or choose another name")
    check_writable(out.absolute().parent, "--out")


def check_composes(text: str, source: Path, *, starts_from_adapter: bool) -> None:
    """Compose the recipe as `distlora train` would. Raises UserError for settings that do not go together.

    The adapter that it may start from is left aside: it need not be on this node.
    """
    from distlora_launcher.compose.compose import compose_config

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe" / "imported.yaml"
        recipe.parent.mkdir()
        recipe.write_text(text, encoding="utf-8")
        try:
            aside = ["adapter.init_from=null"] if starts_from_adapter else []
            compose_config(["recipe=imported", *aside], config_dir=folder)
        except UserError as error:
            raise UserError(f"{source} has settings that distlora refuses: {error}") from error
