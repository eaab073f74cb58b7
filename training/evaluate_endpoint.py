"""`python -m training.evaluate_endpoint`: does a running service predict as well as its manifest says?

Sends every validation image of a data set to the service, one request each, as its file is, and compares the
accuracy with the manifest's. Exit status: 0 when they agree within --tolerance points, 1 when not.
"""

import argparse
import http.client
import json
import logging
import mimetypes
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from service.model.artifact import Manifest, open_artifact
from service.model.errors import ArtifactError
from training.config import TrainingConfig
from training.data.dataset import Dataset, LabelledImages
from training.errors import ConfigError, DataError, TrainingError
from training.progress import progress
from training.run import open_dataset
from training.train_model import configure_logging

log = logging.getLogger("training")

CONNECTIONS = 8
TIMEOUT_S = 70
"""Above the service's own deadline, so that its sentence arrives."""


def accuracy_over_http(images: LabelledImages, classes: Sequence[str], url: str) -> float:
    """Share of `images` whose first label from `POST url/invocations` is theirs. Raises: TrainingError."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"--url {url}: give the address of the service, such as http://127.0.0.1:8080.")
    local = threading.local()

    def is_right(index: int) -> bool:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=TIMEOUT_S)
        media_type = mimetypes.guess_type(images.file_name(index))[0] or "application/octet-stream"
        try:
            local.connection.request("POST", "/invocations", images.payload(index), {"Content-Type": media_type})
            response = local.connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as exc:
            raise TrainingError(
                f"{url} did not answer ({exc}); is the service running? Start it with 'make serve'."
            ) from exc
        if response.status != 200:
            raise TrainingError(f"{url} answered {response.status} to {images.file_name(index)}: {body.decode()}")
        return bool(json.loads(body)["predictions"][0]["label"] == classes[images.labels[index]])

    with ThreadPoolExecutor(CONNECTIONS) as threads:
        right = sum(progress(threads.map(is_right, range(len(images))), "asking the service", total=len(images)))
    return right / len(images)


def open_validation(manifest: Manifest, data: Path) -> Dataset:
    """The data set at `data`, split as it was for the training that `manifest` tells of. Raises: TrainingError."""
    names = ("seed", "validation_fraction", "broken_files")
    split = {name: manifest.hyperparameters[name] for name in names if name in manifest.hyperparameters}
    dataset = open_dataset(TrainingConfig.create({**split, "data": data, "output": os.devnull}))
    if dataset.classes != manifest.classes:
        raise DataError(f"{data} has other classes than the model: {', '.join(dataset.classes[:5])}, ...")
    return dataset


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate_endpoint", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the data set the model was trained on")
    parser.add_argument(
        "--model", type=Path, default=Path("artifacts/model"), help="its artifact (default: artifacts/model)"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the running service (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.2, help="points of accuracy (default: %(default)s)")
    options = parser.parse_args(arguments)
    configure_logging()
    try:
        manifest = open_artifact(options.model).manifest
        dataset = open_validation(manifest, options.data)
        measured = 100 * accuracy_over_http(dataset.validation, dataset.classes, options.url)
    except (TrainingError, ArtifactError) as exc:
        log.error("%s", exc)
        return 1
    claimed = 100 * manifest.metrics["validation"]["accuracy"]
    agrees = abs(measured - claimed) <= options.tolerance
    log.info(
        "accuracy over HTTP %.2f %%, manifest %.2f %%, n=%d: %s",
        measured, claimed, len(dataset.validation), "they agree" if agrees else "THEY DIFFER",
    )  # fmt: skip
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
