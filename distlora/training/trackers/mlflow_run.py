"""Log a run to MLflow: to MLFLOW_TRACKING_URI, else to mlflow.db beside the run folder. Imported by its thread."""

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distlora.system.exit_codes import DONE, STOPPED
from distlora.training.trackers.background import Client, TrackerStart

_MOST_PARAMETERS, _MOST_CHARACTERS = 100, 6000
"""MLflow's limits: parameters in a call, and characters of a value."""


class TrackerRun(Client):
    """Run of MLflow, in the experiment tracker.project."""

    def __init__(self, start: TrackerStart) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # Telemetry is the user's choice.
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        for name in ("mlflow", "alembic"):  # They report each table of a new database.
            logging.getLogger(name).setLevel(logging.WARNING)
        beside = start.run_dir.parent
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            uri, artifacts = f"sqlite:///{beside / 'mlflow.db'}", (beside / "mlartifacts").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self.last_steps: dict[str, int] = {}
        stored = start.stored_id("mlflow")
        if stored is not None:
            try:
                self._id = self._continue(stored)
            except MlflowException as error:  # The run was logged to another server, or deleted there.
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                stored = None
        if stored is None:
            tags = dict.fromkeys(start.tracker.tags, "true")
            experiment = self._experiment(start.tracker.project, artifacts)
            self._id = self._client.create_run(experiment, run_name=start.run_dir.name, tags=tags).info.run_id
            start.store_id("mlflow", self._id)
            # MLflow refuses another value of a parameter, and a resume may have another number of ranks.
            parameters = [
                Param(re.sub(r"[^\w./ -]", "_", name), str(value)[:_MOST_CHARACTERS])
                for name, value in start.parameters().items()
            ]
            for first in range(0, len(parameters), _MOST_PARAMETERS):
                self._client.log_batch(self._id, params=parameters[first : first + _MOST_PARAMETERS])
        self.place = f"run {self._id} at {uri}" + (
            f"; show it with `mlflow ui --backend-store-uri {uri}`" * bool(artifacts)
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the metrics of a step by one call."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Upload the rows as NAME/step_S.json, which a repeated step replaces."""
        table = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._client.log_dict(self._id, table, f"{name}/step_{step}.json")

    def result(self, folder: Path) -> None:
        """Upload the published folder as artifacts of the run."""
        self._client.log_artifacts(self._id, str(folder), folder.name)

    def close(self, exit_code: int) -> None:
        """Set the run's status: KILLED if it can be resumed."""
        self._client.set_tag(self._id, "exit_code", exit_code)
        status = {DONE: "FINISHED", STOPPED: "KILLED"}.get(exit_code, "FAILED")
        self._client.set_terminated(self._id, status)

    def _continue(self, run_id: str) -> str:
        """Continue a run: MLflow keeps what an earlier start logged."""
        for name in self._client.get_run(run_id).data.metrics:
            self.last_steps[name] = max(point.step for point in self._client.get_metric_history(run_id, name))
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _experiment(self, name: str, artifacts: str | None) -> str:
        """Return the id of an experiment, which is created if there is none of that name."""
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except MlflowException:  # Another run has just created it.
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)
