"""TensorBoard's files and MLflow's store hold what happened; neither can end a run."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from training.debugging.configuration import create_rules
from training.debugging.mlflow_log import MlflowLog
from training.debugging.observer import Observer
from training.debugging.tensorboard import TensorBoardLog


def test_scalars_and_histograms_can_be_read_back(train: Any, small: Any, points: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLog(scalar_interval=2, histogram_interval=5)
    run = train(small(), points(100), [logger], epochs=2)
    events = EventAccumulator(str(run.folder / "tensorboard"), {"histograms": 0}).Reload()
    losses = events.Scalars("batch/loss")
    assert [event.step for event in losses] == list(range(1, 11))  # a short run has a point at every step
    assert [event.value for event in losses] == pytest.approx(run.losses)
    assert [event.step for event in events.Scalars("epoch/validation_accuracy")] == [5, 10]
    assert [event.step for event in events.Histograms("gradients/hidden.weight")] == [5, 10]
    assert "weights/bn.bias" in events.Tags()["histograms"]
    assert [event.step for event in events.Histograms("activations/relu")] == [5, 10]
    assert events.Histograms("activations/relu")[0].histogram_value.min == 0


def test_tensorboard_has_the_rules_verdicts_as_text(train: Any, small: Any, points: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(small(), points(200), [Observer(1, create_rules()), TensorBoardLog()], learning_rate=0.0)
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()

    def told(rule: str) -> str:
        (event,) = events.Tensors(f"rules/{rule}/text_summary")
        return str(event.tensor_proto.string_val[0].decode())

    assert told("DeadRelu") == "NoIssuesFound"
    assert told("UnchangedTensor").startswith("IssuesFound\n\nstep 22, ")


def test_mlflow_gets_settings_metrics_and_verdicts(
    train: Any, small: Any, points: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the one store that is quick to make
    uri = (tmp_path / "mlruns").as_uri()
    observer = Observer(10, create_rules())
    logger = MlflowLog(uri, experiment="tests", interval=2, observer=observer)
    run = train(small(), points(200), [observer, logger], epochs=6, learning_rate=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        kept = client.get_run(str(logger.run_id))
        losses = client.get_metric_history(str(logger.run_id), "batch_loss")
        norms = client.get_metric_history(str(logger.run_id), "gradient/Small_hidden.weight/l2")
    assert kept.info.status == "FINISHED"
    assert kept.data.params["learning_rate"] and kept.data.params["epochs"] == "6"
    assert [metric.step for metric in losses] == list(range(2, 61, 2))
    assert [metric.value for metric in losses] == pytest.approx(run.losses[1::2])
    assert [metric.step for metric in norms] == [1, *range(10, 61, 10)] and norms[0].value > 0
    assert {"weight/Small_bn.bias/l2", "activation_output/relu_output_0/zeros"} <= set(kept.data.metrics)
    assert kept.data.tags["rule.UnchangedTensor"] == "IssuesFound"
    assert kept.data.tags["rule.DeadRelu"] == "NoIssuesFound"


def test_a_server_that_fails_costs_one_warning(
    train: Any, small: Any, points: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "file").write_text("not a folder")
    logger = MlflowLog(f"{(tmp_path / 'file').as_uri()}/mlruns", interval=1)
    with caplog.at_level(logging.WARNING, "training"):
        run = train(small(), points(100), [logger], epochs=2)
    assert len(run.losses) == 10
    assert len([record for record in caplog.records if "MLflow" in record.getMessage()]) == 1


def test_importing_the_modules_imports_no_optional_package() -> None:
    modules = "observer, configuration, verdicts, trial, smdebug_hook, tensorboard, mlflow_log"
    code = (
        f"import sys\nfrom training.debugging import {modules}\n"
        "heavy = {'smdebug', 'mlflow', 'tensorboard', 'matplotlib', 'optuna', 'psutil', 'openvino'}\n"
        "raise SystemExit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
