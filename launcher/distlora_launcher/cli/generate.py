"""`distlora generate RUN`: talk to what a run trained, or have it answer the prompts of a file.

Everything that can be refused is refused here, before torch is imported. Then this process becomes the worker
(`python -m distlora.post.generate`), so that the terminal and its signals are the worker's own; with --processes
torchrun starts several, which share the model.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from distlora.config import UserError, require
from distlora.config.file import load_config
from distlora.data.prompts import GenerateRequest, read_prompts
from distlora.post.trained import find_weights
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.hub import restore
from distlora_launcher.launch.exec_worker import become, check_processes, run_several
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import shown

WORKER = "distlora.post.generate:main"

USAGE = """usage: distlora generate RUN [--adapter PATH|base] [--checkpoint step_N|best] [--prompts FILE] [--out FILE]
                         [--max-new-tokens N] [--temperature T] [--top-p P] [--top-k K] [--seed S]
                         [--system TEXT] [--chat|--raw] [--processes N]

Generate text with what the run in the folder RUN trained, or with its newest checkpoint while it is unfinished. On a
terminal this is a chat: /reset starts again, /system TEXT sets the system message, Ctrl-C stops an answer, Ctrl-D or
/exit leaves. From a pipe, each line is a prompt and is answered as text.

  --adapter base        the base model alone
  --adapter PATH        another LoRA adapter of the same base: a folder in PEFT's format
  --checkpoint NAME     a saved step (step_100), or the best by held-out loss (best)
  --prompts FILE        answer these: a text file with one a line, or jsonl: {"prompt": TEXT} or {"messages": [...]};
                        the result is a JSON line for each, with "completion", "tokens" and "ended"
  --out FILE            write that result here (a new file) instead of to stdout
  --max-new-tokens N    tokens that an answer may have (256)
  --temperature T       0: the likeliest token each time; above 0: sample. Without it, what the model's
                        generation_config.json says, else 0
  --top-p P, --top-k K  sample among the likeliest tokens with this share of the probability, or this many
  --seed S              of the sampling (0)
  --system TEXT         a system message for every conversation that has none
  --chat, --raw         through the chat template, or continued as they are; without either, as the run was trained
  --processes N         share the model among N processes, one a GPU; with --prompts only"""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker, or run several. Returns the exit code of several."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    options = parse(arguments)
    run_dir = Path(options.run).expanduser().absolute()
    check_no_adapter(run_dir)
    config = load_config(run_dir)
    weights = find_weights(run_dir, config.spec, options.adapter, options.checkpoint)
    request = GenerateRequest(
        run=str(run_dir),
        weights=None if weights is None else str(weights),
        foreign=options.adapter not in (None, "base"),
        prompts=options.prompts,
        out=options.out,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        system=options.system,
        as_chat=options.as_chat,
    )
    check_files(options.prompts, options.out)
    check_processes(options.processes)
    check_terminal(options.processes, options.prompts)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers.
        restore(config.model)
    require(
        Path(config.model.path).is_dir(),
        f"the run's base is gone: model.path={config.model.path} in {shown(run_dir)}/config.yaml is no folder; "
        "put the model back there",
    )
    what = "the base alone" if weights is None else shown(weights)
    print(f"loading {config.model.path} with {what} (importing torch takes a few seconds)", file=sys.stderr, flush=True)
    if options.processes > 1:
        return run_several(WORKER, request, options.processes)
    become(WORKER, request)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises UserError for an unknown flag, with the nearest, and for values that are not numbers.
    """
    parser = Parser("distlora generate")
    parser.add_argument("run", metavar="RUN")
    for name in ("--adapter", "--checkpoint", "--prompts", "--out", "--system"):
        parser.add_argument(name)
    for name, kind, default in (
        ("--max-new-tokens", int, 256),
        ("--temperature", float, None),
        ("--top-p", float, None),
        ("--top-k", int, None),
        ("--seed", int, 0),
        ("--processes", int, 1),
    ):
        parser.add_argument(name, type=kind, default=default)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", dest="as_chat", action="store_const", const=True)
    form.add_argument("--raw", dest="as_chat", action="store_const", const=False)
    options = parser.parse_args(arguments)
    if options.adapter is not None and options.checkpoint is not None:
        parser.error("--adapter and --checkpoint both say which weights; give one of them")
    return options


def check_no_adapter(folder: Path) -> None:
    """Refuse the adapter in a run where the run itself is meant, which names the base and how it was trained."""
    run_dir = folder.parent
    if (folder / "adapter_config.json").is_file() and (run_dir / "config.yaml").is_file():
        raise UserError(f"{shown(folder)} is the adapter of {shown(run_dir)}; write distlora generate {shown(run_dir)}")


def check_files(prompts: str | None, out: str | None) -> None:
    """Refuse a broken file of prompts, and a result that has no prompts or would overwrite something."""
    if prompts is not None:
        read_prompts(Path(prompts))
    if out is None:
        return
    require(prompts is not None, f"--out={out} is where the answers to --prompts go; add --prompts FILE")
    place = Path(out)
    require(not place.exists(), f"--out={out} exists already; name another file, or remove it")
    require(place.parent.is_dir(), f"--out={out}: there is no folder {place.parent}; make it first")


def check_terminal(processes: int, prompts: str | None) -> None:
    """Raise UserError for several processes without a file of prompts."""
    require(
        processes == 1 or prompts is not None,
        f"--processes={processes} answers the prompts of a file, as several processes cannot share a terminal; add "
        "--prompts FILE",
    )
