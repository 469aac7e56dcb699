"""MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Literal

from megarl.config.logging import MlflowConfig
from megarl.metrics.sink import Rows, RunInfo, Sink, table
from megarl.run_directory import flatten

_PARAMS_PER_REQUEST = 100  # the server's limit
_LONGEST_PARAM = 6000  # characters


class MlflowSink(Sink):
    """An MLflow run that a resumed run continues; settings are its parameters, tables its artifacts."""

    def __init__(self, run: RunInfo, config: MlflowConfig) -> None:
        import mlflow
        from mlflow.entities import Metric, Param, RunStatus

        self._metric, self._finished = Metric, RunStatus.to_string(RunStatus.FINISHED)
        uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        home = run.directory.resolve()
        self._client = client = mlflow.MlflowClient(uri or f"sqlite:///{home / 'mlflow.db'}")
        found = client.get_experiment_by_name(config.experiment)
        files = None if uri else (home / "mlflow_files").as_uri()
        experiment = found.experiment_id if found else client.create_experiment(config.experiment, files)
        tag = f"{run.kept_id('mlflow')} {home}"
        known = client.search_runs([experiment], f"tags.megarl = '{tag}'")
        if known:
            self._id = known[0].info.run_id
            return
        self._id = client.create_run(
            experiment, run_name=config.name or run.name, tags={"megarl": tag}
        ).info.run_id
        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in flatten(run.config).items()]
        for start in range(0, len(params), _PARAMS_PER_REQUEST):
            client.log_batch(self._id, params=params[start : start + _PARAMS_PER_REQUEST])
        if uri and uri.startswith("http"):
            self.url = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._id}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values in one request."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def log_rows(self, kind: Literal["samples", "evaluations"], step: int, rows: Rows) -> None:
        """Store a table as an artifact."""
        columns, data = table(kind, rows)
        by_column = {name: [row[i] for row in data] for i, name in enumerate(columns)}
        self._client.log_table(self._id, by_column, f"{kind}/step_{step}.json")

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id, self._finished)
