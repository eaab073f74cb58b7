"""`python -m training.evaluate_endpoint`: does a running service predict as well as its manifest says?

Sends every validation image of a data set to the service, one request each, as its file is, and compares the
accuracy with the manifest's, of the int8 network where that answers. Exit status: 0 when they agree, 1 when not.
"""

import argparse
import http.client
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from service.model.archive import model_folder
from service.model.artifact import open_artifact
from service.model.errors import ArtifactError
from service.model.images import MEDIA_TYPES
from service.model.manifest import Manifest
from training.command_line import listed, run_command
from training.data.dataset import Dataset, LabelledImages
from training.data.layouts import open_dataset
from training.errors import ConfigError, DataError, TrainingError
from training.progress import progress

log = logging.getLogger("training")

_ENGINE = re.compile(r'^classifier_model_info\{.*?engine="([^"]*)"', re.MULTILINE)

CONNECTIONS = 8
TIMEOUT_S = 70
"""Above the service's own deadline, so that its sentence arrives."""
TOLERANCE_POINTS, TOLERANCE_IMAGES = 0.2, 2
"""Accuracies that differ by no more than either agree: engines round differently, and near ties fall the other way."""
FEW_IMAGES = 50
"""Below, agreement says little."""
LATER = (429, 503)
"""Statuses that say: the same request may do well later."""
PATIENCE_S = 60
"""How long one image is asked for again, after the pauses that Retry-After names."""


def accuracy_over_http(images: LabelledImages, classes: Sequence[str], url: str) -> tuple[float, set[str]]:
    """Share of `images` whose first label from `POST url/invocations` is theirs, and the models that answered, as
    `name version X`. Raises: TrainingError.
    """
    host, port, path = _address(url)
    local = threading.local()
    connections: list[http.client.HTTPConnection] = []
    models: set[str] = set()

    def is_right(index: int) -> bool:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
            connections.append(local.connection)
        media_type = MEDIA_TYPES[Path(images.file_name(index)).suffix.lower()]
        try:
            status, body = _answer(local.connection, path, images.payload(index), media_type)
        except (OSError, http.client.HTTPException) as exc:
            raise TrainingError(
                f"{url} did not answer ({exc}); is the service running there? 'make serve' starts one."
            ) from exc
        if status != 200:
            said = body[:500].decode(errors="replace")
            raise TrainingError(f"{url} answered {status} to {images.file_name(index)}: {said}")
        try:
            answer = json.loads(body)
            label, model = answer["predictions"][0]["label"], answer["model"]
            models.add(_named(str(model["name"]), str(model["version"])))
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as exc:
            raise TrainingError(f"{url} is not this service: it answered {body[:100]!r}.") from exc
        return bool(label == classes[images.labels[index]])

    try:
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            right = sum(progress(threads.map(is_right, range(len(images))), "asking the service", total=len(images)))
    finally:
        for connection in connections:
            connection.close()
    return right / len(images), models


