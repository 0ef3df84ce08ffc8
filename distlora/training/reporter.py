"""Write a run's metrics to RUN/metrics.jsonl, to the trackers and to the terminal of rank 0.

Every rank constructs a `Reporter` and calls it alike; only rank 0 writes. A line of metrics.jsonl is `{"step": s,
"time": seconds since 1970, ...}` with the metrics of a training step or of a held-out evaluation (`eval_loss`); numbers
that JSON cannot hold (NaN, infinity) are null. Twenty lines of a mixture of experts also have `expert_tokens`
(run_folder/expert_load.py), the load of each expert in all steps so far. RUN/samples.jsonl holds generated samples,
`{"step", "prompt", "text"}`, and the best, worst and changed answers of evaluations with rewards, which also have
`category` and `reward`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from distlora.checkpoint.state import RunProgress
from distlora.config import Config, UserError
from distlora.config.file import as_mapping
from distlora.config.json_files import read_object
from distlora.run_folder.eval_documents import EVAL_DOCUMENTS_NAME, DocumentRecord, write_documents
from distlora.run_folder.expert_load import EXPERT_TOKENS, ExpertTokens
from distlora.system import atomic_io
from distlora.system.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED
from distlora.system.progress import Display
from distlora.system.stop_signals import STOPPED_NAME, Stopped
from distlora.training.trackers import Trackers


class Reporter:
    """Output of one run's metrics. As a context manager it closes the trackers with the run's exit code.

    Call `log` and `evaluation` in step order (trackers drop a lower step than the last). A resume first drops lines
    after `start_step`, so each step is in metrics.jsonl once, however often a run was killed.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        *,
        rank: int,
        world: int,
        total_steps: int,
        progress: RunProgress,
        label: str = "",
    ) -> None:
        """Open the files and the trackers. `progress`: that of the last save, now and at a stop.

        `label`: prefix of terminal lines, if several runs print there.
        """
        start_step, self._progress = progress.step, progress
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
        self._metrics.append("")  # So that the file exists from the start.
        path = run_dir / "samples.jsonl"
        sampled = _keep_steps(path, start_step, per_step=len(config.train.sample_prompts))
        self._samples = atomic_io.AppendedFile(path)
        self._sampled = {line["step"] for line in sampled}
        self._sample_images = config.train.sample_images
        self._disk_failed = False
        self._uploads = config.tracker.artifact
        (run_dir / STOPPED_NAME).unlink(missing_ok=True)
        self._held_out: dict[str, float] = {}
        self._display, self._total_steps = Display(total_steps, start_step, label), total_steps
        self._trackers = Trackers(
            run_dir, config.tracker, as_mapping(config) | {"world": world}, start_step=start_step, say=self._display.say
        )

    def log(
        self, step: int, metrics: Mapping[str, float], *, shown: bool = True, expert_tokens: ExpertTokens | None = None
    ) -> None:
        """Record the metrics of one training step (counted from 1). `shown`: it is the last that is logged now.

        `expert_tokens`: tokens of each expert in all steps so far, for metrics.jsonl alone.
        """
        if self._writes:
            self._record(step, metrics, {} if expert_tokens is None else {EXPERT_TOKENS: expert_tokens})
            if shown:
                self._display.step(step, {**metrics, **self._held_out})

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record held-out metrics (`eval_loss`, nats per token) after `step` steps. A repeated step adds no line."""
        if not self._writes or step in self._evaluated:
            return
        self._evaluated.add(step)
        self._record(step, metrics)
        if step > 0:  # The base's loss is not shown beside later steps.
            self._held_out = dict(metrics)
        self._display.evaluation(step, metrics)

    def documents(self, record: DocumentRecord) -> None:
        """Write the newest evaluation's losses by held-out document."""
        if not self._writes:
            return
        try:
            write_documents(self._run_dir, record)
        except OSError as error:
            self._display.say(f"WARNING: {EVAL_DOCUMENTS_NAME} could not be written to {self._run_dir} ({error})")

    def lacks_samples(self, step: int) -> bool:
        """Return whether this rank writes and has no samples of that step yet."""
        return self._writes and step not in self._sampled

    def samples(self, step: int, samples: Sequence[tuple[str, str]], notable: Sequence[Mapping[str, Any]] = ()) -> None:
        """Record samples after `step` steps: (prompt, text) pairs. A repeated step adds none.

        `notable`: the best, worst and changed answers of an evaluation (training/rollout_files.py).
        """
        if not self.lacks_samples(step):
            return
        self._sampled.add(step)
        lines = [{"step": step, "prompt": prompt, "text": text} for prompt, text in samples]
        images = self._sample_images or ("",) * len(lines)
        written = [line | ({"image": image} if image else {}) for line, image in zip(lines, images, strict=True)]
        written += [{"step": step, **answer} for answer in notable]
        self._append(self._samples, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written))
        for prompt, text in samples:
            self._display.say(f"after step {step}: {_shortened(prompt, 40)} -> {_shortened(text, 80)}")
        rows = [list(line.values()) for line in lines]
        self._trackers.each(lambda tracker: tracker.log_table(step, "samples", ["step", "prompt", "text"], rows))
        if notable:
            columns = ["category", "reward", "prompt", "text", "reward_before", "before"]
            answers = [[step, *map(answer.get, columns)] for answer in notable]
            self._trackers.each(lambda tracker: tracker.log_table(step, "answers", ["step", *columns], answers))

    def event(self, text: str) -> None:
        """Print one line, which is not kept with the metrics."""
        if self._writes:
            self._display.say(text)

    def summary(self, figures: Mapping[str, float | list[str]]) -> None:
        """Add final metrics and lists of names to RUN/summary.json (replaced atomically) and the trackers."""
        if not self._writes:
            return
        self._summary.update(
            {name: value if isinstance(value, list) else _plain(value) for name, value in figures.items()}
        )
        atomic_io.write_json(self._run_dir / "summary.json", self._summary)
        self._trackers.each(lambda tracker: tracker.summary(self._total_steps, self._summary))

    def result(self, folder: Path) -> None:
        """Upload the published folder to the trackers if tracker.artifact is set."""
        if self._writes and self._uploads:
            self._trackers.each(lambda tracker: tracker.result(folder))

    def close(self, exit_code: int) -> None:
        """Flush everything and tell the trackers how the run ended. A second call does nothing."""
        if not self._writes:
            return
        self._writes = False
        for file in (self._metrics, self._samples):
            try:
                file.close()
            except OSError as error:
                self._display.say(f"WARNING: the last figures were not written to {self._run_dir} ({error})")
        self._display.close()
        self._trackers.close(exit_code)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(_exit_code(error))

    def _append(self, file: atomic_io.AppendedFile, text: str) -> None:
        """Append to a file. If the disk fails, warn once, keep the lines in memory, and continue."""
        try:
            file.append(text)
            self._disk_failed = False
        except OSError as error:
            if not self._disk_failed:
                self._display.say(
                    f"WARNING: figures cannot be written to {self._run_dir} ({error.strerror or error}); they are kept "
                    "in memory until they can. Training continues"
                )
            self._disk_failed = True

    def _record(self, step: int, metrics: Mapping[str, float], more: Mapping[str, Any] | None = None) -> None:
        figures = {name: _plain(value) for name, value in metrics.items()}
        line = {"step": step, "time": round(time.time(), 3), **figures, **(more or {})}
        self._append(self._metrics, json.dumps(line, allow_nan=False) + "\n")
        self._trackers.each(lambda tracker: tracker.log(step, metrics))


def _exit_code(error: BaseException | None) -> int:
    """Return the run's exit code: 0, 75 for a stop after a save, 2 for a UserError, else 1."""
    if isinstance(error, Stopped):
        return STOPPED
    return DONE if error is None else BAD_INPUT if isinstance(error, UserError) else FAILED


def _shortened(text: str, most: int) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def _plain(value: float) -> float | None:
    """Return a number that JSON can hold: integers stay integers, NaN and infinities become None."""
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _keep_steps(path: Path, start_step: int, per_step: int = 1) -> list[dict[str, Any]]:
    """Drop a file's lines after `start_step`, and of that step if there are fewer than `per_step`. Return the others.

    A run that starts at step 0 keeps nothing, because it evaluates and logs everything again. An invalid line was cut
    off by a kill, and its step is repeated, or the file was damaged; neither prevents training.
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
    num_last = sum(entry["step"] == start_step for _, entry in lines)
    # Earlier steps are complete, with as many lines as there were prompts then.
    kept = [(text, entry) for text, entry in lines if entry["step"] < start_step or num_last >= per_step]
    atomic_io.write_text(path, "".join(text for text, _ in kept))
    return [entry for _, entry in kept]
