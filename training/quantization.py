"""float32 network -> int8 network for OpenVINO, and how well the two agree: quantization after training.

    weights -> OpenVINO graph | nncf: what range each activation has on some training images | int8 graph, as bytes
    those bytes, read back -> logits of every validation image | against the float32 logits -> Quantization

The service runs int8 by default where that costs no accuracy; the figures decide, whatever they are. nncf and OpenVINO
are imported when there is something to quantize, not before.
"""

import contextlib
import importlib.util
import io
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from service.model.architecture import Architecture
from service.model.artifact import Artifact, Int8Network, SelfCheck, Weights, add_int8
from service.model.errors import ArtifactError
from service.model.machine import cores
from service.model.manifest import INT8_MAX_LOSS_POINTS, Quantization
from service.model.openvino_graph import build, core, no_telemetry
from service.model.preprocess import Preprocessing
from service.model.resize import PixelBatch
from service.model.small_maps import flatten_small_maps
from training.config import Quantize
from training.data.dataset import LabelledImages, Labels
from training.data.loader import Loader
from training.errors import ConfigError, QuantizationError, TrainingError
from training.progress import progress

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 300
"""nncf's own default. With 100 or 1,000 the agreement is the same within what one network differs from the next."""

PIXELS_AT_ONCE = 32 * 224 * 224
"""Pixels of a batch: bounds the memory that activations take. The result does not depend on it."""

PACKAGES = ("nncf", "openvino")

Logits = npt.NDArray[np.float32]


def wanted(mode: Quantize) -> bool:
    """Whether a run shall end with an int8 network; where it could not, `auto` says in the log what is missing.

    Raises: ConfigError where the mode is `on` and nncf or OpenVINO cannot be imported.
    """
    if mode == "on":
        require("--quantize auto trains without.")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None] if mode == "auto" else []
    if missing:
        log.info(
            "int8: %s cannot be imported, so the artifact will hold the float32 network alone; "
            "`uv sync --inexact --group training` installs it, `python -m training.quantize` adds int8 afterwards",
            " and ".join(missing),
        )
    return mode != "off" and not missing


def require(otherwise: str = "") -> None:
    """Raises: ConfigError where nncf or OpenVINO cannot be imported; `otherwise`: what could be done instead."""
    try:
        _import_nncf()
    except ImportError as exc:
        raise ConfigError(
            f"int8 needs nncf and openvino, which cannot be imported ({exc}): `uv sync --inexact --group training` "
            f"installs both. {otherwise}".rstrip()
        ) from exc


def add_quantized(
    artifact: Artifact, train: Loader, validation: Loader, logits: Logits, labels: Labels,
    count: int = CALIBRATION_IMAGES,
) -> Artifact:  # fmt: skip
    """Give `artifact` its int8 network; weights, version and everything else stay.

    Args:
        train: of these images, `count` calibrate.
        validation: the images of `logits`, float32 `[N, K]` of the float32 network, and `labels`, int64 `[N]`.

    Raises: QuantizationError; the artifact is then as it was.
    """
    manifest = artifact.manifest
    try:
        int8 = int8_network(
            artifact.weights(), manifest.architecture, manifest.preprocessing, train, validation, logits, labels,
            artifact.self_check(), count,
        )  # fmt: skip
        return add_int8(artifact, int8, {name: metadata.version(name) for name in PACKAGES})
    except OSError as exc:
        raise QuantizationError(
            f"The int8 network cannot be written ({exc.strerror}); {artifact.folder} is as it was."
        ) from exc
    except (ArtifactError, TrainingError) as exc:
        raise QuantizationError(f"The int8 network could not be made: {exc}") from exc
    except Exception as exc:  # nncf and OpenVINO raise what they like; whoever waits for the artifact has it
        reason = " ".join(str(exc).split())[:300] or "no reason given"
        raise QuantizationError(f"The int8 network could not be made ({type(exc).__name__}: {reason}).") from exc


