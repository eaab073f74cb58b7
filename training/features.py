"""The feature cache: what the frozen blocks make of every image, computed once for all epochs and tuning trials.

    images -> views (flips, crops) -> frozen blocks -> features.bf16 (memory-mapped) -> batches for the trained blocks

A cache is a folder named by its key: a hash of the frozen weights, the preprocessing, the images, the views and the
engine. It holds `features.bf16`, bfloat16 `[V, N, h, w, C]`, and `facts.json` with its shape and the sha256 of every
64 MiB of it. The facts are written last; a folder without them, or whose bytes do not match them, is built anew.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.model import resize
from service.model.files import replace
from service.model.machine import cores
from service.model.network import Network
from training.data import augment
from training.data.dataset import LabelledImages
from training.data.loader import Loader
from training.errors import ConfigError, DataError
from training.prefix_engines import PrefixEngine
from training.progress import progress
from training.randomness import generator

log = logging.getLogger(__name__)

FORMAT = 2
CHUNK_BYTES = 64 * 2**20
FREE_BYTES = 2**30
"""What a cache leaves free on its disk."""


@dataclass(frozen=True)
class Views:
    """The ways in which each image is cached: `crops` shifted copies (0: the image as it is), each flipped or not."""

    flip: bool = False
    crops: int = 0

    def __len__(self) -> int:
        """V, the number of views."""
        return max(1, self.crops) * (2 if self.flip else 1)

    def make(self, view: int, images: Tensor, indices: Tensor) -> Tensor:
        """View number `view` of images uint8 `[n, S, S, 3]`, which stand at `indices` of their data set."""
        crop, flipped = divmod(view, 2) if self.flip else (view, 0)
        if self.crops:
            places = 2 * (images.shape[1] // augment.CROP_SHARE) + 1
            drawn = [torch.randint(places, (2,), generator=generator("cached crop", crop, i)) for i in indices.tolist()]
            images = augment.shift(images, torch.stack(drawn).to(images.device))
        return images.flip(2) if flipped else images


class FeatureCache:
    """Features of one set of images: bfloat16 `[V, N, h, w, C]`, mapped from a file."""

    def __init__(self, features: Tensor, labels: Tensor, views: Views, folder: Path) -> None:
        self.features = features
        self.labels = labels
        self.views = views
        self.folder = folder

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.labels)

    @property
    def size(self) -> int:
        """Bytes of the features."""
        return self.features.numel() * self.features.element_size()


def open_cache(root: Path, network: Network, loader: Loader, views: Views, engine: PrefixEngine) -> FeatureCache:
    """The features of the loader's images; computed now unless `root` holds them. `network` is in eval mode.

    Processes that want the same cache wait for the one that computes it. Raises: ConfigError (the disk), DataError.
    """
    key = _key(network, loader, views, engine)
    folder = root / key
    with _locked(root, key):
        features = _open(folder, len(views), len(loader))
        if features is None:
            started_s = time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            try:
                _require_space(root, _cache_bytes(network, loader, views))
                _build(folder, network, loader, views, engine)
                if _key(network, loader, views, engine) != key:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise DataError("The images changed while features were computed from them; start again.")
            except OSError as exc:
                shutil.rmtree(folder, ignore_errors=True)
                raise ConfigError(
                    f"The feature cache cannot be written to {root} ({exc.strerror}); --cache-folder names another "
                    "place, --feature-cache off does without."
                ) from exc
            features = _open(folder, len(views), len(loader))
            if features is None:
                raise ConfigError(f"The feature cache {folder} was changed from outside while it was written.")
            log.info(
                "feature cache: %d views of %d images, %s MB, computed by %s in %.1f s, in %s",
                len(views), len(loader), f"{features.nbytes / 1e6:,.1f}", engine.name,
                time.monotonic() - started_s, folder,
            )  # fmt: skip
        else:
            log.info("feature cache: %s MB found and verified in %s", f"{features.nbytes / 1e6:,.1f}", folder)
    return FeatureCache(features, loader.labels, views, folder)


def _cache_bytes(network: Network, loader: Loader, views: Views) -> int:
    """The size a cache of these images has."""
    height, width, channels = _feature_shape(network, loader.side_px)
    return len(views) * len(loader) * height * width * channels * 2


def _require_space(root: Path, size: int) -> None:
    """Raises: ConfigError when the disk of `root` has no room for `size` bytes more."""
    free = shutil.disk_usage(root).free
    if free < size + FREE_BYTES:
        raise ConfigError(
            f"The feature cache needs {size / 1e9:.1f} GB and 1 GB to spare, {root} has {free / 1e9:.1f} GB free; "
            "--cache-folder names another place, --feature-cache off does without."
        )


def frozen_digest(network: Network) -> str:
    """sha256 of the weights of the frozen blocks."""
    digest = hashlib.sha256()
    for module in network.frozen_modules():
        for tensor in module.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(images: LabelledImages) -> str:
    """sha256 of the images' bytes and labels, in order."""
    digest = hashlib.sha256(images.labels.tobytes())
    digest.update(images.digest())
    return digest.hexdigest()


