"""The `distlora` command: call the subcommand; turn a UserError into one message and exit code 2.

Exit codes: 0 done, 1 failure, 2 bad input, 75 stopped after a save (start it again), 128 + n killed by signal n.
A subcommand is a module with `main(arguments: list[str]) -> int`, which also answers --help. It is imported when it is
called, so `distlora --help` needs none of them.
"""

import os
import sys
from collections.abc import Sequence

from distlora import __version__
from distlora.config import UserError, nearest
from distlora.system.exit_codes import BAD_INPUT, DONE, run_to_exit_code
from distlora_kernels import processor
from distlora_launcher.terminal.arguments import call_main, listed

GROUPS = {
    "Train": {
        "init": "write a settings file to start from",
        "train": "fine-tune a model (-m for several runs)",
        "sweep": "compare many runs: a grid, Optuna, a search for the smallest sufficient rank, wandb agents",
        "resume": "continue a run that was stopped",
        "cancel": "save and stop a run, on this node or in SLURM",
        "import": "turn a file of Axolotl or LLaMA-Factory into a recipe, and list what has no equivalent",
        "serve": "train and sample adapters of many users on one base, over the protocol of the Tinker SDK",
        "demo": "fine-tune a small chat model in minutes, on any computer",
    },
    "Inspect": {
        "doctor": "describe this node: versions, GPUs, processor, compiler, and what would make runs faster",
        "plan": "predict memory, disk, traffic, time and cost of a run, for any model on any GPUs",
        "check": "compare a model's computation with transformers and PEFT, on a small one of the same layers",
        "data": "print documents as the model sees them: what is trained, truncated or left out",
        "status": "show the state of a run or of each run of a sweep: queued, running, saved, ended",
        "report": "write an HTML report of a run or a sweep: curves, settings, plan and measurements, samples",
        "verify": "check a run folder: data, checkpoints, results, metrics",
        "cache": "list or remove the quantized bases that are cached for the next start",
    },
    "After": {
        "generate": "chat with a trained model, or answer a file of prompts",
        "eval": "compute loss and perplexity on a text: adapted, base and merged models side by side",
        "merge": "merge base and adapter into one model in Hugging Face format, and report the accuracy",
        "combine": "combine adapters of one base: weighted sum, difference, reduction to a rank, TIES, DARE",
        "export": "export a trained model to formats of other tools, and load each export with its tool",
        "push": "upload the result to the Hugging Face hub, with a model card",
    },
    "Analyze": {
        "analyze": "measure quantization error, spectra of trained weights and intrinsic dimension: tables and plots",
    },
}
"""Commands by group with their summaries, as `distlora --help` lists them. Each is the module of its name in this
package, but for MODULES."""
EXAMPLES = {
    "Train": "distlora train model.path=Qwen/Qwen3-0.6B data.path=chats.jsonl run_dir=runs/first",
    "Inspect": "distlora plan model=llama3_8b gpu=rtx4090",
    "After": "distlora generate runs/first",
    "Analyze": "distlora analyze quantization ./Llama-3.2-1B",
}
COMMANDS = {name: summary for commands in GROUPS.values() for name, summary in commands.items()}
MODULES = {
    "eval": "distlora_launcher.cli.evaluate",
    "import": "distlora_launcher.importing",
    "demo": "distlora_launcher.demo.run",
}
TAKE_SETTINGS = ("train", "plan")
"""Commands whose arguments are settings, which Hydra completes on Tab."""

HELP = """Fine-tune language models with QLoRA on one or many GPUs; a run that stops continues bit for bit.

usage: distlora COMMAND ...

{commands}`distlora COMMAND --help` describes a command.
Exit codes: 0 done, 1 failure, 2 bad input, 75 stopped after a save (`distlora resume RUN`), 128 + n killed by signal n.
Tab completion: eval "$(distlora --shell-completion install=bash)"
"""

MEANT = {
    "generate RUN": "chat inference infer predict ask complete sample talk",
    "train": "finetune fine-tune tune fit sft run start launch lora qlora",
    "train recipe=dpo": "dpo preference",
    "train recipe=reward": "reward rm bradley-terry",
    "train recipe=kto": "kto",
    "train recipe=orpo": "orpo",
    "train recipe=simpo": "simpo",
    "train recipe=grpo": "grpo dapo gspo rlhf rl ppo",
    "train recipe=continued_pretraining": "pretrain cpt",
    "data preview": "preview preprocess tokenize inspect dataset",
    "data row": "row",
    "eval RUN": "evaluate test perplexity",
    "sweep": "hpo search optimize",
    "export": "gguf convert",
    "merge RUN": "merge-lora merge_lora fuse",
    "push": "upload publish",
    "resume RUN": "continue restart",
    "cancel RUN": "stop kill",
    "status RUN": "ls ps list logs watch",
    "init": "new create config configure setup",
    "plan": "estimate memory dry-run fit-check",
    "doctor": "env info diagnose system",
}
"""Names of other tools' commands by what they are here."""
BENCHES = {
    **{name: f"python benchmarks/{name}.py" for name in ("step", "load", "checkpoint", "generate")},
    "kernels": "python benchmarks/gpu_kernels.py, or python tests/tools/compiled_kernels.py where there is no GPU",
    "layer": "distlora plan (the counted layer is in docs/benchmarks.md)",
    "memory": "python -m pytest tests/planner/test_plan_memory.py",
    "methods": "distlora sweep adapter=lora,dora,full optim.lr=2e-4,4e-4 ... (docs/methods.md)",
}
"""What to type in place of `distlora bench NAME`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_to_exit_code(lambda: run_command(words))


def run_command(words: list[str]) -> int:
    """Call the subcommand that `words` name, or print the help or the version. Returns the exit code."""
    if words[:1] == ["help"] and len(words) > 1:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(commands="".join(map(_listed_group, GROUPS))).rstrip())
        return DONE if words else BAD_INPUT
    own = words[: words.index("--") if "--" in words else None]
    # `export --version 0.18` is a release of the consumer.
    if words[0] == "-V" or ("--version" in own and (words[0] != "export" or own[-1] == "--version")):
        print(f"distlora {__version__}")
        return DONE
    if words[0] in ("-sc", "--shell-completion"):
        return complete(words)
    if words[0] not in COMMANDS:
        raise unknown_command(*words)
    try:
        processor.preferred()
    except ValueError as error:
        raise UserError(str(error)) from None
    return call_main(MODULES.get(words[0], f"distlora_launcher.cli.{words[0]}"), words[1:])


def _listed_group(title: str) -> str:
    return f"{title}\n{listed(GROUPS[title], width=max(map(len, COMMANDS)))}\n  example: {EXAMPLES[title]}\n\n"


def unknown_command(word: str, *arguments: str) -> UserError:
    """Return the error for a word that is no command, with what was meant."""
    if word in ("bench", "benchmark"):
        typed = BENCHES.get(arguments[0] if arguments else "step", BENCHES["step"])
        return UserError(f"benchmarks are scripts now: in a checkout of the repository write {typed}")
    meant = next((ours for ours, names in MEANT.items() if word.lower() in names.split()), None)
    if meant is None and (word.endswith((".yaml", ".yml")) or "=" in word):
        meant = f"train {word}"
    hint = f"; write distlora {meant}" if meant else nearest(word, COMMANDS)
    return UserError(f"there is no command {word!r}{hint}; `distlora --help` lists the commands")


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
    from distlora_launcher.compose.compose import complete_words

    complete_words(words[1:])
    return DONE


if __name__ == "__main__":
    sys.exit(main())
