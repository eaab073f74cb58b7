"""Smoke test: does the live service predict what the model predicts here? Real images, both ways, compared."""

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from service.model.artifact import open_artifact
from service.model.errors import ImageError
from service.model.images import MEDIA_TYPES, decode
from service.model.resize import decode_resized
from training.errors import ConfigError, DataError
from training.launch.client import Target, classify, content_of
from training.launch.errors import LaunchError

log = logging.getLogger("training")

TOLERANCE = 0.1
"""Largest difference of a probability: the endpoint may compute in int8, bfloat16 or float16, here it is float32."""


def local_probabilities(folder: Path, paths: Sequence[Path]) -> npt.NDArray[np.float32]:
    """What the artifact's float32 network gives here: `[N, K]`."""
    import torch  # takes seconds

    from service.model.network import network_of

    artifact = open_artifact(folder)
    side_px = artifact.manifest.preprocessing.side_px
    batch = np.stack([decode_resized(path.read_bytes(), side_px) for path in paths])  # [N, S, S, 3]
    network = network_of(artifact).eval()
    with torch.inference_mode():
        probs = torch.softmax(network(torch.from_numpy(batch)).float(), 1)  # [N, K]
    found: npt.NDArray[np.float32] = probs.numpy()
    return found


def require_images(paths: Sequence[Path]) -> None:
    """Each can be read and decoded here: asked before an endpoint costs. Raises: ConfigError."""
    for path in paths:
        try:
            decode(content_of(path))
        except (ImageError, DataError, OSError) as exc:
            raise ConfigError(
                f"--smoke {path}: {getattr(exc, 'strerror', None) or exc}; give images that can be read."
            ) from exc


def compare(target: Target, folder: Path, paths: Sequence[Path] = (), tolerance: float = TOLERANCE) -> int:
    """Send images to `target` and compare with the artifact in `folder`; without `paths`, its example.

    A likeliest class may be another one only where the two are as likely as each other within the tolerance.

    Returns: how many images agreed. Raises: LaunchError naming the first that did not.
    """
    artifact = open_artifact(folder)
    with TemporaryDirectory(prefix="smoke-") as scratch:
        asked = list(paths) or [_example(folder, Path(scratch))]
        here = local_probabilities(folder, asked)
        for outcome, probs in zip(classify(target, asked, concurrency=2), here, strict=True):
            if outcome.problem:
                raise LaunchError(f"{target.name} does not answer {outcome.path.name}: {outcome.problem}")
            served = outcome.model.get("version")
            if served != artifact.manifest.version:
                raise LaunchError(f"{target.name} serves version {served}, not {artifact.manifest.version}.")
            for said in outcome.predictions:
                expected = float(probs[said["index"]])
                if abs(said["probability"] - expected) > tolerance:
                    raise LaunchError(
                        f"{target.name} gives {outcome.path.name} as {said['label']} with {said['probability']:.3f}, "
                        f"here it is {expected:.3f}: more than {tolerance} apart. Is its engine sound?"
                    )
            first = outcome.predictions[0]
            if float(probs.max() - probs[first["index"]]) > tolerance:
                raise LaunchError(
                    f"{target.name} takes {outcome.path.name} for {first['label']}, here it is "
                    f"{artifact.manifest.classes[int(probs.argmax())]}."
                )
    log.info(
        "%s predicts as this machine does (%d images, probabilities within %g)", target.name, len(asked), tolerance
    )
    return len(asked)


def _example(folder: Path, scratch: Path) -> Path:
    artifact = open_artifact(folder)
    kind = artifact.manifest.example.media_type
    ending = next((suffix for suffix, media_type in MEDIA_TYPES.items() if media_type == kind), ".png")
    path = scratch / f"example{ending}"
    path.write_bytes(artifact.read("example"))
    return path
