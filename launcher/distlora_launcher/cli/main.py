"""The `distlora` command: call the subcommand; turn a UserError into one message and exit code 2.

Exit codes: 0 done, 1 failure, 2 bad input, 75 stopped after a save (start it again), 128 + n killed by signal n.
A subcommand is a module with `main(arguments: list[str]) -> int`, which also answers --help. It is imported when it is
called, so `distlora --help` needs none of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from distlora.system.exit_codes import BAD_INPUT, DONE, run_to_exit_code
from distlora_launcher.terminal.arguments import call_main, listed

COMMANDS = {
    "train": "fine-tune a model (-m for several runs)",
    "plan": "predict memory, disk, traffic, time and cost of a run, for any model on any GPUs",
    "sweep": "compare many runs: a grid, Optuna, a search for the smallest sufficient rank, wandb agents",
    "report": "write an HTML report of a run or a sweep: curves, settings, plan and measurements, samples",
    "resume": "continue a run that was stopped",
    "status": "show the state of a run or of each run of a sweep: queued, running, saved, ended",
    "cancel": "save and stop a run, on this node or in SLURM",
    "verify": "check a run folder: data, checkpoints, results, metrics",
    "data": "print documents as the model sees them: what is trained, truncated or left out",
    "generate": "chat with a trained model, or answer a file of prompts",
    "combine": "combine adapters of one base: weighted sum, difference, reduction to a rank, TIES, DARE",
    "eval": "compute loss and perplexity on a text: adapted, base and merged models side by side",
    "push": "upload the result to the Hugging Face hub, with a model card",
    "merge": "merge base and adapter into one model in Hugging Face format, and report the accuracy",
    "export": "export a trained model to formats of other tools, and load each export with its tool",
    "import": "turn an Axolotl configuration into a recipe, and list what has no equivalent",
    "analyze": "measure quantization error, spectra of trained weights and intrinsic dimension: tables and plots",
    "bench": "benchmark this node against the plan and other tools: tables, CSV, plots",
    "cache": "list or remove the quantized bases that are cached for the next start",
    "demo": "fine-tune a small chat model in minutes, on any computer",
}
"""Summary in `distlora --help` by command; each is the module of its name in this package, but for MODULES."""
MODULES = {
    "eval": "distlora_launcher.cli.evaluate",
    "import": "distlora_launcher.importing",
    "demo": "distlora_launcher.demo.run",
}
TAKE_SETTINGS = ("train", "plan")
"""Commands whose arguments are settings, which Hydra completes on Tab."""

HELP = """Multi-GPU QLoRA training on a 4-bit base, restartable bit for bit.

usage: distlora COMMAND ...

To begin:
  distlora demo                                              a first run: no model, data or GPU needed
  distlora plan model=llama3_8b gpu=rtx4090                  what a run needs; downloads no weights
  distlora train model.path=ORG/NAME data.path=FILE.jsonl    fine-tune a model

{commands}

`distlora COMMAND --help` describes a command.
Exit codes: 0 done, 1 failure, 2 bad input, 75 stopped after a save (`distlora resume RUN`), 128 + n killed by signal n.
Tab completion: eval "$(distlora --shell-completion install=bash)"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_to_exit_code(lambda: run_command(words))


def run_command(words: list[str]) -> int:
    """Call the subcommand that `words` name, or print the help or the version. Returns the exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(commands=listed(COMMANDS)).rstrip())
        return DONE if words else BAD_INPUT
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"distlora {version('distlora')}")
        return DONE
    if words[0] in ("-sc", "--shell-completion"):
        return complete(words)
    if words[0] not in COMMANDS:
        from distlora.config import UserError, nearest

        if words[0] in ("preview", "row"):
            raise UserError(f"there is no command {words[0]!r}; write distlora data {words[0]}")
        raise UserError(
            f"there is no command {words[0]!r}{nearest(words[0], COMMANDS)}; the commands are {', '.join(COMMANDS)}"
        )
    return call_main(MODULES.get(words[0], f"distlora_launcher.cli.{words[0]}"), words[1:])


def complete(words: list[str]) -> int:
    """Answer `distlora -sc install=bash|uninstall=bash|query=bash`, as Hydra's shell functions call it."""
    line = os.environ.get("COMP_LINE", "")
    typed = line.split()
    if any(word.startswith("query=") for word in words):
        if len(typed) < 2 or (len(typed) == 2 and not line.endswith(" ")):
            prefix = typed[1] if len(typed) == 2 else ""
            print(" ".join(name for name in COMMANDS if name.startswith(prefix)))
            return DONE
        if typed[1] not in TAKE_SETTINGS:
            return DONE
        os.environ["COMP_LINE"] = line.replace(f" {typed[1]}", "", 1)
    from distlora_launcher.cli.train import run_hydra

    return run_hydra(words, program=sys.argv[0])


if __name__ == "__main__":
    sys.exit(main())
