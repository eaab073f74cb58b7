"""Pretrained weights for the network: ImageNet's through torchvision, or a file of the user's.

The class layers of the file are left out: they belong to other classes.
"""

import hashlib
import logging
import pickle
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import ResNet34_Weights
from torchvision.models._api import Weights

from service.model.network import Network
from training.download import downloading
from training.errors import WeightsError

log = logging.getLogger(__name__)

IMAGENET: Weights = ResNet34_Weights.IMAGENET1K_V1.value
ENDINGS = (".pth", ".pt", ".safetensors")


def load_pretrained(network: Network, source: str, imagenet: Weights = IMAGENET) -> str:
    """Load the backbone's weights from `source` ("imagenet", "none", a file, or a folder that holds one).

    Returns: what was loaded, for the manifest.
    Raises: WeightsError; the network is then as it was.
    """
    if source == "none":
        return "none"
    if source == "imagenet":
        state, origin = imagenet_state(imagenet), f"{imagenet.url}"
    else:
        path = _file(Path(source))
        state, origin = _read(path), path.name
    _load_backbone(network, state, origin)
    log.info("pretrained weights: %s", origin)
    return origin


def require_available(source: str, imagenet: Weights = IMAGENET) -> None:
    """Find out early whether `load_pretrained` will have its file; downloads ImageNet's. Raises: WeightsError."""
    if source == "imagenet":
        imagenet_state(imagenet)
    elif source != "none":
        _file(Path(source))


def imagenet_state(imagenet: Weights = IMAGENET) -> dict[str, Tensor]:
    """torchvision's ImageNet weights: from its cache, else downloaded with progress; verified either way.

    Raises: WeightsError saying what to fetch by hand and where to put it.
    """
    path, prefix = cached_imagenet(imagenet), _hash_prefix(imagenet)
    # torchvision checks what it downloads, but not what it finds in its cache.
    if path.exists() and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(prefix):
        raise WeightsError(f"{path} is damaged or another file: its sha256 does not begin as its name says; delete it.")
    with downloading("The ImageNet weights", _by_hand(path, imagenet), WeightsError):
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(  # what torchvision's own loading calls
            imagenet.url, progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    return state


def cached_imagenet(imagenet: Weights = IMAGENET) -> Path:
    """Where torchvision keeps the ImageNet weights (TORCH_HOME decides)."""
    name: str = imagenet.url.rsplit("/", 1)[-1]
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _hash_prefix(imagenet: Weights) -> str:
    """The first digits of the file's sha256, which torchvision puts into its name."""
    match = re.search(r"-([0-9a-f]{8,})\.", imagenet.url.rsplit("/", 1)[-1])
    if match is None:
        raise WeightsError(f"{imagenet.url} has no hash in its name, so the file cannot be verified.")
    return match[1]


def _by_hand(path: Path, imagenet: Weights) -> str:
    return (
        f"Fetch {imagenet.url} on a machine that has network and put it at {path}, "
        "or give its path as --weights; --weights none trains everything from random weights."
    )


def _file(path: Path) -> Path:
    """`path` itself, or the one weights file in it (a SageMaker channel is a folder)."""
    if path.is_file():
        return path
    if path.is_dir():
        files = [entry for entry in sorted(path.iterdir()) if entry.suffix in ENDINGS]
        if len(files) == 1:
            return files[0]
        raise WeightsError(f"{path} holds {len(files)} weights files ({', '.join(ENDINGS)}), it must hold one.")
    raise WeightsError(
        f"--weights {path}: there is no such file; give imagenet, none, or a {' or '.join(ENDINGS)} file."
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:  # its text advises to load the file without that guard
        raise WeightsError(
            f"{path} cannot be read as weights (it is damaged, or holds more than tensors, which is not loaded); "
            "give a state dict of ResNet-34."
        ) from exc
    except Exception as exc:  # torch and safetensors raise many kinds; all mean that the file is no such file
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise WeightsError(f"{path} cannot be read as weights ({reason}); give a state dict of ResNet-34.") from exc
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WeightsError(f"{path} is not a state dict (names to tensors); save model.state_dict().")
    return state


def _load_backbone(network: Network, state: dict[str, Tensor], origin: str) -> None:
    mine = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    given = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    missing = [name for name in mine if name not in given and not name.endswith("num_batches_tracked")]
    shapes = [name for name in mine if name in given and given[name].shape != mine[name].shape]
    foreign = [name for name in given if name not in mine]
    for problem, names in (("lacks", missing), ("has other shapes for", shapes), ("has unknown", foreign)):
        if names:
            raise WeightsError(
                f"{origin} is not ResNet-34's: it {problem} {', '.join(names[:3])} ({len(names)} in all)."
            )
    network.load_state_dict(given, strict=False)
