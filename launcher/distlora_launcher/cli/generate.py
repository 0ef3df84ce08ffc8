"""`distlora generate RUN`: talk to what a run trained, or have it answer the prompts of a file."""

import contextlib
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from distlora.config import UserError, require
from distlora.config.file import load_config
from distlora.data.image_records import images_of
from distlora.data.prompts import GenerateRequest, read_prompts
from distlora.post.trained import find_weights, require_language_model
from distlora_launcher.compose.hub import restore
from distlora_launcher.launch.workers import become, check_processes, run_several
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import shown, warn

WORKER = "distlora.post.generate:main"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateArguments(GenerateRequest):
    """Generate text with the model that a run trained, or with the newest checkpoint of an unfinished run.

    On a terminal this is a chat: /reset starts again, /system TEXT sets the system message, Ctrl-C stops an answer,
    Ctrl-D or /exit leaves. From a pipe, each line is a prompt and is answered as text.

    example: distlora generate runs/first --prompts questions.txt --out answers.jsonl
    """

    adapter: str | None = None
    """PATH|base: another LoRA adapter for the run's base (PEFT format), or the base alone (base)."""
    checkpoint: str | None = None
    """NAME: checkpoint of the run: step_100, or best (lowest held-out loss)."""
    chat: bool = False
    """Apply the chat template (default: if the run was trained with one)."""
    raw: bool = False
    """Continue the prompts without a chat template."""
    processes: int = 1
    """N: shard the model among N processes, one per GPU; with --prompts only."""


def main(arguments: list[str]) -> int:
    """Check the arguments, then become the worker, or run several. Returns the exit code of several."""
    require(
        not any(word.partition("=")[0] == "--prompt" for word in arguments),
        "there is no option --prompt; write echo 'Hello' | distlora generate RUN, or --prompts FILE for a file with a "
        "prompt per line",
    )
    options = read(GenerateArguments, "distlora generate", arguments)
    require(
        options.adapter is None or options.checkpoint is None,
        "--adapter and --checkpoint exclude each other; give one of them",
    )
    require(not (options.chat and options.raw), "--chat and --raw exclude each other; give one of them")
    run_dir = Path(options.run).expanduser().absolute()
    if (run_dir / "adapter_config.json").is_file() and (run_dir.parent / "config.yaml").is_file():
        of = shown(run_dir.parent)  # The run itself is meant, which names the base and how it was trained.
        raise UserError(f"{shown(run_dir)} is the adapter of {of}; write distlora generate {of}")
    config = load_config(run_dir)
    require_language_model(config.train, run_dir)
    if options.image is not None:
        require(
            config.data.images,
            f"--image={options.image}: {shown(run_dir)} was trained on text alone; train with data.images=true",
        )
        require(Path(options.image).is_file(), f"--image={options.image} is not a file; name an image")
    weights = find_weights(run_dir, config.spec, options.adapter, options.checkpoint)
    resolved = {
        "run": str(run_dir),
        "weights": None if weights is None else str(weights),
        "image": None if options.image is None else str(Path(options.image).absolute()),
        "foreign": options.adapter not in (None, "base"),
        "as_chat": options.chat if options.chat or options.raw else None,
    }
    request = GenerateRequest(**{item.name: getattr(options, item.name) for item in fields(GenerateRequest)} | resolved)
    check_files(options.prompts, options.out, takes_images=config.data.images)
    check_processes(options.processes)
    require(
        options.processes == 1 or options.prompts is not None,
        f"--processes={options.processes} answers the prompts of a file, as several processes cannot share a terminal; "
        "add --prompts FILE",
    )
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers.
        restore(config.model)
    require(
        Path(config.model.path).is_dir(),
        f"the run's base is missing: model.path={config.model.path} in {shown(run_dir)}/config.yaml does not exist; "
        "put the model back there",
    )
    what = "the base alone" if weights is None else shown(weights)
    warn(f"loading {config.model.path} with {what} (importing torch takes a few seconds)")
    if options.processes > 1:
        return run_several(WORKER, request, options.processes)
    become(WORKER, request)


def check_files(prompts: str | None, out: str | None, *, takes_images: bool) -> None:
    """Refuse a broken file of prompts, and a result that has no prompts or would overwrite something."""
    for prompt in [] if prompts is None else read_prompts(Path(prompts)):
        require(
            takes_images or not images_of(prompt.messages),
            f"{prompt.place} holds an image, and the run was trained on text alone; train with data.images=true, or "
            "write the prompt as text",
        )
    if out is None:
        return
    require(prompts is not None, f"--out={out} is where the answers to --prompts go; add --prompts FILE")
    place = Path(out)
    require(not place.exists(), f"--out={out} exists already; name another file, or remove it")
    require(place.parent.is_dir(), f"--out={out}: there is no folder {place.parent}; make it first")
