"""Send a run's metrics to experiment trackers, beside RUN/metrics.jsonl, which has all of them.

Each tracker is one module with the client of its project, imported only when a run starts: a training node may lack it.
wandb has a process of its own (wandb_run.py). The calls of every other client run in a thread of their own
(background.py), so no step waits for a disk or a network. A tracker that fails says so once, and the run goes on.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distlora.config import TrackerConfig
from distlora.config.json_files import object_or_empty
from distlora.training.trackers.background import Background, Tracker, TrackerStart
from distlora.training.trackers.wandb_run import FINISH_SECONDS, start_wandb


class Trackers:
    """The trackers of a run."""

    def __init__(
        self,
        run_dir: Path,
        tracker: TrackerConfig,
        settings: Mapping[str, Any],
        *,
        start_step: int,
        say: Callable[[str], None],
    ) -> None:
        """Start the trackers that `tracker` names. `settings`: what they record, by section; the plan is added."""
        self._say, self._active = say, list[Tracker]()
        plan = object_or_empty(run_dir / "plan.json")
        plan.pop("settings", None)  # They are the run's.
        recorded = {**settings, **({"planned": plan} if plan else {})}
        start = TrackerStart(run_dir=run_dir, tracker=tracker, settings=recorded, start_step=start_step)
        self._active += [Background(name, start, say) for name in tracker.names if name != "wandb"]
        if "wandb" in tracker.names:  # Last: the others flush while its `close` waits.
            try:
                wandb_run = start_wandb(run_dir, tracker, recorded, say)
                self._active += [] if wandb_run is None else [wandb_run]
            except Exception as error:
                self._warn("wandb", error)

    def close(self, exit_code: int) -> None:
        """Report how the run ended. Wait FINISH_SECONDS at most for the threads to flush, all of them together."""
        deadline = time.monotonic() + FINISH_SECONDS
        self.each(lambda tracker: tracker.close(exit_code))
        self.each(lambda tracker: tracker.wait(deadline))

    def each(self, action: Callable[[Tracker], None]) -> None:
        """Call each tracker. One that raises is dropped, with one warning."""
        for tracker in tuple(self._active):
            try:
                action(tracker)
            except Exception as error:
                tracker.drop()
                self._active.remove(tracker)
                self._warn(tracker.name, error)

    def _warn(self, name: str, error: Exception) -> None:
        self._say(
            f"WARNING: {name} failed ({type(error).__name__}: {' '.join(str(error).split())}); figures go to "
            "metrics.jsonl only from now on, which has all of them"
        )
