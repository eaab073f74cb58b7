"""TensorBoard's files and MLflow's store hold what happened; neither can end a run."""

import errno
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    assert told("Overtraining") == "not judged: judges from step 70 on, the run had 40"
    assert told("UnchangedTensor").startswith("IssuesFound\n\nstep 22, ")


@pytest.mark.parametrize("written", [0, 9])
def test_a_full_disk_costs_tensorboard_one_warning_and_its_thread_no_traceback(
    train: Any, small: Any, points: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    taken: list[bytes] = []

    def write(_: RecordWriter, record: bytes) -> None:
        taken.append(record)
        if len(taken) > written:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", write)
    before = threading.excepthook
    run = train(small(), points(200), [Observer(1, create_rules()), TensorBoardLog(histogram_interval=1)])
    assert (len(run.losses), run.error, threading.excepthook) == (40, None, before)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == ["tensorboard: nothing more can be written (No space left on device); the run goes on without"]


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


@contextmanager
def mlflow_server() -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """A server that knows nothing and says so; its address, and the requests with their headers."""
    asked: list[tuple[str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            body = b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}'
            self.send_response(400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("arn", ["arn:aws:sagemaker:eu-central-1:123456789012:mlflow-app/app-1", None])
def test_sagemakers_mlflow_is_asked_in_its_name_and_other_servers_as_ever(
    arn: str | None,
) -> None:
    pytest.importorskip("sagemaker_mlflow", reason="the group mlflow is not installed")
    script = (
        "import logging, sys\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "from types import SimpleNamespace\n"
        "from training.debugging.mlflow_log import MlflowLog\n"
        "MlflowLog(sys.argv[1]).on_run_start(SimpleNamespace())\n"
    )
    with mlflow_server() as (url, asked):
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        done = subprocess.run(
            [sys.executable, "-c", script, arn or url], capture_output=True, text=True, check=True,
            env={**os.environ, **keys, "SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT": url},
        )  # fmt: skip
    (path, headers), *_ = asked
    assert "experiments/get-by-name" in path
    assert headers.get("x-sm-mlflow-app-arn") == arn
    assert ("AWS4-HMAC-SHA256" in headers.get("authorization", "")) == (arn is not None)
    assert done.stderr.count("WARNING") == 1 and "nothing more is sent" in done.stderr, done.stderr


def test_importing_the_modules_imports_no_optional_package() -> None:
    modules = "observer, configuration, verdicts, smdebug_files, smdebug_hook, tensorboard, mlflow_log"
    code = (
        f"import sys\nfrom training.debugging import {modules}\n"
        "heavy = {'smdebug', 'mlflow', 'tensorboard', 'matplotlib', 'optuna', 'psutil', 'openvino'}\n"
        "raise SystemExit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
