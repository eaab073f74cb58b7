"""The feature cache: training from it equals training from images; what is damaged or foreign is never trained on."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from service.model import resize
from service.model.architecture import Architecture
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training import features, prefix_engines
from training.callbacks import Callback, Step
from training.config import TrainingConfig
from training.data import augment
from training.data.dataset import ArrayImages
from training.data.loader import Loader, fits_on
from training.errors import ConfigError
from training.features import FeatureCache, Views, open_cache
from training.prefix_engines import PrefixEngine
from training.randomness import Draws, generator
from training.run import Prepared, fit, prepare
from training.sources import FeatureSource, StepPlan

CPU = torch.device("cpu")
Settings = Callable[..., TrainingConfig]
Launch = Callable[..., subprocess.Popen[bytes]]
SAME_LOSS = 0.04
"""Relative: features are kept in bfloat16, 8 bits of mantissa, and batch norm over nine near-equal images enlarges the
difference."""
SAME_LOSS_OF_FIFTY = 0.01
"""Relative, in batches of 50 of the sample. Seen: 3e-4; 3e-3 in bfloat16, which OpenVINO and autocast round in."""
SAME_BUT_ROUNDING = 1e-5
"""Relative, when the plain run rounds its features too. Seen: 0."""


class Losses(Callback):
    """Collects what the loop says of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, list[int]]] = []

    def on_step_end(self, step: Step) -> None:
        self.steps.append((step.loss, step.labels.tolist()))


def small_network(seed: int = 0, side: int = 32, **preprocessing: tuple[float, float, float]) -> Network:
    torch.manual_seed(seed)
    frozen = ("stem", "layer1", "layer2", "layer3")
    network = Network(
        Architecture(num_classes=3, hidden_units=4, frozen=frozen), Preprocessing(side_px=side, **preprocessing)
    )
    return network.eval()


def array_images(seed: int = 0, count: int = 10, labels: int = 3) -> ArrayImages:
    rng = np.random.default_rng(seed)
    return ArrayImages(rng.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count, dtype=np.int64) % labels)


class Counted(NamedTuple):
    engine: PrefixEngine
    batches: list[int]


@pytest.fixture
def counted() -> Counted:
    """torch's engine, and the sizes of the batches it ran."""
    batches: list[int] = []
    network = small_network()
    engine = prefix_engines._torch(network, CPU, "fp32")

    def run(images: Tensor) -> Tensor:
        batches.append(len(images))
        return engine.run(images)

    return Counted(PrefixEngine(engine.name, 4, run), batches)


def opened(root: Path, engine: PrefixEngine, **changes: Any) -> FeatureCache:
    network = changes.get("network") or small_network()
    loader = Loader(changes.get("images") or array_images(), changes.get("side", 32), 0, "some")
    return open_cache(root, network, loader, changes.get("views") or Views(flip=True), engine)


# Training from it -----------------------------------------------------------------------------------------------


def use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "training.preparation.choose_engine",
        lambda network, device, bf16: prefix_engines._torch(network, device, "bf16" if bf16 else "fp32"),
    )


def both_ways(settings: Settings, **values: object) -> tuple[Losses, Losses]:
    """The steps of the same training from images and from the cache."""
    seen = []
    for cache in ("off", "on"):
        config = settings(feature_cache=cache, **values)
        prepared = prepare(config)
        assert (prepared.features is not None) == (cache == "on")
        seen.append(Losses())
        fit(config, prepared, [seen[-1]])
    plain, cached = seen
    assert len(plain.steps) == 8
    assert [labels for _, labels in plain.steps] == [labels for _, labels in cached.steps]
    return plain, cached


@pytest.mark.parametrize("augmentation", ["none", "flip"])
@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_cached_and_plain_training_make_the_same_steps(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, augmentation: str, engine: str
) -> None:
    if engine == "torch":
        use_torch(monkeypatch)
    plain, cached = both_ways(settings, augment=augmentation, learning_rate=1e-3)
    assert [loss for loss, _ in cached.steps] == pytest.approx([loss for loss, _ in plain.steps], rel=SAME_LOSS)


def test_in_batches_of_fifty_cached_and_plain_losses_agree_within_one_percent(
    settings: Settings, sample_root: Path
) -> None:
    plain, cached = both_ways(settings, data=sample_root, batch_size=50, side=16, augment="flip", learning_rate=1e-3)
    losses = [[loss for loss, _ in way.steps] for way in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=SAME_LOSS_OF_FIFTY)


