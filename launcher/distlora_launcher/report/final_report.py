"""The report of a run whose workers have ended well, and the commands that it names."""

import shlex
from pathlib import Path

from distlora.config.json_files import object_or_empty
from distlora.run_folder.layout import DATA_NAME, METRICS_NAME, REPORT_NAME, find_result
from distlora.system import atomic_io
from distlora_launcher.report.records import PageStatus, read_run
from distlora_launcher.report.run_page import run_report
from distlora_launcher.terminal.output import say, shown, warn

MAX_METRICS_BYTES = 4_000_000
"""Largest metrics.jsonl of which a report is made as the run ends: some ten thousand steps, 0.3 s."""


def write_final_report(run_dir: Path) -> None:
    """Write the report of a run whose workers have ended well. A failure is printed and costs the run nothing."""
    command = f"distlora report {shown(run_dir)}"
    try:
        if (run_dir / METRICS_NAME).stat().st_size > MAX_METRICS_BYTES:
            say(f"write a report of it with: {command}")
            return
        write_report(run_dir)
        say(f"report {shown(run_dir / REPORT_NAME)}")
    except Exception as error:
        warn(f"no report was written ({type(error).__name__}: {error}); the run is complete; try {command}")


def write_report(run_dir: Path) -> None:
    """Write RUN/report.html of a run that has its result, even while its launcher still holds the lock."""
    result = find_result(run_dir)
    headline = f"is done: {shown(result)}" if result is not None else "is done"
    standing = PageStatus(
        state="done",
        headline=headline,
        commands=(*commands_when_done(run_dir, result), *commands_always(run_dir)),
    )
    atomic_io.write_text(run_dir / REPORT_NAME, run_report(read_run(run_dir), standing))


def commands_when_done(run_dir: Path, result: Path | None) -> list[tuple[str, str]]:
    """Return (command, what it does) for a run with a result."""
    run, is_adapter = shlex.quote(str(run_dir)), result is not None and result.name == "adapter"
    splits = object_or_empty(run_dir / DATA_NAME).get("splits")
    text = "" if isinstance(splits, dict) and "eval" in splits else " --text FILE"
    commands = [
        (f"distlora generate {run}", "chat with the result"),
        (f"distlora eval {run}{text}", f"compare it with the base on {'documents' if text else 'the held-out data'}"),
    ]
    if is_adapter:
        commands.append((f"distlora merge {run}", "merge the adapter into the base: a Hugging Face model folder"))
    commands.append((f"distlora export {run} --format gguf", "make a GGUF file for llama.cpp or Ollama"))
    commands.append((f"distlora push {run} ORG/NAME", "upload it to the Hugging Face hub, with a model card"))
    if is_adapter:
        train = f"distlora train ... adapter.init_from={shlex.quote(str(result))}"
        commands.append((train, "train it further, on other data or for longer"))
    return commands


def commands_always(run_dir: Path) -> list[tuple[str, str]]:
    """Return (command, what it does) for a run in any state."""
    run = shlex.quote(str(run_dir))
    return [
        (f"distlora verify {run}", "check every byte of its checkpoints and records"),
        (f"distlora report {run}", "write this report again"),
    ]