def int8_network(
    weights: Weights, architecture: Architecture, preprocessing: Preprocessing, train: Loader, validation: Loader,
    logits: Logits, labels: Labels, self_check: SelfCheck, count: int = CALIBRATION_IMAGES,
) -> Int8Network:  # fmt: skip
    """Quantize the network of `weights` and measure it. For the arguments see `add_quantized`.

    Raises: QuantizationError, DataError, OSError, ImportError, and what nncf and OpenVINO raise.
    """
    started_s = time.monotonic()
    calibration = Calibration(train, count)
    log.info("int8: calibrating on %d training images", calibration.count)
    with _quiet():
        method, model = quantized(build(architecture, preprocessing, weights), calibration)
        graph, constants = _serialized(model)
    run = _compiled(graph, constants)
    agreement, accuracy = _compare(run, validation, logits, labels)
    found = Quantization(
        method=method,
        calibration_images=calibration.count,
        n=len(labels),
        top1_agreement=agreement,
        accuracy=accuracy,
        accuracy_float32=float((logits.argmax(1) == labels).mean()),
        self_check_difference=self_check.difference(run(self_check.inputs)),
    )
    log.info("int8: %s; it took %.1f s", described(found), time.monotonic() - started_s)
    if found.doubt is not None:
        level = logging.WARNING if found.loss_points > INT8_MAX_LOSS_POINTS else logging.INFO
        log.log(level, "int8: %s; the service runs it only with CLASSIFIER_ENGINE=openvino-int8", found.doubt)
    return Int8Network(graph, constants, found)


def described(found: Quantization) -> str:
    """The figures in words."""
    return (
        f"{100 * found.top1_agreement:.2f} % of n={found.n} validation images get the class that float32 gives; "
        f"accuracy {100 * found.accuracy:.2f} %, {0.0 - found.loss_points:+.2f} points"
    )


class Calibration:
    """Training images as evaluation sees them, in batches, decoded anew in each pass: nncf may make several."""

    def __init__(self, train: Loader, count: int) -> None:
        """Up to `count` images of `train`, spread evenly over all, and so over the classes."""
        self.count = min(count, len(train))
        self._images: LabelledImages = train.images
        self._side_px = train.side_px
        self._batches = torch.split(train.spread_indices(count), _batch_size(train.side_px))

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[PixelBatch]:
        """Batches uint8 `[n, S, S, 3]`. Raises: DataError."""
        for indices in progress(self._batches, "int8: calibrating, batch", total=len(self)):
            yield np.stack([self._images.resized(i, self._side_px) for i in indices.tolist()])


def quantized(model: Any, calibration: "Calibration | Sequence[PixelBatch]") -> tuple[str, Any]:
    """Quantize an openvino.Model, calibrated on batches uint8 `[n, S, S, 3]` that are as many as `len` says.

    Returns: how, for the manifest, and the int8 model. Raises: ImportError, and what nncf raises.

    What each choice gives, as top-1 agreement with float32, largest difference of a logit relative to the largest
    logit, and accuracy (float32: 71.08, 71.18, 46.74 %); CIFAR-10 as JPEG files, n=5,000 validation images, three
    networks trained from random weights, two at 32 px and one at 64 px; nncf 3.4, OpenVINO 2026.4, an EPYC with VNNI:

        nncf's defaults (ranges: mean of the images' extremes, bias correction)
                                              97.28 %, 0.41, 70.94   97.36 %, 0.42, 71.04   93.72 %, 0.40, 46.28
        MIXED, else as above                  96.84 %, 0.41, 70.78   97.06 %, 0.42, 70.88   93.30 %, 0.40, 46.26
        ranges: extremes of all images        97.74 %, 0.05, 70.76   98.12 %, 0.06, 71.14   93.96 %, 0.06, 46.58
        that, without bias correction: this   98.28 %, 0.03, 71.14   98.40 %, 0.06, 71.10   98.06 %, 0.03, 46.98
        this with MIXED                       98.22 %, 0.03, 70.92                          98.06 %, 0.03, 46.64
        this, weights in 7 bits everywhere    98.06 %, 0.03, 70.88                          98.18 %, 0.04, 46.82
        this, first convolution in float32    98.22 %, 0.03, 70.86                          98.24 %, 0.04, 46.70

    (bfloat16 on the same networks: 99.80, 99.72, 99.66 %.) A mean of extremes clips the images that stand out. Bias
    correction shifts each channel by its mean error on the calibration images, which is noise where a channel's map
    is a few pixels. The slower bias correction changed nothing (96.74 against 96.54 % on a fourth network), and
    SmoothQuant is for transformers: nncf leaves it out here by itself.
    """
    nncf = _import_nncf()
    core()  # before nncf makes cores of its own
    advanced = nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params=nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX,
        disable_bias_correction=True,
        batchwise_statistics=True,  # the batch is the first axis throughout: what single images would give
    )
    made = nncf.quantize(
        model,
        nncf.Dataset(calibration),
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(calibration),  # counts batches
        advanced_parameters=advanced,
    )
    return f"nncf {nncf.__version__}: performance, activations min-max, no bias correction", made


