"""Log runs to wandb. It is imported only when a run starts, because a training node may lack it.

One process may have several runs (multi-trial training): each has a `WandbRun`, and all share one wandb service
process. wandb's current run (`wandb.run`) is not used, and the service ends with the last run.

SIGTERM, SIGINT and SIGHUP end the service at once, whatever mask it inherits (0.31.0, 2026-11-25). SLURM sends them to
every process of a step, just when a run has a last step to log. Unwritten data is lost (of an offline run everything
since a few seconds after its start), and each later call raises. So a call that fails this way starts the service again
and repeats the log of this start from RUN/metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from distlora.config import TrackerConfig
from distlora.system import atomic_io, stop_signals
from distlora.training.trackers.background import Tracker, id_path, read_id
from distlora.training.trackers.wandb_agent import AgentRun

ANSWER_SECONDS = 5.0
"""Seconds that wandb's server has to confirm the key, or the run logs offline."""
FINISH_SECONDS = 60.0
"""Seconds that wandb may delay the end of a run for uploads. The rest stays on disk for `wandb sync`; a job about to be
killed has little more time."""


class _Service:
    """wandb's service process, which all runs of this process share."""

    def __init__(self) -> None:
        self.start_number = 0
        """Incremented with each end of the service: a run with another number used an earlier one."""
        self.is_offline = False
        """True if one run could not go online: the others then do not wait for that either."""
        self.runs: set[WandbRun] = set()
        """Runs that use it."""

    def settings(self) -> Any:
        """Return wandb's settings for this process, without those that an agent sets for one run.

        They would override a run's arguments, its values the run's settings (`quant: nf4` instead of a section),
        silently.
        """
        import wandb

        os.environ.setdefault("WANDB_INIT_TIMEOUT", "5")  # Seconds; wandb's default is 90.
        settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
        settings.run_id = settings.sweep_id = settings.sweep_param_path = None
        return settings

    def leave(self, run: WandbRun, exit_code: int) -> None:
        """Remove a run. The last one ends the service."""
        self.runs.discard(run)
        if not self.runs:
            self.end(exit_code)
            self.is_offline = False

    def end(self, exit_code: int) -> None:
        """Wait until the service has written everything, and end it."""
        import wandb

        self.start_number += 1
        wandb.teardown(exit_code=exit_code)

    def end_lost(self) -> None:
        """Clean up after a service that has died."""
        with contextlib.suppress(*_gone()):  # wandb sends it a last message.
            self.end(1)


_service = _Service()


