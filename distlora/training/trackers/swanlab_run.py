"""Log a run to SwanLab: online with a key, else in RUN/swanlab. Imported by the tracker's thread.

SwanLab has one run per process. It drops repeated steps of a continued run itself.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from distlora.system.exit_codes import DONE, STOPPED
from distlora.training.trackers.background import Client, TrackerStart


class TrackerRun(Client):
    """Run of SwanLab, in the project tracker.project."""

    def __init__(self, start: TrackerStart) -> None:
        import swanlab

        settings = swanlab.Settings(
            interactive=False,
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
            probe=swanlab.Settings.Probe(requirements=False, git=False),
        )
        mode: Any = os.environ.get("SWANLAB_MODE") or ("offline" if settings.api_key is None else "online")
        options: dict[str, Any] = {
            "log_dir": str(start.run_dir / "swanlab"),
            "project": start.tracker.project,
            "workspace": start.tracker.entity,
            "name": start.run_dir.name,
            "group": start.tracker.group,
            "tags": list(start.tracker.tags),
            "id": start.stored_id("swanlab"),
            "resume": "allow",
            "config": dict(start.settings),
            "settings": settings,
        }
        try:
            self._run = swanlab.init(mode=mode, **options)
        except Exception as error:
            if mode != "online":
                raise
            self.place = f"cannot log online ({' '.join(str(error).split())}); logging offline"
            self._run = swanlab.init(mode="offline", **options)
        start.store_id("swanlab", self._run.id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(dict(figures), step=step)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a text per row."""
        import swanlab

        texts = ["\n".join(f"{column}: {cell}" for column, cell in zip(columns, row, strict=True)) for row in rows]
        self._run.log({name: [swanlab.Text(text) for text in texts]}, step=step)

    def close(self, exit_code: int) -> None:
        """Report how the run ended: `aborted` if it can be resumed."""
        if exit_code in (DONE, STOPPED):
            self._run.finish("success" if exit_code == DONE else "aborted")
        else:
            self._run.finish("crashed", error=f"exit code {exit_code}")
