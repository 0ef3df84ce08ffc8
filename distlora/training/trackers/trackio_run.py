"""Log a run to Trackio: its local database, or what TRACKIO_SPACE_ID names. Imported by the tracker's thread.

Trackio's current run is a context variable, so each thread has one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distlora.system.exit_codes import DONE, STOPPED
from distlora.training.trackers.background import Client, TrackerStart


class TrackerRun(Client):
    """Run of Trackio, in the project tracker.project. Trackio has no status of a run."""

    def __init__(self, start: TrackerStart) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        project, stored = start.tracker.project, start.stored_id("trackio")
        self._run = trackio.init(
            project=project,
            name=start.run_dir.name,
            group=start.tracker.group,
            config=start.parameters(),
            resume="never",  # It would continue the newest run with this name; the id tells which.
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.last_steps: dict[str, int] = {}
        if stored is None:
            start.store_id("trackio", self._run.id)
        else:
            self._run.id = stored
            for line in SQLiteStorage.get_logs(project, run_id=stored):
                self.last_steps.update(dict.fromkeys(line, line["step"]))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(dict(figures), step=step)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table that an earlier start has not logged."""
        import pandas
        import trackio

        if step > self.last_steps.get(name, -1):
            self._run.log({name: trackio.Table(dataframe=pandas.DataFrame(rows, columns=list(columns)))}, step=step)

    def close(self, exit_code: int) -> None:
        """Report a failure as an alert, and flush."""
        import trackio

        if exit_code not in (DONE, STOPPED):
            self._run.alert("run failed", text=f"exit code {exit_code}", level=trackio.AlertLevel.ERROR)
        self._run.finish()
