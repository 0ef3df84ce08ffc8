"""The `distlora` command: call the subcommand; turn a UserError into one message and exit code 2.

Exit codes: 0 done, 1 failure, 2 bad input, 75 stopped after a save (start it again), 128 + n killed by signal n.
A subcommand is one row of COMMANDS; its module is imported when it is called, so `distlora --help` needs none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from distlora.system.exit_codes import BAD_INPUT, run_to_exit_code
from distlora_launcher.terminal.arguments import call_main


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its usage, its summary and the module that does the work."""

    usage: str
    """Arguments after the name."""
    summary: str
    """Description in `distlora --help`."""
    module: str
    """Module with `main(arguments: list[str]) -> int`, which also answers --help; imported when it is called."""


COMMANDS = {
    "train": Command(
        "model.path=FOLDER data.path=FILE [setting=value ...]",
        "fine-tune a model (-m for several runs)",
        "distlora_launcher.cli.train",
    ),
    "plan": Command(
        "model=NAME [gpu=NAME] [setting=value ...] [--json] [--plot FILE.png] | --table",
        "predict memory, disk, traffic, time and cost of a run, for any model on any GPUs",
        "distlora_launcher.cli.plan",
    ),
    "sweep": Command(
        "[sweep=grid|random|optuna|rank_search] [setting=a,b ...] | create | agent ID",
        "compare many runs: a grid, Optuna, a search for the smallest sufficient rank, wandb agents",
        "distlora_launcher.cli.sweep",
    ),
    "report": Command(
        "RUN|SWEEP [--out FILE.html]",
        "write an HTML report of a run or a sweep: curves, settings, plan and measurements, samples",
        "distlora_launcher.cli.report",
    ),
    "resume": Command("RUN", "continue a run that was stopped", "distlora_launcher.cli.resume"),
    "status": Command(
        "RUN [--json]",
        "show the state of a run or of each run of a sweep: queued, running, saved, ended",
        "distlora_launcher.cli.status",
    ),
    "cancel": Command("RUN [--now]", "save and stop a run, on this node or in SLURM", "distlora_launcher.cli.cancel"),
    "verify": Command(
        "RUN [--json]",
        "check a run folder: data, checkpoints, results, metrics",
        "distlora_launcher.cli.verify",
    ),
    "data": Command(
        "preview model.path=FOLDER data.path=FILE [setting=value ...] | row RUN N | prepare RUN",
        "print documents as the model sees them: what is trained, truncated or left out",
        "distlora_launcher.cli.data",
    ),
    "generate": Command(
        "RUN [--checkpoint best] [--prompts FILE] [--temperature T]",
        "chat with a trained model, or answer a file of prompts",
        "distlora_launcher.cli.generate",
    ),
    "combine": Command(
        "A=0.6 B=-0.4 --out FOLDER [--method METHOD] [--rank R]",
        "combine adapters of one base: weighted sum, difference, reduction to a rank, TIES, DARE",
        "distlora_launcher.cli.combine",
    ),
    "eval": Command(
        "RUN|MODEL ... [--text FILE] [--processes N] [--json]",
        "compute loss and perplexity on a text: adapted, base and merged models side by side",
        "distlora_launcher.cli.evaluate",
    ),
    "push": Command(
        "RUN ORG/NAME [--private] [--checkpoint best] [--dry-run]",
        "upload the result to the Hugging Face hub, with a model card",
        "distlora_launcher.cli.push",
    ),
    "merge": Command(
        "RUN [--out FOLDER] [--onto trained|original] [--dtype fp32|bf16|fp16]",
        "merge base and adapter into one model in Hugging Face format, and report the accuracy",
        "distlora_launcher.cli.merge",
    ),
    "export": Command(
        "RUN --format hf|peft|bnb|gguf|gguf-lora [--out PLACE] [--dtype DTYPE] [--no-check]",
        "export a trained model to formats of other tools, and load each export with its tool",
        "distlora_launcher.cli.export",
    ),
    "import": Command(
        "axolotl FILE.yaml [--out FOLDER/recipe/NAME.yaml]",
        "turn an Axolotl configuration into a recipe, and list what has no equivalent",
        "distlora_launcher.importing",
    ),
    "analyze": Command(
        "quantization MODEL | spectrum RUN [--against RUN] | intrinsic MODEL ... --data FILE",
        "measure quantization error, spectra of trained weights and intrinsic dimension: tables and plots",
        "distlora_launcher.cli.analyze",
    ),
    "bench": Command(
        "load | checkpoint | step | memory | methods [--quick] | kernels [--offline]",
        "benchmark this node against the plan and other tools: tables, CSV, plots",
        "distlora_launcher.cli.bench",
    ),
    "cache": Command(
        "list [--json] | clear [ENTRY ...] [--older-than DAYS] [--all]",
        "list or remove the quantized bases that are cached for the next start",
        "distlora_launcher.cli.cache",
    ),
    "demo": Command("[--base]", "pretrain a tiny model and fine-tune it, on any machine", "distlora_launcher.demo"),
}

HELP = """Multi-GPU QLoRA training on a 4-bit base, restartable bit for bit.

usage: distlora COMMAND ...

{commands}

`distlora COMMAND --help` has the details. For a first run without a model or data: `distlora demo`.
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
        print(help_text())
        return 0 if words else BAD_INPUT
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"distlora {version('distlora')}")
        return 0
    if words[0] in ("-sc", "--shell-completion"):
        from distlora_launcher.cli.completion import main as complete

        return complete(words)
    command = COMMANDS.get(words[0])
    if command is None:
        from distlora.config import UserError, nearest

        if words[0] in ("preview", "row"):
            raise UserError(f"there is no command {words[0]!r}; write distlora data {words[0]}")
        raise UserError(
            f"there is no command {words[0]!r}{nearest(words[0], COMMANDS)}; the commands are {', '.join(COMMANDS)}"
        )
    return call_main(command.module, words[1:])


def help_text() -> str:
    """Return the text of `distlora --help`."""
    rows = [
        f"  distlora {f'{name} {command.usage}'.rstrip()}\n      {command.summary}"
        for name, command in COMMANDS.items()
    ]
    return HELP.format(commands="\n".join(rows)).rstrip()


if __name__ == "__main__":
    sys.exit(main())