def _serialized(model: Any) -> tuple[bytes, bytes]:
    """XML and weights. The same network gives the same bytes, and they tell nothing of this machine.

    Raises: QuantizationError when the temporary folder is full.
    """
    with no_telemetry():
        import openvino

    # Without nncf's notes in its rt_info. Names that OpenVINO makes up count on from model to model.
    plain = openvino.Model(model.get_results(), model.get_parameters(), model.get_friendly_name())
    for number, node in enumerate(plain.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result"):
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
    with tempfile.TemporaryDirectory(prefix="int8-") as folder:
        path = Path(folder, "int8.xml")
        try:
            openvino.save_model(plain, path, compress_to_fp16=False)
        except RuntimeError as exc:
            raise QuantizationError(f"it cannot be written into {folder} ({exc}); free space or set TMPDIR.") from exc
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def _compiled(graph: bytes, weights: bytes) -> Any:
    """The function uint8 `[n, S, S, 3]` -> float32 `[n, K]` of a serialized model."""
    model = core().read_model(graph, weights)
    flatten_small_maps(model)  # as the service does
    compiled = core().compile_model(
        model, "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": cores()},
    )  # fmt: skip

    def run(batch: PixelBatch) -> Logits:
        logits = np.asarray(compiled(batch)[0])
        if not np.isfinite(logits).all():
            raise QuantizationError("its logits are not finite numbers.")
        return logits

    return run


def _compare(run: Any, validation: Loader, logits: Logits, labels: Labels) -> tuple[float, float]:
    """One pass over the validation images: the share that `run` gives the class of `logits`, and its accuracy."""
    size = _batch_size(validation.side_px)
    same = right = start = 0
    batches = validation.in_order(size)
    for images, _ in progress(batches, "int8: validating, batch", total=math.ceil(len(validation) / size)):
        rows = slice(start, start := start + len(images))
        predicted = run(images.cpu().numpy()).argmax(1)
        same += int((predicted == logits[rows].argmax(1)).sum())
        right += int((predicted == labels[rows]).sum())
    assert start == len(labels) == len(logits), (start, len(labels), len(logits))
    return same / start, right / start


def _batch_size(side_px: int) -> int:
    return max(1, min(64, PIXELS_AT_ONCE // side_px**2))


def _import_nncf() -> Any:
    """nncf, imported without its side effects: it reports over the network, replaces the class of loggers, warns.

    Raises: ImportError.
    """
    loggers = logging.getLoggerClass()
    try:
        with no_telemetry(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("openvino")
            return importlib.import_module("nncf")
    finally:
        logging.setLoggerClass(loggers)


QUIET: Mapping[str, int] = {"nncf": logging.ERROR, "torch.utils.cpp_extension": logging.ERROR}
"""Loggers that tell of nncf's inner steps and, as it imports parts of torch, of a missing CUDA compiler."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and lines of nncf, which do not know our log."""
    before = {name: logging.getLogger(name).level for name in QUIET}
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # log handlers keep their stream
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
