"""The help text of `distlora train`: usage, examples, options, and every setting with its meaning."""

import shutil
import textwrap
from collections.abc import Sequence

from distlora.config import UserError, nearest
from distlora.config.field_docs import Setting, sections
from distlora.config.plan import GPUS
from distlora_launcher.compose.overrides import options_of

USAGE = """usage: distlora train [FILE.yaml] [setting=value ...] [option ...]

Fine-tune a causal language model with QLoRA.

examples:
  distlora train model.path=Qwen/Qwen3-0.6B data.path=chats.jsonl run_dir=runs/first
  distlora train mine.yaml optim.lr=1e-4                            # settings from a file; the command line wins
  distlora train recipe=llama3_8b_24gb data.path=chats.jsonl adapter.r=32
  distlora train -m mine.yaml train.seed=0,1                        # one run per value

FILE.yaml holds settings by section (`distlora init FILE.yaml` writes one), or is a file of Axolotl or LLaMA-Factory.
Relative paths in it are from the working folder. model.path is a folder in Hugging Face format or a name on the hub;
data.path is a file (jsonl, json, parquet, csv, txt), a folder of such files, or a data set on the hub.

options:
  --help [NAME]      this text; with a section (optim) or a setting (optim.lr) all about that
  --cfg job          print the composed settings; start nothing
  --info             print where the settings come from; start nothing
  --dry-run          print the job script of cluster=slurm; submit nothing
  -m, --multirun     start one run per value: train.seed=0,1 (`distlora sweep` also compares them)
  --config-dir DIR   folder with your own recipes and groups
  --version          print the version

choices of several settings, as group=option:
"""
MOST = 34
"""Characters of `setting=default` beside which its meaning starts in the same line."""


def help_text(topics: Sequence[str] = ()) -> str:
    """Return the help text; with topics all about these sections and settings. Raises UserError for an unknown one."""
    documented = list(sections())
    if topics:
        return "\n".join(line for topic in topics for line in _about(topic, documented)) + "\n"
    width = max(80, min(120, shutil.get_terminal_size((112, 24)).columns))
    lines = [USAGE.rstrip()]
    documented = [section for section in documented if section[0] != "sweep"]  # `distlora sweep` takes those.
    for group in ("recipe", *(name for name, _, _ in documented if name)):
        options = ["auto", *GPUS] if group == "gpu" else options_of(group)
        if len(options) > 1:
            lines.append(textwrap.fill(f"  {group:10}{', '.join(options)}", width, subsequent_indent=" " * 12))
    lines.append("\nsettings and their defaults:")
    for name, summary, settings in documented:
        lines += ["", f"{name}: {summary}" if name else summary]
        for setting in settings:
            choices = f" [{', '.join(setting.choices)}]" if setting.choices else ""
            lines += _entry(_assigned(setting), f"{setting.summary}{choices}", width)
    return "\n".join(lines) + "\n"


def _about(topic: str, documented: Sequence[tuple[str, str, list[Setting]]]) -> list[str]:
    """Return everything about a section, or about the settings of a name."""
    by_section = {name: settings for name, _, settings in documented if name}
    settings = [setting for settings in by_section.values() for setting in settings] + documented[0][2]
    chosen = by_section.get(topic) or [s for s in settings if topic in (s.name, s.name.rpartition(".")[2])]
    if not chosen:
        known = [*by_section, *(setting.name for setting in settings)]
        raise UserError(f"distlora train --help: there is no section or setting {topic}{nearest(topic, known)}")
    lines = [summary for name, summary, _ in documented if name == topic]
    for setting in chosen:
        lines += [
            f"{_assigned(setting)}    ({setting.values})",
            textwrap.indent(textwrap.fill(setting.doc, 100), "    "),
        ]
    return lines


def _assigned(setting: Setting) -> str:
    default = setting.default or {"run_dir": "runs/TIME-NAME"}.get(setting.name)
    return f"{setting.name}={default}" if default else f"{setting.name} (required)"


def _entry(name: str, text: str, width: int) -> list[str]:
    indent = " " * (MOST + 4)
    wrapped = textwrap.wrap(text, width - len(indent))
    if len(name) > MOST:
        return [f"  {name}", *(indent + line for line in wrapped)]
    return [f"  {name:{MOST}}  {wrapped[0]}", *(indent + line for line in wrapped[1:])]
