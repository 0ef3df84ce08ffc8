"""`distlora report`: write one HTML file of a run or a sweep."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from distlora.config import UserError
from distlora.run_folder.layout import REPORT_NAME
from distlora.run_folder.sweep import is_sweep_folder
from distlora.system import atomic_io
from distlora.system.exit_codes import DONE
from distlora_launcher.cli.status import Status, headline, statuses
from distlora_launcher.launch.lock import CONFIG_NAME
from distlora_launcher.report.records import PageStatus, read_run
from distlora_launcher.report.run_page import commands_always, commands_when_done, run_report
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import say, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRequest:
    """Write an HTML report of a run, finished or not, or of a sweep.

    It shows curves, the plan beside the measurements, settings, samples and environment, in one self-contained file.

    example: distlora report runs/first --out first.html
    """

    run: str
    """RUN: folder of a run or a sweep."""
    out: Path | None = None
    """FILE.html: file to write (default: RUN/report.html)."""


def main(arguments: list[str]) -> int:
    """Write the report of a run or a sweep. Returns the exit code."""
    options = read(ReportRequest, "distlora report", arguments)
    folder = Path(options.run).expanduser().absolute()
    page = page_of(folder)
    out = folder / REPORT_NAME if options.out is None else options.out.expanduser().absolute()
    write(out, page)
    say(f"report {shown(out)} ({len(page.encode()) / 1000:,.0f} kB); open it in a browser")
    return DONE


def page_of(folder: Path) -> str:
    """Return the page of a run or a sweep. Raises UserError for any other folder."""
    if is_sweep_folder(folder):
        from distlora_launcher.studies.results import page_of_sweep

        return page_of_sweep(folder)
    if not (folder / CONFIG_NAME).exists():
        reason = "holds neither a run (no config.yaml) nor a sweep" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {reason}; name the folder that `distlora train` or `distlora sweep` has printed")
    return run_report(read_run(folder), standing(statuses(folder)[0]))


def write(out: Path, page: str) -> None:
    """Write the page in one step. Raises UserError if that is not possible."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; write --out {out / REPORT_NAME}")
    try:
        atomic_io.write_text(out, page)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {out} ({error.strerror or error}); name another place with --out"
        ) from error


def standing(status: Status) -> PageStatus:
    """Return the state that the page shows, with the commands to type next."""
    failed = status.ending.error if status.state == "failed" else None
    sentence = "has failed" if failed is not None else headline(status)
    error = failed if status.damaged is None else status.damaged
    return PageStatus(state=status.state, headline=sentence, error=error, commands=_commands(status))


def _commands(status: Status) -> tuple[tuple[str, str], ...]:
    """Return (command, what it does) for what the user may type next."""
    run = shlex.quote(str(status.run_dir))
    commands: list[tuple[str, str]] = []
    if status.state == "done":
        commands = commands_when_done(status.run_dir, status.result)
    elif status.next is not None:
        word = status.next.split()[1] if status.next.startswith("distlora ") else ""
        purpose = {
            "resume": "continue from the newest checkpoint, or from the start where there is none",
            "cancel": "have it save and stop",
            "verify": "list what is damaged and what to do",
        }.get(word, "start it")
        commands = [(f"distlora {word} {run}" if word else status.next, purpose)]
    if status.state != "done" and status.saved is not None:
        commands.append((f"distlora generate {run}", "chat with the newest checkpoint"))
    if status.state in ("running", "queued", "ending"):
        commands.append((f"distlora status {run}", "show its progress"))
    known = {command for command, _ in commands}
    return (*commands, *(pair for pair in commands_always(status.run_dir) if pair[0] not in known))
