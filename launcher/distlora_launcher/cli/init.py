"""Write a settings file to start from (`distlora init`): the settings that matter first, with their meanings."""

import dataclasses
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distlora.config import require
from distlora.config.field_docs import sections
from distlora.config.file import as_plain
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.checks import check_writable
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.terminal.arguments import read

RECIPE = "qlora"
PLACES = {"model.path": "Qwen/Qwen3-0.6B", "data.path": "chats.jsonl"}
"""Settings that each user changes, with values that show how they look."""
FIRST = (
    *PLACES,
    "data.sequence_length",
    "data.train_on",
    "data.eval_fraction",
    "adapter.r",
    "adapter.lora_alpha",
    "adapter.use_rslora",
    "optim.lr",
    "train.epochs",
    "train.global_batch",
    "train.micro_batch",
    "cluster.gpus_per_node",
)
"""Settings in the file."""
HEAD = """\
# Settings of a run. The command line wins over this file: distlora train {file} optim.lr=1e-4
#   distlora plan {file} gpu=rtx4090     memory and time on a GPU, before anything starts
#   distlora data preview {file}         documents as the model sees them
#   distlora train {file}
#   distlora sweep {file} optim.lr=1e-4,2e-4
# Relative paths are from the folder where the command is typed. `distlora train --help` lists all settings.

recipe: {recipe}  # a 4-bit base and an adapter on every linear; recipes: `distlora train --help`
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitArguments:
    """Write a settings file with comments, for `distlora train FILE`. An existing file is never changed.

    example: distlora init mine.yaml
    """

    file: list[Path] = dataclasses.field(default_factory=list)
    """FILE.yaml: file to write (default: distlora.yaml)"""


def main(arguments: list[str]) -> int:
    """Write the file. Returns the exit code."""
    files = read(InitArguments, "distlora init", arguments).file or [Path("distlora.yaml")]
    path = files[0].expanduser()
    require(len(files) == 1, f"{files[-1]} is one argument too many; write distlora init {path}")
    require(path.suffix in (".yaml", ".yml"), f"{path} does not end in .yaml; write distlora init {path.stem}.yaml")
    require(not path.exists(), f"{path} exists, and is not changed; write distlora init with another name")
    check_writable(path.absolute().parent, "FILE")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(starter_text(path))
    print(f"wrote {path}; set model.path and data.path in it, then: distlora plan {path}, distlora train {path}")
    return DONE


def starter_text(path: Path) -> str:
    """Return the text of a settings file at `path`, with the values of the recipe."""
    config = compose_config([f"recipe={RECIPE}"], may_lack_paths=True)
    lines, by_name = [HEAD.format(file=path, recipe=RECIPE)], {s.name: s for _, _, own in sections() for s in own}
    section = ""
    for name in FIRST:
        if (own := name.partition(".")[0]) != section:
            lines.append(f"\n{own}:\n")
            section = own
        setting = by_name[name]
        meaning = setting.summary + (f" One of {', '.join(setting.choices)}." if setting.choices else "")
        lines.append(textwrap.indent(textwrap.fill(meaning, 110), "  # ") + "\n")
        lines.append(f"  {name.partition('.')[2]}: {_as_yaml(PLACES.get(name) or config.value_of(name))}\n")
    return "".join(lines)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(as_plain(value), default_flow_style=True).removesuffix("\n").removesuffix("\n...")