def test_in_bfloat16_as_the_recipes_have_it_cached_and_plain_losses_agree(
    settings: Settings, sample_root: Path
) -> None:
    plain, cached = both_ways(
        settings, data=sample_root, batch_size=50, side=32, augment="flip", learning_rate=1e-3, precision="bf16"
    )
    losses = [[loss for loss, _ in way.steps] for way in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=SAME_LOSS_OF_FIFTY)


@pytest.mark.parametrize("augmentation", ["none", "flip"])
def test_but_for_the_rounding_of_features_the_steps_are_equal(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, augmentation: str
) -> None:
    use_torch(monkeypatch)
    exact = Network.features
    monkeypatch.setattr(Network, "features", lambda self, batch: exact(self, batch).bfloat16().float())
    plain, cached = both_ways(settings, augment=augmentation)
    assert [loss for loss, _ in cached.steps] == pytest.approx([loss for loss, _ in plain.steps], rel=SAME_BUT_ROUNDING)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"freeze": "none"}, "the stem is trained"),
        ({"freeze": "layer1"}, "the stem is trained"),
        ({"mixup": 0.2}, "mixup and cutmix blend images"),
        ({"augment": "rand"}, "RandAugment changes images anew each epoch"),
        ({"augment": "flip-crop"}, "crops are drawn anew each epoch (--cache-crops N caches N of them)"),
    ],
)
def test_what_cannot_be_cached_trains_from_images_and_says_why(
    settings: Settings, caplog: pytest.LogCaptureFixture, changes: dict[str, str], reason: str
) -> None:
    caplog.set_level(logging.INFO)
    config = settings(feature_cache="auto", epochs=1, side=16, **changes)
    prepared = prepare(config)
    assert prepared.features is None
    assert f"feature cache: not used, as {reason}" in caplog.messages
    assert not config.cache_folder.exists()
    assert fit(config, prepared).history[0].train_loss > 0
    with pytest.raises(ConfigError, match="--feature-cache on is not possible"):
        settings(feature_cache="on", **changes)