def _key(network: Network, loader: Loader, views: Views, engine: PrefixEngine) -> str:
    digest = hashlib.sha256()
    frozen = [module for block in network.prefix for module in network.block_modules(block)]
    for tensor in (value for module in frozen for value in module.state_dict().values()):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(network.mean.cpu().numpy().tobytes() + network.std.cpu().numpy().tobytes())
    facts = [
        FORMAT, network.prefix, loader.side_px, views, augment.CROP_SHARE, engine.name,
        *(metadata.version(name) for name in resize.PACKAGES), fingerprint(loader.images),
    ]  # fmt: skip
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:32]


def _feature_shape(network: Network, side_px: int) -> tuple[int, int, int]:
    with torch.inference_mode():
        blank = torch.zeros(1, side_px, side_px, 3, dtype=torch.uint8, device=network.mean.device)
        _, channels, height, width = network.features(blank).shape
    return height, width, channels


def _build(folder: Path, network: Network, loader: Loader, views: Views, engine: PrefixEngine) -> None:
    folder.mkdir(parents=True)
    shape = (len(views), len(loader), *_feature_shape(network, loader.side_px))
    indices = torch.split(torch.arange(len(loader)), engine.batch_size)
    with (folder / "features.bf16").open("wb") as file:
        for view in range(len(views)):
            what = "feature cache" if len(views) == 1 else f"feature cache, view {view + 1} of {len(views)}"
            batches = zip(indices, loader.batches(indices), strict=True)
            for some, (images, _) in progress(batches, what, total=len(indices)):
                features = engine.run(views.make(view, images, some))  # [n, h, w, C]
                if not torch.isfinite(features).all():
                    raise ConfigError("The frozen blocks give features that are not finite: their weights are damaged.")
                file.write(features.contiguous().view(torch.int16).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    facts = {
        "format": FORMAT, "key": folder.name, "shape": shape, "engine": engine.name,
        "sha256": _chunk_hashes(folder / "features.bf16"),
    }  # fmt: skip
    replace(folder / "facts.json", json.dumps(facts).encode())


def _open(folder: Path, views: int, images: int) -> Tensor | None:
    """The features in `folder`, verified: None if there are none or not these (a folder may have been renamed)."""
    path = folder / "features.bf16"
    try:
        facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        shape = [int(length) for length in facts["shape"]]
        numel = 1
        for length in shape:
            numel *= length
        whole = facts["format"] == FORMAT and path.stat().st_size == 2 * numel
        if not whole or _chunk_hashes(path) != facts["sha256"]:
            raise ValueError("its bytes are not those that were written")
        if facts["key"] != folder.name or shape[:2] != [views, images]:
            raise ValueError("it is of other images, weights or views")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as exc:
        log.warning("The feature cache %s is damaged (%s): it is computed anew.", folder, exc)
        return None
    return torch.from_file(str(path), shared=False, size=numel, dtype=torch.bfloat16).view(shape)


def _chunk_hashes(path: Path) -> list[str]:
    size = path.stat().st_size

    def digest(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(CHUNK_BYTES)).hexdigest()

    with ThreadPoolExecutor(cores()) as threads:
        return list(threads.map(digest, range(0, size, CHUNK_BYTES)))


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    """Hold the lock of this cache; the operating system lets go of it with the process."""
    import fcntl

    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / f"{key}.lock").open("w")
    except OSError as exc:
        raise ConfigError(f"--cache-folder {root}: the folder cannot be written to ({exc.strerror}).") from exc
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("feature cache: another process computes it, waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
