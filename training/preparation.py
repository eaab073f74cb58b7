"""What trainings share: the data, and cached features where the settings allow them."""

import logging
from dataclasses import dataclass

import torch

from service.model.architecture import Architecture
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.config import TrainingConfig
from training.data.dataset import Dataset
from training.data.layouts import open_dataset, require_layout
from training.data.loader import Loader
from training.data.sides import hint
from training.devices import computes_in_bf16, pick_device, set_up_torch
from training.distributed import ALONE, Group
from training.errors import ConfigError
from training.features import Views, open_cache
from training.prefix_engines import choose_engine
from training.pretrained import load_pretrained, require_available
from training.sources import FeatureSource

log = logging.getLogger(__name__)


@dataclass
class Prepared:
    """What trainings that differ in learning rate, batch size and epochs share: data and cached features."""

    dataset: Dataset
    train: Loader
    validation: Loader
    device: torch.device
    bf16: bool
    features: tuple[FeatureSource, FeatureSource] | None
    """Cached features to train on and to validate on; None where the plain loop runs."""


def prepare(config: TrainingConfig, group: Group = ALONE, device: torch.device | None = None) -> Prepared:
    """Open the data and, where the settings allow it, compute or find the cached features. Raises: TrainingError."""
    device = device or pick_device(config.device, group)
    require_layout(config.data, config.validation)  # before the weights, whose download may take long, or fail
    require_available(config.weights)  # before the images, whose decoding may take long
    set_up_torch(config)
    dataset = open_dataset(
        config.data,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        broken_files=config.broken_files,
        validation_root=config.validation,
    )
    if group.is_first:
        log.info(
            "data: %s, %d classes, %d images to train on, %d to validate on",
            dataset.name, len(dataset.classes), len(dataset.train), len(dataset.validation),
        )  # fmt: skip
        said = None if "side" in config.model_fields_set else hint(dataset.train, config.side)
        if said:
            log.warning("%s", said)
    train = Loader(dataset.train, config.side, config.loader_workers, "train", device, group.local_world_size)
    validation = Loader(
        dataset.validation, config.side, config.loader_workers, "validation", device, group.local_world_size
    )
    bf16 = computes_in_bf16(config, device)
    features = _features(config, dataset, train, validation, device, bf16)
    return Prepared(dataset, train, validation, device, bf16, features)


def new_network(config: TrainingConfig, dataset: Dataset) -> tuple[Network, str]:
    """A network with its initial weights, and where those came from."""
    architecture = Architecture(
        num_classes=len(dataset.classes), hidden_units=config.hidden_units, frozen=config.frozen
    )
    network = Network(architecture, Preprocessing(side_px=config.side))
    pretrained = load_pretrained(network, config.weights)
    return network, pretrained


def _features(
    config: TrainingConfig, dataset: Dataset, train: Loader, validation: Loader, device: torch.device, bf16: bool
) -> tuple[FeatureSource, FeatureSource] | None:
    """Cached features for training and validation; None, and why in the log, where the plain loop runs."""
    reason = config.plain_reason()
    if config.feature_cache == "off" or reason:
        if reason:
            log.info("feature cache: not used, as %s", reason)
        return None
    torch.manual_seed(config.seed)  # the frozen blocks that `fit` will make
    network = new_network(config, dataset)[0].eval()
    crops = config.cache_crops if config.augment == "flip-crop" else 0
    views = Views(flip=config.augment != "none", crops=crops)
    engine = choose_engine(network, device, bf16)
    try:
        caches = [
            open_cache(config.cache_folder, network, loader, some, engine)
            for loader, some in ((train, views), (validation, Views()))
        ]
    except ConfigError as exc:  # no room, or no permission
        if config.feature_cache == "on":
            raise
        log.warning("feature cache: not used. %s", exc)
        return None
    train.release()
    return FeatureSource(caches[0], device), FeatureSource(caches[1], device)
