"""Where a run's numbers go: RUN/metrics.jsonl always, wandb beside it, the terminal of rank 0.

Every rank constructs a `Reporter` and calls it alike; only rank 0 writes, and the check is in here. A line of
metrics.jsonl is `{"step": s, "time": seconds since 1970, ...}` with either the figures of a training step or those of a
held-out evaluation (`eval_loss`); numbers that JSON cannot hold (NaN, infinity) are null. RUN/samples.jsonl holds what
the model wrote between steps, `{"step", "prompt", "text"}`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from distlora.config import Config, UserError
from distlora.config.file import as_mapping
from distlora.config.json_files import read_object
from distlora.run_folder.eval_documents import EVAL_DOCUMENTS_NAME, DocumentRecord, write_documents
from distlora.system import atomic_io
from distlora.system.exit_codes import (
    BAD_INPUT,
    DONE,
    FAILED,
    STOPPED,
)
from distlora.system.progress import display
from distlora.system.stop_signals import STOPPED_NAME, Stopped, name_of
from distlora.training.reporting.tracker import Tracker, start_tracker


class Reporter:
    """The sink of one run's figures. A context manager: leaving it closes wandb with the exit code of the way out.

    Call `log` and `evaluation` in the order of their steps (wandb drops a step that is lower than the one before). On
    a resume, lines of steps after `start_step` are dropped first, so each step is in metrics.jsonl once, however often
    a run was killed.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        *,
        rank: int,
        world: int,
        total_steps: int,
        start_step: int,
        label: str = "",
    ) -> None:
        """`label`: what lines on the terminal begin with, where those of several runs come there."""
        self._writes = rank == 0
        if not self._writes:
            return
        self._run_dir = run_dir
        summary = run_dir / "summary.json"
        resumed = start_step > 0 and summary.is_file()
        self._summary: dict[str, Any] = read_object(summary, "move it out of the run folder") if resumed else {}
        path = run_dir / "metrics.jsonl"
        self._evaluated = {line["step"] for line in _keep_steps(path, start_step) if "eval_loss" in line}
        self._metrics = atomic_io.AppendedFile(path)
        self._metrics.append("")  # There from the start, for whoever follows it.
        path = run_dir / "samples.jsonl"
        sampled = _keep_steps(path, start_step, per_step=len(config.train.sample_prompts))
        self._samples = atomic_io.AppendedFile(path)
        self._sampled = {line["step"] for line in sampled}
        self._disk_failed = False
        self._uploads = config.tracker.artifact
        (run_dir / STOPPED_NAME).unlink(missing_ok=True)
        self._held_out: dict[str, float] = {}
        self._display = display(total_steps, start_step, label)
        self._tracker = (
            start_tracker(run_dir, config.tracker, config.name, as_mapping(config), world, self._display.say)
            if config.tracker.name == "wandb"
            else None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of one training step (counted from 1)."""
        if self._writes:
            self._record(step, metrics)
            self._display.step(step, {**metrics, **self._held_out})

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out figures (`eval_loss`, nats a token) after `step` steps; the same step again adds no line."""
        if not self._writes or step in self._evaluated:
            return
        self._evaluated.add(step)
        self._record(step, metrics)
        if step > 0:  # What the base had is no figure of the steps that follow.
            self._held_out = dict(metrics)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._display.say(f"held-out documents after step {step}: {shown}")

    def documents(self, record: DocumentRecord) -> None:
        """Held-out losses by document, of the newest evaluation."""
        if not self._writes:
            return
        try:
            write_documents(self._run_dir, record)
        except OSError as error:
            self._display.say(f"WARNING: {EVAL_DOCUMENTS_NAME} could not be written to {self._run_dir} ({error})")

    def lacks_samples(self, step: int) -> bool:
        """Whether this is the rank that writes and has no samples of that step yet."""
        return self._writes and step not in self._sampled

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """What the model writes after `step` steps: (prompt, text) pairs."""
        if not self._writes:
            return
        self._sampled.add(step)
        lines = [{"step": step, "prompt": prompt, "text": text} for prompt, text in samples]
        self._append(self._samples, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        for prompt, text in samples:
            self._display.say(f"after step {step}: {_shortened(prompt, 40)} -> {_shortened(text, 80)}")
        rows = [list(line.values()) for line in lines]
        self._track(lambda tracker: tracker.log_table(step, "samples", ["step", "prompt", "text"], rows))

    def event(self, text: str) -> None:
        """One line for the person who watches; not kept with the figures."""
        if self._writes:
            self._display.say(text)

    def stopped(self, signum: int, step: int, checkpoint: str | None) -> None:
        """Leave RUN/stopped.json: the run stops because it was asked to, and `checkpoint` (relative to RUN, on the disk
        by now) continues it after `step`; None where nothing was trained.
        """
        if not self._writes:
            return
        record = {"step": step, "checkpoint": checkpoint, "signal": name_of(signum), "time": round(time.time(), 3)}
        try:
            atomic_io.write_json(self._run_dir / STOPPED_NAME, record)
        except OSError as error:
            self._display.say(f"WARNING: {STOPPED_NAME} could not be written to {self._run_dir} ({error})")
        state = "nothing was trained yet" if checkpoint is None else f"step {step} is saved"
        self._display.say(f"asked to stop by {name_of(signum)}: {state}")

    def summary(self, figures: Mapping[str, float | list[str]]) -> None:
        """Final figures, and lists of names, added to those given before: RUN/summary.json (replaced atomically) and
        wandb's summary."""
        if not self._writes:
            return
        self._summary.update(
            {name: value if isinstance(value, list) else _plain(value) for name, value in figures.items()}
        )
        atomic_io.write_json(self._run_dir / "summary.json", self._summary)
        self._track(lambda tracker: tracker.summary(self._summary))

    def result(self, folder: Path) -> None:
        """What the run has published, whole on the disk by now; wandb gets it where tracker.artifact says so."""
        if self._writes and self._uploads:
            self._track(lambda tracker: tracker.result(folder))

    def close(self, exit_code: int) -> None:
        """Flush everything and tell wandb how the run ended. A second call does nothing."""
        if not self._writes:
            return
        self._writes = False
        for file in (self._metrics, self._samples):
            try:
                file.close()
            except OSError as error:
                self._display.say(f"WARNING: the last figures were not written to {self._run_dir} ({error})")
        self._display.close()
        self._track(lambda tracker: tracker.close(exit_code))

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(_exit_code(error))

    def _append(self, file: atomic_io.AppendedFile, text: str) -> None:
        """A disk that takes no figures is said once, until it does again: they wait in memory, and training goes on."""
        try:
            file.append(text)
            self._disk_failed = False
        except OSError as error:
            if not self._disk_failed:
                self._display.say(
                    f"WARNING: figures cannot be written to {self._run_dir} ({error.strerror or error}); they are kept "
                    "in memory until they can. Training goes on"
                )
            self._disk_failed = True

    def _record(self, step: int, metrics: Mapping[str, float]) -> None:
        figures = {name: _plain(value) for name, value in metrics.items()}
        line = {"step": step, "time": round(time.time(), 3), **figures}
        self._append(self._metrics, json.dumps(line, allow_nan=False) + "\n")
        self._track(lambda tracker: tracker.log(step, metrics))

    def _track(self, action: Callable[[Tracker], None]) -> None:
        """Whatever wandb raises costs no step and no exit code: it is said, and the run goes on without it."""
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker.drop()
            self._tracker = None
            self._display.say(
                f"WARNING: wandb failed ({type(error).__name__}: {' '.join(str(error).split())}); figures go to "
                "metrics.jsonl only from here on, which has all of them"
            )


def _exit_code(error: BaseException | None) -> int:
    """What the run is about to end with: 0, 75 where it stops after a save, 2 for a UserError, else 1."""
    if isinstance(error, Stopped):
        return STOPPED
    return DONE if error is None else BAD_INPUT if isinstance(error, UserError) else FAILED


def _shortened(text: str, most: int) -> str:
    """As JSON, so on one line whatever the model wrote; cut to `most` characters."""
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def _plain(value: float) -> float | None:
    """A number that JSON can hold: integers stay integers, NaN and infinities become null."""
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _keep_steps(path: Path, start_step: int, per_step: int = 1) -> list[dict[str, Any]]:
    """Drop the lines of steps after `start_step` from a file of them, and those of that step where they are fewer than
    `per_step`, as after a kill; returns the others.

    A run that starts at step 0 keeps nothing: it evaluates and logs everything again. A line that is no record of a
    step was cut off by a kill, and its step is done again; or the file was damaged, which is no reason not to train.
    """
    if not path.exists():
        return []
    lines: list[tuple[str, dict[str, Any]]] = []
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, int) and start_step > 0 and step <= start_step:
            lines.append((line.decode("utf-8") + "\n", entry))
    of_last = sum(entry["step"] == start_step for _, entry in lines)
    # Of earlier steps all were written, as many as there were prompts then.
    kept = [(text, entry) for text, entry in lines if entry["step"] < start_step or of_last >= per_step]
    atomic_io.write_text(path, "".join(text for text, _ in kept))
    return [entry for _, entry in kept]
