"""`distlora bench comm`: what a training step moves between ranks, ours beside PEFT with accelerate's FSDP2.

Calculated here from config.json alone, which needs neither torch nor weights; --measure has a process count it on two
ranks of a small model.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from distlora.architecture.known import ARCHITECTURES
from distlora.architecture.shapes import ModelShapes, shapes_of
from distlora.bench.comm import MACHINE, MODELS, SMALL, Counted, Row, counted_table, rows_of, tables
from distlora.config import Config, UserError
from distlora.system.exit_codes import DONE, FAILED
from distlora_launcher.compose.compose import compose_config, names_model
from distlora_launcher.compose.this_machine import planned_model
from distlora_launcher.launch.workers import worker_environment
from distlora_launcher.terminal.arguments import Parser, numbers

MEASURE = "distlora.bench.measured"
PACKAGES = ("torch", "accelerate", "peft", "bitsandbytes", "transformers")
PEERS = ("accelerate", "peft", "bitsandbytes")
MEASURED_RANKS = 2

USAGE = """usage: distlora bench comm [setting=value ...] [--ranks 8,64] [--accumulation 1,8] [--measure] [--json]

What one training step moves between ranks, by kind, ours beside PEFT with accelerate's FSDP2 (NF4 stored as bf16 and
as uint8, and bf16) with the same adapters. Calculated from config.json alone, so a model of any size and any number of
ranks costs nothing; as a Markdown table.

  setting=value      any setting of `distlora train`: model=NAME or model.path=FOLDER (or a name on the hub, of which
                     config.json alone is read) calculates that model, else Llama 3.1 8B, 70B and 405B; adapter.*,
                     quant.*, train.*. Without one that says it, every linear has an adapter
  --ranks N,N        for these numbers of ranks (8,64), on machines of 8, or of cluster.gpus_per_node where it is set
  --accumulation N,N for so many micro-batches of a rank in a step (1,8)
  --measure          train a step of a small Llama on two ranks of this machine too, each way, and count the bytes of
                     every collective as torch issues them; takes a minute. Needs peft, accelerate and bitsandbytes
  --json             every figure, in bytes, for a program to read"""


def main(arguments: list[str]) -> int:
    """Print the tables. Returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    options, config = parse(arguments)
    rows = [
        row
        for name, shapes in models(config)
        for ranks in options.ranks
        for accumulation in options.accumulation
        for row in rows_of(name, shapes, config, ranks=ranks, accumulation=accumulation, machine=options.machine)
    ]
    calculated, counted = [], []
    if options.measure:
        calculated = small_rows(options.accumulation)
        found = measure(options.accumulation)
        if found is None:
            return FAILED
        counted = found
    if options.json:
        written: dict[str, Any] = {"calculated": [row.as_json() for row in rows]}
        if options.measure:
            written["counted"] = [
                {"calculated": row.as_json(), "counted": each} for row, each in zip(calculated, counted, strict=True)
            ]
        print(json.dumps(written, indent=1))
        return DONE
    lines = list(tables(rows))
    if options.measure:
        lines += [*counted_table(calculated, [Counted(**each) for each in counted]), "", machine()]
    print("\n".join(lines).rstrip())
    return DONE


def parse(arguments: Sequence[str]) -> tuple[Any, Config]:
    """The options and the settings. UserError for what is wrong in either."""
    parser = Parser("distlora bench comm")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--accumulation", default="1,8")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    options.ranks = numbers("--ranks", options.ranks)
    options.accumulation = numbers("--accumulation", options.accumulation)
    for word in options.settings:
        if "=" not in word:
            raise UserError(f"distlora bench comm: {word!r} is no setting; write setting=value, or --help for the rest")
    for name in PEERS if options.measure else ():
        if not installed(name):
            raise UserError(
                f"--measure trains with PEFT and accelerate too, and {name} is not installed; install it "
                f"(pip install {name}), or leave --measure out"
            )
    named = {word.lstrip("+").partition("=")[0] for word in options.settings}
    default = [] if named & {"recipe", "adapter", "adapter.target_modules"} else ["adapter.target_modules=all-linear"]
    # Settings of several ranks are checked by their number.
    default += [] if "cluster.gpus_per_node" in named else [f"cluster.gpus_per_node={options.ranks[0]}"]
    config = compose_config([*default, *options.settings], may_lack_paths=True)
    options.machine = config.cluster.gpus_per_node if "cluster.gpus_per_node" in named else MACHINE
    return options, config


def models(config: Config) -> Iterator[tuple[str, ModelShapes]]:
    """(name, shapes) of the model that is named, or of those that are known. UserError for one of no known family."""
    if not names_model(config):
        yield from ((title, shapes_of(ARCHITECTURES[name], name)) for title, name in MODELS.items())
        return
    found = planned_model(config, any_length=True)
    yield found.name.rpartition("/")[2], found.shapes


def small_rows(accumulations: Sequence[int], *, tied: bool = False) -> list[Row]:
    """What is calculated for the steps that are measured, in their order."""
    config = compose_config(["adapter.target_modules=all-linear"], may_lack_paths=True)
    shapes = shapes_of({"model_type": "llama", **SMALL, "tie_word_embeddings": tied}, "the model that is measured")
    return [
        row
        for accumulation in accumulations
        for row in rows_of("a small Llama", shapes, config, ranks=MEASURED_RANKS, accumulation=accumulation)
    ]


def measure(accumulations: Sequence[int], *, tied: bool = False) -> list[dict[str, Any]] | None:
    """The steps as counted on two ranks, of a small Llama whose head is `tied` to its embedding or not; None where a
    rank failed, which has said why."""
    print("training a step each way on two ranks (a minute)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", MEASURE, "--accumulation", ",".join(map(str, accumulations))]
    command += ["--tied"] if tied else []
    finished = subprocess.run(command, env=worker_environment(MEASURED_RANKS), capture_output=True, text=True)
    if finished.returncode != 0:
        print(f"{finished.stderr}\nerror: the measurement failed; the reason is above", file=sys.stderr)
        return None
    rows: list[dict[str, Any]] = json.loads(finished.stdout)
    return rows


def machine() -> str:
    """What the figures were counted with."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{datetime.date.today()}, CPU ({platform.machine()}), gloo: {versions}"


def installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
