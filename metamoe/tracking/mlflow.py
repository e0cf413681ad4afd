"""MLflow: a run of the experiment ``metamoe``, at MLFLOW_TRACKING_URI or in the run folder's ``mlflow.db``."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from metamoe.simulations.benchmark.tables import table
from metamoe.tracking import Outcome

_EXPERIMENT = "metamoe"
FAILURES = (MlflowException, OSError)
_AT_ONCE = 100
"""Parameters that a server takes in one request."""
_MILLISECONDS = 1000


class MLflow:
    """A run at a tracking server, or in a file."""

    def __init__(self, client: MlflowClient, run: str) -> None:
        self.id = run
        self._client = client

    def number(self, name: str, value: float, step: int, when: float) -> None:
        """A point of a curve."""
        self._client.log_metric(self.id, name, value, timestamp=int(when * _MILLISECONDS), step=step)

    def outcome(self, outcome: Outcome) -> None:
        """What the run has come to."""
        self._client.set_tag(self.id, "model", outcome.model)
        self._client.log_batch(self.id, metrics=[Metric(name, value, 0, 0) for name, value in outcome.numbers.items()])
        for name, (header, rows) in outcome.tables.items():
            self._client.log_text(self.id, "\n".join(table(header, rows)) + "\n", f"{name}.md")
        for name, png in outcome.pictures.items():
            self._client.log_stream(self.id, io.BytesIO(png), f"{name}.png")
        if outcome.page:
            self._client.log_artifact(self.id, str(outcome.page))

    def close(self) -> None:
        """The run has ended."""
        self._client.set_terminated(self.id)


def open_run(folder: Path, settings: Mapping[str, Any], known: str | None) -> MLflow:
    """The run with a known id, if the server has it, or a new one with these parameters."""
    elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(elsewhere or f"sqlite:///{folder / 'mlflow.db'}")
    if known and _has(client, known):
        client.update_run(known, status="RUNNING")
        return MLflow(client, known)
    found = client.get_experiment_by_name(_EXPERIMENT)
    artifacts = None if elsewhere else (folder / "mlflow").as_uri()
    experiment = found.experiment_id if found else client.create_experiment(_EXPERIMENT, artifact_location=artifacts)
    run = client.create_run(experiment, run_name=folder.name).info.run_id
    params = [Param(name, str(value)) for name, value in settings.items()]
    for start in range(0, len(params), _AT_ONCE):
        client.log_batch(run, params=params[start : start + _AT_ONCE])
    return MLflow(client, run)


def _has(client: MlflowClient, run: str) -> bool:
    try:
        return client.get_run(run).info.lifecycle_stage == "active"
    except MlflowException:
        return False