def test_where_every_block_begins_to_be_trained_the_log_says_that_images_are_used(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = settings(feature_cache="on", unfreeze_at=2, epochs=3, side=16)
    fit(config, prepare(config))
    said = [line for line in caplog.messages if "from images from here on" in line]
    assert said == ["epoch 2: trained from images from here on, as cached features are of frozen blocks"]


def test_cached_crops_are_trained_from(settings: Settings) -> None:
    config = settings(feature_cache="on", augment="flip-crop", cache_crops=3, epochs=1)
    prepared = prepare(config)
    assert prepared.features is not None
    (shape,) = [p for p in config.cache_folder.glob("*/facts.json") if json.loads(p.read_text())["shape"][0] == 6]
    assert shape.is_file()
    assert fit(config, prepared).history[0].train_loss > 0


# Views ----------------------------------------------------------------------------------------------------------


def test_flipped_views_are_mirrored_images_and_crops_are_shifts_by_an_eighth() -> None:
    images = torch.from_numpy(array_images(count=6).pixels)
    indices = torch.tensor([4, 0, 1, 9, 5, 3])
    assert torch.equal(Views().make(0, images, indices), images)
    assert torch.equal(Views(flip=True).make(1, images, indices), images.flip(2))
    views = Views(flip=True, crops=3)
    assert (len(Views()), len(Views(flip=True)), len(Views(crops=3)), len(views)) == (1, 2, 3, 6)
    made = [views.make(view, images, indices) for view in range(6)]
    for crop in range(3):
        assert torch.equal(made[2 * crop + 1], made[2 * crop].flip(2))
        for position, index in enumerate(indices.tolist()):
            offset = torch.randint(9, (2,), generator=generator("cached crop", crop, index))
            shifted = augment.shift(images[position : position + 1], offset[None])[0]
            assert torch.equal(made[2 * crop][position], shifted)
    assert not torch.equal(made[0], made[2])


def test_a_crop_of_an_image_does_not_depend_on_the_batch_it_is_in() -> None:
    images = torch.from_numpy(array_images(count=4).pixels)
    together = Views(crops=2).make(1, images, torch.arange(4))
    for i in range(4):
        alone = Views(crops=2).make(1, images[i : i + 1], torch.tensor([i]))
        assert torch.equal(alone[0], together[i])


def test_the_cache_holds_the_features_of_every_view(tmp_path: Path, counted: Counted) -> None:
    cache = opened(tmp_path, counted.engine)
    assert (cache.features.shape, cache.features.dtype) == ((2, 10, 2, 2, 256), torch.bfloat16)
    images = torch.from_numpy(array_images().pixels)
    for view, batch in enumerate((images, images.flip(2))):
        with torch.inference_mode():
            expected = small_network().features(batch).permute(0, 2, 3, 1)
        torch.testing.assert_close(cache.features[view].float(), expected, rtol=0.01, atol=0.01)
    assert cache.labels.tolist() == array_images().labels.tolist()
    assert cache.size == 2 * 10 * 2 * 2 * 256 * 2


@pytest.mark.parametrize("bf16", [False, True])
def test_openvino_gives_what_torch_gives(backbone: Path, bf16: bool) -> None:
    network = small_network()
    state = {k: v for k, v in torch.load(backbone, weights_only=True).items() if not k.startswith("fc.")}
    network.load_state_dict(state, strict=False)
    images = torch.from_numpy(array_images(count=5).pixels)
    there = prefix_engines._openvino(network, bf16).run(images)
    here = prefix_engines._torch(network, CPU, "fp32").run(images)
    assert there.dtype == torch.bfloat16
    scale = float(here.float().std())
    atol = 0.15 if bf16 else 0.02
    torch.testing.assert_close(there.float() / scale, here.float() / scale, rtol=0.05 if bf16 else 0.01, atol=atol)


def test_in_half_precision_features_are_those_of_float32_but_for_the_rounding_of_bfloat16(backbone: Path) -> None:
    network = small_network()
    state = {k: v for k, v in torch.load(backbone, weights_only=True).items() if not k.startswith("fc.")}
    network.load_state_dict(state, strict=False)
    images = torch.from_numpy(array_images(count=5).pixels)
    half = prefix_engines._torch(network, CPU, "fp16").run(images).float()
    full = prefix_engines._torch(network, CPU, "fp32").run(images).float()
    assert not torch.equal(half, full)
    torch.testing.assert_close(half / full.std(), full / full.std(), rtol=2**-7, atol=0.02)


def test_features_beyond_float16_are_computed_in_float32(backbone: Path) -> None:
    network = small_network()
    with torch.no_grad():
        network.bn1.weight.mul_(1e6)
    images = torch.from_numpy(array_images(count=2).pixels)
    half = prefix_engines._torch(network, CPU, "fp16").run(images)
    assert half.isfinite().all() and half.abs().max() > 65_504
    assert torch.equal(half, prefix_engines._torch(network, CPU, "fp32").run(images))


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_on_a_gpu_the_pass_is_in_half_precision(monkeypatch: pytest.MonkeyPatch, bf16: bool, precision: str) -> None:
    chosen: list[tuple[object, ...]] = []
    monkeypatch.setattr(prefix_engines, "_torch", lambda *arguments: chosen.append(arguments))
    network, gpu = small_network(), torch.device("cuda")
    prefix_engines.choose_engine(network, gpu, bf16)
    assert chosen == [(network, gpu, precision)]


def test_features_lie_in_the_memory_of_a_gpu_where_they_fit(
    tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`meta` stands for the GPU: tensors there have a place and a shape, and no values."""
    gpu, cache = torch.device("meta"), opened(tmp_path, counted.engine)
    plan = StepPlan(torch.tensor([3, 0]), Draws(("test",), 2, slice(None), gpu))
    for fits in (True, False):
        monkeypatch.setattr("training.sources.fits_on", lambda device, size, fits=fits: fits and size == cache.size)
        source = FeatureSource(cache, gpu)
        assert (source._features.device == gpu) == fits
        if fits:
            (inputs, labels), *_ = source.training_batches([plan])
            assert (inputs.device, labels.device, inputs.shape) == (gpu, gpu, (2, 256, 2, 2))


def test_what_fits_is_up_to_the_stated_share_of_a_gpus_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    assert fits_on(torch.device("cuda"), 400) and not fits_on(torch.device("cuda"), 401)
    assert not fits_on(CPU, 1)


# The first pass shows how far it is -----------------------------------------------------------------------------


def test_the_first_pass_shows_its_progress_in_lines(
    tmp_path: Path, counted: Counted, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("training.progress.LINE_EVERY_S", 0.0)
    opened(tmp_path, counted.engine)
    lines = [line for line in caplog.messages if line.startswith("feature cache, view")]
    assert lines == [f"feature cache, view {view} of 2: {done} of 3" for view in (1, 2) for done in (1, 2, 3)]


def test_the_first_pass_shows_a_bar_in_a_terminal(
    tmp_path: Path, counted: Counted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.progress.in_terminal", lambda: True)
    opened(tmp_path, counted.engine)
    assert re.search(r"feature cache, view 2 of 2: .*/3 ", capsys.readouterr().err)


# Its key --------------------------------------------------------------------------------------------------------


def other_order() -> ArrayImages:
    some = array_images()
    return ArrayImages(some.pixels[::-1].copy(), some.labels[::-1].copy())


@pytest.mark.parametrize(
    "change",
    [
        {"network": small_network(seed=1)}, {"side": 40, "network": small_network(side=40)},
        {"images": array_images(seed=1)}, {"images": array_images(labels=2)}, {"images": other_order()},
        {"views": Views()}, {"views": Views(flip=True, crops=1)},
        {"network": small_network(mean=(0.5, 0.4, 0.4))}, {"network": small_network(std=(0.2, 0.2, 0.3))},
    ],
    ids=["weights", "side", "images", "labels", "order", "no flips", "crops", "mean", "std"],
)  # fmt: skip
def test_other_weights_images_or_views_have_another_cache(
    tmp_path: Path, counted: Counted, change: dict[str, Any]
) -> None:
    first = opened(tmp_path, counted.engine)
    other = opened(tmp_path, counted.engine, **change)
    assert first.folder != other.folder
    assert opened(tmp_path, counted.engine).folder == first.folder


@pytest.mark.parametrize("package", resize.PACKAGES)
def test_another_version_of_what_decodes_or_resizes_has_another_cache(
    tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    first, version = opened(tmp_path, counted.engine), metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0" if name == package else version(name))
    assert opened(tmp_path, counted.engine).folder != first.folder


def test_the_head_and_what_is_trained_are_no_part_of_the_key(tmp_path: Path, counted: Counted) -> None:
    network = small_network()
    first = opened(tmp_path, counted.engine, network=network).folder
    with torch.no_grad():
        network.layer4[0].conv1.weight.add_(1)
        network.fc.classes.bias.add_(1)
    assert opened(tmp_path, counted.engine, network=network).folder == first


def test_another_engine_has_another_cache(tmp_path: Path, counted: Counted) -> None:
    other = PrefixEngine("other", 4, counted.engine.run)
    assert opened(tmp_path, counted.engine).folder != opened(tmp_path, other).folder


def test_a_whole_cache_is_found_and_not_computed_again(tmp_path: Path, counted: Counted) -> None:
    first = opened(tmp_path, counted.engine)
    del counted.batches[:]
    again = opened(tmp_path, counted.engine)
    assert counted.batches == []
    assert torch.equal(first.features, again.features)


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is told by Linux alone (/proc)")
def test_the_features_are_mapped_from_their_file(tmp_path: Path, counted: Counted) -> None:
    cache = opened(tmp_path, counted.engine)
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    path = str((cache.folder / "features.bf16").resolve())
    (places,) = [entry[0].split("-") for entry in maps if entry[-1] == path]
    first, end = (int(place, 16) for place in places)
    assert first <= cache.features.data_ptr() < cache.features.data_ptr() + cache.size <= end


# Damage ---------------------------------------------------------------------------------------------------------


def change_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def set_fact(folder: Path, **changed: object) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps({**facts, **changed}))


def swap_for_foreign(folder: Path) -> None:
    """Put the cache of other images of the same size here, as someone does who moves folders about."""
    root = folder.parent
    engine = prefix_engines._torch(small_network(), CPU, "fp32")
    foreign = opened(root, engine, images=array_images(seed=1)).folder
    shutil.rmtree(folder)
    shutil.copytree(foreign, folder)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no facts": lambda folder: (folder / "facts.json").unlink(),
    "no features": lambda folder: (folder / "features.bf16").unlink(),
    "garbage facts": lambda folder: (folder / "facts.json").write_text("{"),
    "binary facts": lambda folder: (folder / "facts.json").write_bytes(b"\xff\xfe\x00"),
    "facts are a list": lambda folder: (folder / "facts.json").write_text("[]"),
    "empty facts": lambda folder: (folder / "facts.json").write_text("{}"),
    "truncated": lambda folder: (folder / "features.bf16").open("r+b").truncate(1000),
    "empty": lambda folder: (folder / "features.bf16").open("r+b").truncate(0),
    "longer": lambda folder: (folder / "features.bf16").open("ab").write(b"xx"),
    "first bit": lambda folder: change_byte(folder / "features.bf16", 0),
    "last bit": lambda folder: change_byte(folder / "features.bf16", -1),
    "other format": lambda folder: set_fact(folder, format=0),
    "other shape": lambda folder: set_fact(folder, shape=[2, 10, 2, 2, 128]),
    "same size, other shape": lambda folder: set_fact(folder, shape=[2, 5, 4, 2, 256]),
    "no hashes": lambda folder: set_fact(folder, sha256=[]),
    "of other images": swap_for_foreign,
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_cache_is_computed_anew(tmp_path: Path, counted: Counted, damage: str) -> None:
    fresh = opened(tmp_path, counted.engine)
    expected = fresh.features.clone()
    DAMAGE[damage](fresh.folder)
    del fresh, counted.batches[:]
    again = opened(tmp_path, counted.engine)
    assert counted.batches == [4, 4, 2] * 2, "it was not computed anew"
    assert torch.equal(again.features, expected)
    del counted.batches[:]
    opened(tmp_path, counted.engine)
    assert counted.batches == []


def test_what_is_left_of_a_build_that_failed_is_not_trained_on(tmp_path: Path, counted: Counted) -> None:
    def fail_later(images: Tensor) -> Tensor:
        if len(counted.batches) == 4:
            raise RuntimeError("out of memory")
        return counted.engine.run(images)

    with pytest.raises(RuntimeError, match="out of memory"):
        opened(tmp_path, PrefixEngine(counted.engine.name, 4, fail_later))
    del counted.batches[:]
    assert opened(tmp_path, counted.engine).features.isfinite().all()
    assert counted.batches == [4, 4, 2] * 2


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    engine = PrefixEngine("broken", 4, lambda images: torch.full((len(images), 2, 2, 256), float("nan")).bfloat16())
    with pytest.raises(ConfigError, match="not finite: their weights are damaged"):
        opened(tmp_path, engine)
    assert not list(tmp_path.glob("*/facts.json"))


# The disk -------------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    total: int = 2**40
    used: int = 0
    free: int = features.FREE_BYTES


def test_without_room_on_the_disk_auto_trains_from_images_and_warns(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(features.shutil, "disk_usage", lambda root: Usage())
    config = settings(feature_cache="auto")
    assert prepare(config).features is None
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("feature cache: not used. The feature cache needs ")
    assert f"{config.cache_folder} has 1.1 GB free; --cache-folder names another place" in warning


def test_without_room_on_the_disk_on_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features.shutil, "disk_usage", lambda root: Usage())
    with pytest.raises(ConfigError, match="--feature-cache off does without"):
        prepare(settings(feature_cache="on"))


def test_a_cache_that_is_there_needs_no_room(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(settings(feature_cache="on")).features is not None
    monkeypatch.setattr(features.shutil, "disk_usage", lambda root: Usage())
    assert prepare(settings(feature_cache="on")).features is not None


def test_a_cache_folder_that_is_a_file_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--cache-folder .*file: the folder cannot be written to"):
        prepare(settings(feature_cache="on", cache_folder=tmp_path / "file"))


# Several processes, and ends ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_two_processes_at_once_one_computes_the_cache_and_one_waits(
    settings: Settings, launch: Launch, tmp_path: Path
) -> None:
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    configs = [settings(feature_cache="on", epochs=1, output=tmp_path / f"model{i}") for i in range(2)]
    for process in [launch(config, log) for config, log in zip(configs, logs, strict=True)]:
        assert process.wait(200) == 0, "".join(log.read_text() for log in logs)
    both = "".join(log.read_text() for log in logs)
    assert both.count("MB, computed by") == 2  # of training and of validation images, once each
    assert both.count("MB found and verified") == 2


@pytest.mark.slow
def test_a_process_killed_while_it_computes_the_cache_leaves_nothing_that_is_trained_on(
    settings: Settings, launch: Launch, tmp_path: Path
) -> None:
    config = settings(feature_cache="on", augment="flip-crop", cache_crops=64, epochs=1)
    process = launch(config, tmp_path / "log")
    deadline_s = time.monotonic() + 120
    while not list(config.cache_folder.glob("*/features.bf16")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list(config.cache_folder.glob("*/facts.json"))
    prepared: Prepared = prepare(config)
    assert prepared.features is not None
    assert len(left) < 2
    for path in config.cache_folder.glob("*/features.bf16"):
        facts = json.loads((path.parent / "facts.json").read_text())
        assert path.stat().st_size == 2 * np.prod(facts["shape"])
