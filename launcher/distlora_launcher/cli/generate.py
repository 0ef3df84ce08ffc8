"""`distlora generate RUN`: talk to what a run trained, or have it answer the prompts of a file.

Everything that can be refused is refused here, before torch is imported. Then this process becomes the worker
(`python -m distlora.post.generate`), so that the terminal and its signals are the worker's own; with --processes
torchrun starts several, which share the model.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distlora.config import UserError, require
from distlora.config.file import load_config
from distlora.data.prompts import GenerateRequest, read_prompts
from distlora.post.trained import find_weights
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.hub import restore
from distlora_launcher.launch.workers import become, check_processes, run_several
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import shown

WORKER = "distlora.post.generate:main"

DESCRIPTION = """\
Generate text with what the run in the folder RUN trained, or with its newest checkpoint while it is unfinished. On a
terminal this is a chat: /reset starts again, /system TEXT sets the system message, Ctrl-C stops an answer, Ctrl-D or
/exit leaves. From a pipe, each line is a prompt and is answered as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateArguments:
    """The arguments of `distlora generate`."""

    run: str
    adapter: str | None
    checkpoint: str | None
    prompts: str | None
    out: str | None
    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int
    system: str | None
    as_chat: bool | None
    processes: int


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker, or run several. Returns the exit code of several."""
    options = parse(arguments)
    if options is None:
        return DONE
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


def parse(arguments: Sequence[str]) -> GenerateArguments | None:
    """Return the arguments, or None after the help text. Raises UserError for unknown flags and bad values."""
    parser = Parser("distlora generate", DESCRIPTION)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run")
    add(
        "--adapter",
        metavar="PATH|base",
        help="base: the base model alone; PATH: another LoRA adapter of the same base, a folder in PEFT format",
    )
    add("--checkpoint", metavar="NAME", help="a saved step (step_100), or the best by held-out loss (best)")
    add(
        "--prompts",
        metavar="FILE",
        help='answer these: a text file with one per line, or jsonl: {"prompt": TEXT} or {"messages": [...]}; the '
        'result is a JSON line for each, with "completion", "tokens" and "ended"',
    )
    add("--out", metavar="FILE", help="write that result to this new file instead of to stdout")
    add("--max-new-tokens", metavar="N", type=int, default=256, help="most tokens of an answer (%(default)s)")
    add(
        "--temperature",
        metavar="T",
        type=float,
        help="0: the likeliest token each time; above 0: sample (generation_config.json of the model, else 0)",
    )
    add("--top-p", metavar="P", type=float, help="sample among the likeliest tokens with this share of the probability")
    add("--top-k", metavar="K", type=int, help="sample among this many of the likeliest tokens")
    add("--seed", metavar="S", type=int, default=0, help="seed of the sampling (%(default)s)")
    add("--system", metavar="TEXT", help="a system message for every conversation that has none")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--chat",
        dest="as_chat",
        action="store_const",
        const=True,
        help="apply the chat template (without --chat and --raw: as the run was trained)",
    )
    form.add_argument(
        "--raw", dest="as_chat", action="store_const", const=False, help="continue the prompts as they are"
    )
    add(
        "--processes",
        metavar="N",
        type=int,
        default=1,
        help="shard the model among N processes, one per GPU; with --prompts only",
    )
    options = parser.read(GenerateArguments, arguments)
    if options is None:
        return None
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