class WandbRun(Tracker):
    """wandb run of one start. `start` creates it, again if the service died. `metrics` is the run's metrics.jsonl."""

    name = "wandb"

    def __init__(self, start: Callable[[], Any], metrics: Path, say: Callable[[str], None]) -> None:
        self._start, self._metrics, self._say = start, metrics, say
        self._offset = metrics.stat().st_size
        self._summary: dict[str, Any] = {}
        self._result: Path | None = None
        try:
            self._run = start()
        except _gone():  # A signal has ended the service of earlier runs.
            _service.end_lost()
            self._run = start()
        self._start_number = _service.start_number
        _service.runs.add(self)

    def place(self, run_id: str | None) -> str:
        """Return the run's URL, or how to upload it as the wandb run `run_id`."""
        if not self._run.offline:
            return str(self._run.url)
        other = "" if run_id in (None, self._run.id) else f"--id {run_id} "
        return f"offline; upload with `wandb sync {other}{self._run.settings.sync_dir}`"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the metrics of a step, which metrics.jsonl already has."""
        self._call(lambda: self._run.log(dict(figures), step=step))

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table to the wandb run."""
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._call(lambda: self._run.log({name: table}, step=step))

    def summary(self, step: int, figures: Mapping[str, Any]) -> None:
        """Update the summary of the wandb run, which has no step."""
        self._summary.update(figures)
        self._call(lambda: self._run.summary.update(self._summary))

    def result(self, folder: Path) -> None:
        """Upload the published folder as an artifact of the run."""
        self._result = folder
        self._call(self._log_result)

    def close(self, exit_code: int) -> None:
        """Flush everything and tell wandb how the run ended."""

        def end() -> None:
            self._run.finish(exit_code=exit_code)
            # finish() may return before its log is on disk (0.31.0: 4 of 25 short runs). The end of the service, with
            # the last run, waits for that.
            _service.leave(self, exit_code)

        self._call(end)

    def drop(self) -> None:
        """Continue the run without wandb."""
        _service.runs.discard(self)

    def _log_result(self) -> None:
        import wandb

        assert self._result is not None
        artifact = wandb.Artifact(f"adapter-{self._run.id}", type="model")
        # Published files do not change, so wandb need not copy them.
        artifact.add_dir(str(self._result), skip_cache=True, policy="immutable")
        self._run.log_artifact(artifact)

    def _call(self, action: Callable[[], object]) -> None:
        if self._start_number != _service.start_number:  # Another run noticed that the service died, and cleaned up.
            self._start_again()
        try:
            action()
        except _gone():
            _service.end_lost()
            self._start_again()
            action()

    def _start_again(self) -> None:
        self._say("wandb's process has ended, by a signal perhaps; it is started again")
        self._run = self._start()
        self._start_number = _service.start_number
        _service.runs.add(self)
        for step, figures in self._logged():
            self._run.log(figures, step=step)
        self._run.summary.update(self._summary)
        if self._result is not None:
            self._log_result()

    def _logged(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (step, metrics) of the lines that this start has written."""
        with self._metrics.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # A full disk cut the line.
                    break
                entry = json.loads(line)
                step = entry.pop("step")
                yield step, {n: value for n, value in entry.items() if n != "time" and isinstance(value, (int, float))}


def _gone() -> tuple[type[Exception], ...]:
    from wandb.sdk.mailbox import HandleAbandonedError

    return ConnectionError, HandleAbandonedError


def start_wandb(
    run_dir: Path, tracker: TrackerConfig, recorded: Mapping[str, Any], say: Callable[[str], None]
) -> WandbRun | None:
    """Start a wandb run, online with a key, otherwise offline under RUN/wandb; None (and a line) without wandb.

    Its id is stored in RUN, so that a resume continues the same wandb run; for a run that an agent started it is the
    agent's. wandb keeps steps that a killed run had already sent, and drops the repeated ones, which have the same
    numbers. `recorded`: settings of the run, the number of ranks and the plan.
    """
    try:
        mode = _service.settings().mode
    except ImportError:
        say("wandb is not installed: figures go to metrics.jsonl only (set tracker=none to silence this message)")
        return None
    if mode == "disabled":
        say("wandb is turned off by WANDB_MODE: figures go to metrics.jsonl only")
        return None
    started = WandbRun(lambda: _open(run_dir, tracker, recorded, say), run_dir / "metrics.jsonl", say)
    say(f"wandb: {started.place(read_id(id_path(run_dir, 'wandb')))}")
    return started


def _open(run_dir: Path, tracker: TrackerConfig, recorded: Mapping[str, Any], say: Callable[[str], None]) -> Any:
    import wandb

    online = _service.settings().mode == "online"
    if online and not _service.is_offline:
        try:
            if _log_in():
                return _init(run_dir, tracker, recorded, "online")
        except (wandb.Error, TimeoutError) as error:
            # A run that waited hours in a queue should not end because a plotting server is down.
            say(f"WARNING: wandb cannot log online ({' '.join(str(error).split())}); logging offline")
            _service.is_offline = True
            if _service.runs:  # The online runs stay online.
                return _init(run_dir, tracker, recorded, "offline", has_id=False)
            if not isinstance(error, TimeoutError):  # An attempt that failed still holds the run's id.
                _service.end(0)
    return _init(run_dir, tracker, recorded, "offline")


def _log_in() -> bool:
    """Return whether there is a key. Raises wandb.Error if the server refuses it, TimeoutError without an answer.

    wandb waits without a look at signals, so a thread calls it, for which a request to stop does not wait.
    """
    import wandb

    answer = Future[bool]()

    def ask() -> None:
        try:
            answer.set_result(wandb.login(prompt=False, verify=True))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="wandb login", daemon=True).start()
    deadline = time.monotonic() + ANSWER_SECONDS
    while not answer.done() and time.monotonic() < deadline and stop_signals.requested() is None:
        time.sleep(0.05)
    if not answer.done():
        by = "before the request to stop" if stop_signals.requested() is not None else f"within {ANSWER_SECONDS:g} s"
        raise TimeoutError(f"no valid answer from {_service.settings().base_url} {by}")
    return answer.result()


def _init(
    run_dir: Path,
    tracker: TrackerConfig,
    recorded: Mapping[str, Any],
    mode: Literal["online", "offline"],
    *,
    has_id: bool = True,
) -> Any:
    """Call wandb.init with the run's stored id (or a new one, which is then stored), without terminal output.

    `has_id`: the stored id is free. Otherwise the run gets a new id here, and is uploaded under the stored one.
    """
    import wandb

    _service.settings()
    id_file = id_path(run_dir, "wandb")
    id_file.parent.mkdir(parents=True, exist_ok=True)
    agent = AgentRun.of_run(run_dir)
    if agent is None:
        agent = AgentRun.started()
        if agent is not None:
            agent.keep(run_dir)
    run_id = read_id(id_file) or (None if agent is None else agent.run_id)
    run = wandb.init(
        dir=str(run_dir),
        mode=mode,
        reinit="create_new",
        id=run_id if has_id else None,
        # Offline there is nothing to resume; `wandb sync` joins logs with the same id.
        resume="allow" if mode == "online" else None,
        # An agent's run belongs to its sweep's project.
        project=(agent and agent.project) or tracker.project,
        entity=(agent and agent.entity) or tracker.entity,
        name=run_dir.name if agent is None else f"{recorded['name']}-{agent.run_id}",
        group=tracker.group,
        tags=list(tracker.tags),
        config={**recorded, **({} if agent is None else agent.recorded(recorded))},
        allow_val_change=True,  # A resume may use another number of ranks.
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            finish_timeout=FINISH_SECONDS,
            sweep_id=None if agent is None else agent.sweep_id,
        ),
    )
    atomic_io.write_text(id_file, (run_id or run.id) + "\n")
    return run