def engine_of(url: str) -> str:
    """What computes the answers, as the service's /metrics say; "" where they do not."""
    host, port, path = _address(url)
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", f"{path.removesuffix('/invocations')}/metrics")
        found = _ENGINE.search(connection.getresponse().read().decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
    return found[1] if found else ""


def _answer(connection: http.client.HTTPConnection, path: str, body: bytes, media_type: str) -> tuple[int, bytes]:
    """Status and body, asked for again where the service says later. Raises: OSError, http.client.HTTPException."""
    give_up_s = time.monotonic() + PATIENCE_S
    while True:
        connection.request("POST", path, body, {"Content-Type": media_type})
        response = connection.getresponse()
        answer = response.read()
        pause = response.headers.get("Retry-After", "")
        pause_s = max(1.0, float(pause) if pause.isdecimal() else 0.0)
        if response.status not in LATER or time.monotonic() + pause_s > give_up_s:
            return response.status, answer
        time.sleep(pause_s)


def _claimed(manifest: Manifest, engine: str) -> tuple[float, str]:
    """The accuracy in percent that the manifest states of what computes the answers, and where it states it."""
    if engine == "openvino-int8" and manifest.quantization is not None:
        return 100 * manifest.quantization.accuracy, "manifest, int8,"
    if not engine and manifest.quantization is not None:
        log.warning("the service's /metrics do not say what computes: compared with the float32 network, not with int8")
    return 100 * float(manifest.metrics["validation"]["accuracy"]), "manifest"


def _named(name: str, version: str) -> str:
    return f"{name} version {version}"


def _address(url: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", 80 if parts.port is None else parts.port
        host.encode("idna")  # UnicodeError is a ValueError
        if parts.scheme != "http" or not host or not port or not url.isascii() or " " in url:
            raise ValueError(url)
    except ValueError as exc:
        raise ConfigError(f"--url {url}: give the address of the service, such as http://127.0.0.1:8080.") from exc
    return host, port, f"{parts.path.rstrip('/')}/invocations"


def open_validation(manifest: Manifest, data: Path, validation: Path | None = None) -> Dataset:
    """The data set at `data`, split as it was for the training that `manifest` tells of. Raises: TrainingError."""
    trained = manifest.hyperparameters
    dataset = open_dataset(
        data,
        **{name: trained[name] for name in ("validation_fraction", "seed", "broken_files") if name in trained},
        validation_root=validation,
    )
    if dataset.facts["split"] != manifest.dataset["split"]:
        raise DataError(
            f"{data} gives another validation set ({dataset.facts['split']}) than the model's manifest tells of "
            f"({manifest.dataset['split']}); give the same --data and --validation as in training."
        )
    if dataset.classes != manifest.classes:
        raise DataError(
            f"{data} has the classes {listed(dataset.classes)}; the model's are {listed(manifest.classes)}."
        )
    return dataset


def _points(text: str) -> float:
    """A flag's number from 0 to 100. Raises: argparse.ArgumentTypeError."""
    with suppress(ValueError):
        if 0 <= (value := float(text)) <= 100:
            return value
    raise argparse.ArgumentTypeError(f"given {text}, allowed are numbers from 0 to 100")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate_endpoint", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the data set the model was trained on")
    parser.add_argument("--validation", type=Path, help="its folder to validate on, if --data does not hold it")
    parser.add_argument(
        "--model", type=Path, default=Path("artifacts/model"), help="its artifact (default: artifacts/model)"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the running service (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=_points,
        help=f"points of accuracy (default: {TOLERANCE_POINTS}, or {TOLERANCE_IMAGES} images if that is more)",
    )  # fmt: skip
    return run_command(parser, arguments, compare)


def compare(options: argparse.Namespace) -> None:
    """What the command does. Raises: TrainingError, also where service and manifest differ."""
    try:
        with model_folder(options.model) as folder:
            manifest = open_artifact(folder).manifest
    except ArtifactError as exc:
        raise DataError(str(exc)) from exc
    dataset = open_validation(manifest, options.data, options.validation)
    share, models = accuracy_over_http(dataset.validation, dataset.classes, options.url)
    measured, engine, n = 100 * share, engine_of(options.url), len(dataset.validation)
    claimed, stated = _claimed(manifest, engine)
    of = f" ({engine})" if engine else ""
    figures = f"accuracy over HTTP{of} {measured:.2f} %, {stated} {claimed:.2f} %, n={n}"
    if n < FEW_IMAGES:
        log.warning("%d images show little: %d of them may differ here", n, TOLERANCE_IMAGES)
    known = _named(manifest.name, manifest.version)
    if models - {known}:
        raise TrainingError(
            f"{figures}: not comparable, as the service answers with {', '.join(sorted(models))}, and {options.model} "
            f"is {known}; restart the service with it (it does not take up a folder that is replaced), or name the "
            "model that it serves."
        )
    tolerance = max(TOLERANCE_POINTS, 100 * TOLERANCE_IMAGES / n) if options.tolerance is None else options.tolerance
    if abs(measured - claimed) > tolerance + 1e-9:  # of two quotients
        raise TrainingError(f"{figures}: THEY DIFFER, by more than {tolerance:.3g} points (--tolerance).")
    log.info("%s: they agree", figures)


if __name__ == "__main__":
    sys.exit(main())
