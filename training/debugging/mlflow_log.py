"""MLflow: settings, metrics by step and the rules' verdicts go to a tracking server (or SageMaker's MLflow).

So do figures of the weights, gradients and activations that an observer saw; MLflow has no histograms.

What the server does must not end training: at its first failure there is one warning, and nothing more is sent.
"""

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from training.callbacks import Callback, RunContext, Step, StopTraining
from training.debugging import verdicts
from training.debugging.observations import Observation
from training.debugging.observer import Observer
from training.epoch_metrics import EpochMetrics

log = logging.getLogger(__name__)

FIGURES = {
    "weight": ("l2", "update_ratio"), "gradient": ("l2", "mean_abs"),
    "activation_input": ("mean", "std"), "activation_output": ("mean", "zeros"),
}  # fmt: skip
"""What is sent of each kind of observation."""
MAX_METRICS = 1000
"""MLflow takes no more in a request."""
MAX_PARAM_CHARACTERS = 6000
"""MLflow refuses longer values."""


class MlflowLog(Callback):
    """Sends a run to `tracking_uri` ("http://host:5000", an ARN of SageMaker's MLflow, "sqlite:///mlflow.db")."""

    def __init__(
        self,
        tracking_uri: str,
        experiment: str = "resnet34",
        run_name: str | None = None,
        interval: int = 50,
        observer: Observer | None = None,
    ) -> None:
        """`interval`: steps between batch metrics; each is a request of some milliseconds that training waits for.

        `observer`: told before this one; at the steps that it observes, figures of what it saw are sent.
        """
        self._uri, self._experiment, self._run_name, self._interval = tracking_uri, experiment, run_name, interval
        self._observer = observer
        self._client: Any = None
        self.run_id: str | None = None
        """MLflow's id of the run, once it has started."""
        self._last_step = 0

    def on_run_start(self, context: RunContext) -> None:
        """See `Callback`."""
        self._context = context
        self._try(lambda: self._start(context))

    def on_step_end(self, step: Step) -> None:
        """See `Callback`."""
        self._last_step = step.number
        if self._client is not None and step.number % self._interval == 0:
            figures = {
                "batch_loss": step.loss, "batch_accuracy": step.accuracy, "learning_rate": step.learning_rate,
            }  # fmt: skip
            self._try(lambda: self._metrics(figures, step.number))
        seen = self._observer.latest if self._observer is not None else []
        if self._client is not None and seen and seen[0].step == step.number:
            self._try(lambda: self._metrics(tensor_metrics(seen), step.number))

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        """See `Callback`."""
        names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "epoch")
        self._try(lambda: self._metrics({name: getattr(metrics, name) for name in names}, self._last_step))

    def on_run_end(self, error: BaseException | None) -> None:
        """See `Callback`."""
        self._try(lambda: self._end(error))

    def _start(self, context: RunContext) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of mlflow's imports (pydantic, sqlalchemy)
                from mlflow import MlflowClient, set_tracking_uri
                from mlflow.entities import Param
        except ImportError:
            log.info("mlflow is not installed: nothing is sent to it (uv sync --inexact --group mlflow).")
            return
        if self._uri.startswith("arn:"):
            set_tracking_uri(self._uri)  # sagemaker-mlflow signs requests for this one, not for the client's
        else:
            _mute_sagemaker()
        client = MlflowClient(self._uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._experiment)
        self.run_id = client.create_run(experiment, run_name=self._run_name or context.config.model_name).info.run_id
        settings = context.config.model_dump(mode="json")
        client.log_batch(
            self.run_id, params=[Param(name, str(value)[:MAX_PARAM_CHARACTERS]) for name, value in settings.items()]
        )
        self._client = client

    def _metrics(self, figures: dict[str, float], step: int) -> None:
        if self._client is None:
            return
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        entries = [Metric(name, float(value), now_ms, step) for name, value in figures.items()]
        for start in range(0, len(entries), MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=entries[start : start + MAX_METRICS])

    def _end(self, error: BaseException | None) -> None:
        if self._client is None:
            return
        from mlflow.entities import RunTag

        path = self._context.folder / verdicts.FILE
        if path.exists():
            rules = json.loads(path.read_text(encoding="utf-8"))["rules"]
            tags = [RunTag(f"rule.{entry['rule']}", verdicts.told(entry)) for entry in rules]
            self._client.log_batch(self.run_id, tags=tags)
        self._client.set_terminated(
            self.run_id, "FINISHED" if error is None or isinstance(error, StopTraining) else "FAILED"
        )

    def _try(self, action: Callable[[], None]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # mlflow's own
                action()
        except Exception as exc:  # noqa: BLE001  # a server can fail in any way; the log line hands it on
            log.warning("MLflow at %s failed, nothing more is sent to it: %s", self._uri, exc)
            self._client = None


def tensor_metrics(seen: Sequence[Observation]) -> dict[str, float]:
    """The finite ones of FIGURES, named as `gradient/Network_layer4.0.conv1.weight/l2`."""
    return {
        f"{observation.kind}/{observation.name.removeprefix('gradient/')}/{figure}": observation.stats[figure]
        for observation in seen
        for figure in FIGURES.get(observation.kind, ())
        if math.isfinite(observation.stats.get(figure, math.nan))
    }


def _mute_sagemaker() -> None:
    """sagemaker-mlflow 0.5 takes any server for one of SageMaker's, and mlflow warns of that at each request."""
    logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)
