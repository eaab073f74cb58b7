"""Which image a step uses: the one given, else the one that `make push` noted in artifacts/image.json."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from training.errors import ConfigError
from training.launch.amis import IMAGE_CUDA, has_gpu

PUSHED = Path("artifacts/image.json")
"""Written by `make push`: {"train": {"uri", "cuda", ...}, "serve": ..., "serve-cpu": ...}."""
FORM = '{"train": {"uri": "...", "cuda": "13.0"}, ...}'
PUSH = "make image TARGET={0} && make push TARGET={0}"
"""What brings an image there. Each can one thing: `serve` and `serve-cpu` refuse `train`."""

ECR = re.compile(r"(\d{12})\.dkr\.ecr\.([\w-]+)\.amazonaws\.com(?:\.cn)?/([^:@]+)(?:[:@](.+))?")
"""An image's address: account, region, repository, and tag or digest. SageMaker pulls from nowhere else."""

Target = Literal["train", "serve", "serve-cpu"]


@dataclass(frozen=True)
class Image:
    """An image in ECR."""

    uri: str
    cuda: tuple[int, int] | None
    """What its libraries are built for; None: it has none."""
    known: bool = True
    """Whether that was noted; else it is taken to be as in ours."""


def image_for(target: Target, given: str | None, pushed: Path = PUSHED) -> Image:
    """The image to use for `target`. Raises: ConfigError where none is given and none was pushed, or what is given is
    none.
    """
    if given:
        if not ECR.fullmatch(given):
            raise ConfigError(
                f"--image {given} is not in ECR, where SageMaker pulls from: give the URI of one there, such as "
                f"123456789012.dkr.ecr.eu-central-1.amazonaws.com/NAME:TAG; `{PUSH.format(target)}` brings one."
            )
        return _noted(given, pushed) or Image(given, None if target == "serve-cpu" else IMAGE_CUDA, known=False)
    try:
        entry = json.loads(pushed.read_bytes())[target]
        return Image(str(entry["uri"]), _version(entry.get("cuda")))
    except FileNotFoundError as exc:
        raise ConfigError(
            f"--image is missing: give the URI of one in ECR, or `{PUSH.format(target)}` first."
            f"{_without_docker(target)}"
        ) from exc
    except KeyError as exc:
        raise ConfigError(
            f"--image is missing, and {pushed} has no {target} with a uri: give a URI, or `{PUSH.format(target)}` "
            f"first.{_without_docker(target)}"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"{pushed} cannot be read ({exc.strerror}); mend that, or give --image.") from exc
    except (ValueError, TypeError) as exc:
        raise ConfigError(
            f"{pushed} is not as `make push` writes it, {FORM}: `{PUSH.format(target)}` again, or give --image."
        ) from exc


def _noted(uri: str, pushed: Path) -> Image | None:
    """The image, where `pushed` has this very one, for whatever target."""
    try:
        entries = [entry for entry in json.loads(pushed.read_bytes()).values() if entry["uri"] == uri]
        return Image(uri, _version(entries[0].get("cuda"))) if entries else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # nobody asked for that file
        return None


def require_region(image: Image, region: str) -> None:
    """Raises: ConfigError where the image is in another region than what is to pull it."""
    found = ECR.fullmatch(image.uri)
    if found and found[2] != region:
        raise ConfigError(f"The image {image.uri} is in {found[2]}, and jobs and endpoints in {region}: push it there.")


def _without_docker(target: Target) -> str:
    """What does without an image of ours; nothing does for hosting."""
    if target != "train":
        return ""
    return " Without docker: --image URI --send-code, with the URI of AWS's PyTorch training image."


def note(uris: Mapping[str, str], pushed: Path = PUSHED) -> None:
    """Note images that others pushed, as `make push` notes its own; those noted for other targets stay.

    Raises: ConfigError where a target is unknown.
    """
    unknown = sorted(uris.keys() - set(get_args(Target)))
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: images are for {', '.join(get_args(Target))}.")
    try:
        noted = json.loads(pushed.read_bytes()) if pushed.exists() else {}
        cuda = ".".join(map(str, IMAGE_CUDA))
        noted |= {target: {"uri": uri, "cuda": None if target == "serve-cpu" else cuda} for target, uri in uris.items()}
        pushed.parent.mkdir(parents=True, exist_ok=True)
        pushed.write_text(f"{json.dumps(noted, indent=2)}\n")
    except (OSError, ValueError, TypeError) as exc:
        raise ConfigError(
            f"{pushed} cannot be read or written ({getattr(exc, 'strerror', None) or f'it is not {FORM}'})."
        ) from exc


def hosting_target(kind: str, instance: str) -> Target:
    """The image for CPUs is a tenth of the other and starts sooner; a GPU needs CUDA's."""
    return "serve" if kind != "serverless" and has_gpu(instance) else "serve-cpu"


def _version(text: Any) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", str(text or ""))
    return (int(found[1]), int(found[2])) if found else None
