"""`distlora plan`: what a run needs, before it starts, of any model on any machines. Nothing is started or downloaded
but a config.json of a model that neither lies here nor is known.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from distlora.command_line import DONE
from distlora.config import Config, UserError
from distlora.plan import Plan, plan_of
from distlora.plan.machine import machine_of
from distlora.plan.report import page
from distlora_launcher.application import expand_home
from distlora_launcher.arguments import Parser
from distlora_launcher.checks import check_parallel
from distlora_launcher.compose import compose_config
from distlora_launcher.here import found_here, planned_model
from distlora_launcher.listing import options_of

PROGRAM = "distlora plan"

USAGE = """usage: distlora plan model=NAME [setting=value ...] [--json]

What a run needs before it starts, calculated from the model's sizes alone: memory of a card by kind, host memory, disk,
what travels between cards. Nothing is downloaded and no GPU is needed.

  model=NAME         a well-known model: {models};
                     or model.path=FOLDER, or model.path=ORG/NAME of the hub
  card=NAME          a card: {cards};
                     or what is better known: card.memory_gib=80 card.tflops=989 ... Without one, this machine
  setting=value      any setting of `distlora train`, recipes too; without one what `distlora train` would do.
                     cluster.gpus_per_node=8: cards of a machine
  --json             every figure, in bytes, for a program to read
  --config-dir DIR   your own recipes"""


def main(arguments: list[str]) -> int:
    """Print the plan. Returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return DONE
    options = parse(arguments)
    plan = planned(options.settings, config_dir=options.config_dir)
    print(json.dumps(plan.as_json(), indent=1) if options.json else page(plan))
    return DONE


def usage() -> str:
    """`distlora plan --help`."""
    cards = [name for name in options_of("card") if name != "auto"]
    return USAGE.format(models=wrapped(models()), cards=wrapped(cards))


def wrapped(names: Sequence[str]) -> str:
    """Names in lines that fit behind the usage's first column."""
    lines, width = [""], 95
    for name in names:
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += f"{name}, "
    return ("\n" + " " * 21).join(line.rstrip() for line in lines).rstrip(",")


def models() -> list[str]:
    """Names for model=."""
    return [name for name in options_of("model") if name != "local"]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options and the settings. UserError for an unknown flag, with the nearest, and for a word that is neither."""
    parser = Parser(PROGRAM)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--config-dir")
    options: argparse.Namespace = parser.parse_args([expand_home(word) for word in arguments])
    for word in options.settings:
        if "=" not in word:
            known = f"; for a model, model={word}" if word in models() else ""
            raise UserError(f"{PROGRAM}: {word!r} is no setting{known}; write setting=value, or --help for the rest")
    return options


def planned(settings: Sequence[str], *, config_dir: str | None = None) -> Plan:
    """The plan of a run with these settings. UserError for what `distlora train` would refuse of them."""
    config = compose_config(settings, config_dir=config_dir, may_lack_paths=True)
    require_model(config)
    check_parallel(config)
    return plan_of(config, planned_model(config), machine_of(config, found=found_here()))


def require_model(config: Config) -> None:
    """Refuse settings that name none, with the names that are known."""
    if Path(config.model.path).name == "unset":  # What compose_config puts in the place of what is missing.
        raise UserError(
            f"no model is named, and a plan is of a model; write for example {PROGRAM} model=llama3_8b card=rtx4090",
            f"names for model= are {', '.join(models())}; or set model.path to a folder, or to ORG/NAME of the hub",
        )
