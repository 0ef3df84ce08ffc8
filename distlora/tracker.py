"""wandb, as a run's reporter uses it. Imported nowhere else, and only when a run starts: it may be absent on a machine
that only trains.

wandb writes from a process of its own, which SIGTERM, SIGINT and SIGHUP end at once, whatever mask it inherits (0.31.0,
2026-11-25). SLURM sends them to every process of a step, just when a run has a last step to log. What that process had
not written is lost, of an offline run everything since a few seconds after its start, and each later call raises. So a
call that finds it gone starts another and logs again what this start has in RUN/metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distlora import durable
from distlora.config import Config
from distlora.config_file import as_mapping

FINISH_SECONDS = 60.0
"""How long wandb may hold up the end of a run to upload the rest. What it did not send stays on disk for `wandb sync`;
a job that a scheduler is about to kill has not much longer."""


class Tracker:
    """One start's wandb run; `start` makes it, anew where its process is gone. `metrics` is the run's metrics.jsonl, to
    which this start adds."""

    def __init__(self, start: Callable[[], Any], metrics: Path, say: Callable[[str], None]) -> None:
        self._start, self._metrics, self._say = start, metrics, say
        self._offset = metrics.stat().st_size
        self._summary: dict[str, Any] = {}
        self._run = start()

    @property
    def url(self) -> str:
        """Where an online run is shown."""
        return str(self._run.url)

    @property
    def folder(self) -> str:
        """What an offline run is uploaded from."""
        return str(self._run.settings.sync_dir)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step, which metrics.jsonl has already."""
        self._call(lambda: self._run.log(dict(figures), step=step))

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._call(lambda: self._run.log({name: table}, step=step))

    def summary(self, figures: Mapping[str, Any]) -> None:
        self._summary.update(figures)
        self._call(lambda: self._run.summary.update(self._summary))

    def close(self, exit_code: int) -> None:
        """Flush everything and tell wandb how the run ended."""
        import wandb

        def end() -> None:
            self._run.finish(exit_code=exit_code)
            # finish() may return before its log is on disk (0.31.0: 4 of 25 short runs); this waits for the writer.
            wandb.teardown(exit_code=exit_code)

        self._call(end)

    def _call(self, action: Callable[[], object]) -> None:
        from wandb.sdk.mailbox import HandleAbandonedError

        try:
            action()
        except (ConnectionError, HandleAbandonedError):
            self._start_again()
            action()

    def _start_again(self) -> None:
        import wandb

        self._say("wandb's process has ended, by a signal perhaps; it is started again")
        with contextlib.suppress(ConnectionError):  # It says goodbye to the process that is gone.
            wandb.teardown(exit_code=1)
        self._run = self._start()
        for step, figures in self._logged():
            self._run.log(figures, step=step)
        self._run.summary.update(self._summary)

    def _logged(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, figures) of the lines that this start has written."""
        with self._metrics.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # A full disk took no more of it.
                    break
                entry = json.loads(line)
                step = entry.pop("step")
                yield step, {name: value for name, value in entry.items() if name != "time" and value is not None}


def start_tracker(run_dir: Path, config: Config, world: int, say: Callable[[str], None]) -> Tracker | None:
    """A wandb run, online where there is a key, else offline under RUN/wandb; None (and a line) where wandb is missing.

    Its id is kept in RUN/wandb/run_id.txt, so that a resume goes on with the same wandb run. Steps that a killed run
    had already sent stay as they are: wandb drops what is logged for them again (a resume repeats the same numbers).
    """
    try:
        import wandb
    except ImportError:
        say("wandb is not installed: figures go to metrics.jsonl only (tracker=none says the same without this line)")
        return None
    session = wandb.setup(settings=wandb.Settings(silent=True))
    mode = session.settings.mode
    if mode == "disabled":
        say("wandb is turned off by WANDB_MODE: figures go to metrics.jsonl only")
        return None
    metrics = run_dir / "metrics.jsonl"
    if mode == "online" and wandb.login(prompt=False, verify=False):
        try:
            tracker = Tracker(lambda: _init(wandb, run_dir, config, world, "online"), metrics, say)
            say(f"wandb: {tracker.url}")
            return tracker
        except (
            wandb.Error
        ) as error:  # A run that waited in a queue for hours should not end for want of a plotting server.
            say(f"wandb cannot log online ({' '.join(str(error).split())}); logging offline")
            wandb.teardown(exit_code=0)  # The failed attempt still holds the run's id.
    tracker = Tracker(lambda: _init(wandb, run_dir, config, world, "offline"), metrics, say)
    say(f"wandb: offline; upload with `wandb sync {tracker.folder}`")
    return tracker


def _stored_id(id_file: Path) -> str | None:
    """The id of the wandb run that this run began; None where there is none, or what is there is none."""
    try:
        stored = id_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return stored if re.fullmatch(r"[\w-]{1,128}", stored, re.ASCII) else None


def _init(wandb: Any, run_dir: Path, config: Config, world: int, mode: str) -> Any:
    """wandb.init with the run's stored id (or a new one, which is then stored), without a word on the terminal."""
    id_file = run_dir / "wandb" / "run_id.txt"
    id_file.parent.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        dir=str(run_dir),
        mode=mode,
        id=_stored_id(id_file),
        # Offline there is nothing to resume from; `wandb sync` joins logs of one id.
        resume="allow" if mode == "online" else None,
        project=config.tracker.project,
        name=config.name,
        group=config.tracker.group,
        tags=list(config.tracker.tags),
        config={**as_mapping(config), "world": world},
        allow_val_change=True,  # A resume may run on another number of ranks.
        settings=wandb.Settings(silent=True, console="off", disable_git=True, finish_timeout=FINISH_SECONDS),
    )
    durable.write_text(id_file, run.id + "\n")
    return run
