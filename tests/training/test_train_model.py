"""Training from end to end: a right artifact, the same again for the same seed, and ends that harm nothing."""

import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from service.model.artifact import open_artifact
from service.model.images import decode
from service.model.network import Network
from service.model.resize import crop_resize_all
from training.config import LOCAL, TrainingConfig
from training.data import cifar100
from training.environment import sagemaker_values
from training.run import run
from training.train_model import main

ROOT = Path(__file__).parents[2]
BARE = ["--report", "false", "--tensorboard", "false", "--profile", "false"]  # test_run_folder.py tests them
BARE += ["--quantize", "off"]  # test_quantization.py
SMALL = ["--weights", "none", "--side", "8", "--hidden-units", "8", "--epochs", "1", "--device", "cpu", *BARE]
HEAD_ONLY = ["--freeze", "stem,layer1,layer2,layer3,layer4"]
PROCESS_LIMIT_S = 120


def draw(root: Path, per_class: int, classes: tuple[str | bytes, ...] = ("dark", "light")) -> Path:
    """A folder of classes that differ in brightness."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        folder = os.path.join(os.fsencode(root), os.fsencode(name))  # noqa: PTH118  # names that are no text, too
        os.makedirs(folder)  # noqa: PTH103
        for i in range(per_class):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 128, (10, 12, 3)) + 127 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            Path(os.fsdecode(folder), f"{i}.png").write_bytes(buffer.getvalue())
    return root


def train(data: Path, output: Path, *flags: str) -> int:
    cache = ["--cache-folder", str(output.parent / "features")]
    return main(["--data", str(data), "--output", str(output), *SMALL, *cache, *flags])


def links(folder: Path, target: Path) -> Path:
    """A copy that takes no space; writing an artifact replaces files and never writes into them."""
    shutil.copytree(folder, target, copy_function=os.link)
    return target


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir()}


def assert_whole(folder: Path) -> None:
    artifact = open_artifact(folder)
    assert artifact.weights()
    assert artifact.self_check()
    assert artifact.read("example")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five images: eight to train on, two to validate on."""
    return draw(tmp_path_factory.mktemp("pictures") / "data", 5)


def in_background() -> None:
    """Leave the processor to the tests, but hear Ctrl-C, to which a shell's background jobs are deaf."""
    os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(log: Path, *arguments: str, before_exec: Callable[[], None] | None = None) -> subprocess.Popen[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
    command = [sys.executable, "-m", "training.train_model", *arguments]
    environ = {**kept, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=out, preexec_fn=before_exec)


def wait_for(text: str, log: Path, running: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + PROCESS_LIMIT_S
    while text not in log.read_text():
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.02)


@dataclass
class Run:
    """A process that trains, and what lay in its output folder before."""

    process: subprocess.Popen[bytes]
    log: Path
    output: Path
    before: dict[str, tuple[int, int, int]]


@pytest.fixture(scope="module")
def runs(pictures: Path, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """Three processes, started before they are needed: each takes seconds to import torch."""
    folder = tmp_path_factory.mktemp("runs")
    endless = ["--data", str(pictures), *SMALL, *HEAD_ONLY, "--epochs", "100000", "--cache-folder", str(folder / "c")]
    flags = {"unknown flag": ["--data", "x", "--epoch", "3"], "interrupted": endless, "killed": endless}
    running = {}
    try:
        for name, arguments in flags.items():
            output, log = links(artifact, folder / name), folder / f"{name}.log"
            background = in_background if arguments is endless else None
            process = start(log, *arguments, "--output", str(output), before_exec=background)
            running[name] = Run(process, log, output, stamps(output))
        yield running
    finally:
        for each in running.values():
            each.process.kill()
            each.process.wait()


@pytest.fixture(scope="module", autouse=True)
def one_core(runs: object) -> Iterator[None]:
    """Threads of so small operations mostly wait for each other, twenty times as long on a busy machine.

    The processes in `runs` were started before and have all cores.
    """
    threads = torch.get_num_threads()
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if before:
        os.sched_setaffinity(0, {max(before)})
    yield
    if before:
        os.sched_setaffinity(0, before)
    torch.set_num_threads(threads)


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


# What the artifact says -----------------------------------------------------------------------------------------


def test_the_manifest_tells_what_was_trained(artifact: Path, sample_root: Path) -> None:
    manifest = open_artifact(artifact).manifest
    dataset = cifar100.read(sample_root)
    assert manifest.classes == dataset.classes
    assert (manifest.name, manifest.format_version) == ("tiny", 2)
    assert manifest.version == manifest.files["weights"].sha256[:12]
    assert (manifest.architecture.num_classes, manifest.architecture.hidden_units) == (100, 512)
    assert manifest.architecture.frozen == ()
    assert manifest.preprocessing.side_px == 32
    assert manifest.dataset == {
        "name": "generated-sample", "train_images": 200, "validation_images": 100, **dataset.facts,
    }  # fmt: skip


def test_the_manifest_tells_every_hyperparameter_but_places(artifact: Path) -> None:
    told = open_artifact(artifact).manifest.hyperparameters
    assert set(told) == set(TrainingConfig.model_fields) - LOCAL
    given = {"weights": "none", "freeze": [], "epochs": 1, "batch_size": 50}
    defaults = TrainingConfig(data=Path(), output=Path()).model_dump(mode="json", exclude=set(LOCAL))
    assert told == {**defaults, **given}


def test_the_manifest_tells_metrics_with_their_number_of_images(artifact: Path) -> None:
    metrics = open_artifact(artifact).manifest.metrics
    assert set(metrics["validation"]) == {"loss", "accuracy", "top5_accuracy", "n", "ece"}
    assert metrics["validation"]["n"] == 100
    (epoch,) = metrics["history"]
    assert epoch["epoch"] == 1
    assert epoch["learning_rate"] == 0.017483127170473314
    assert metrics["train"] == {"loss": epoch["train_loss"], "accuracy": epoch["train_accuracy"], "n": 200}
    assert epoch["validation_loss"] == pytest.approx(metrics["validation"]["loss"])


def test_the_manifest_tells_the_packages(artifact: Path) -> None:
    packages = open_artifact(artifact).manifest.packages
    assert set(packages) == {"python", "numpy", "pillow", "safetensors", "torch", "torchvision"}
    for name in set(packages) - {"python"}:
        assert packages[name] == metadata.version(name)


def test_every_file_is_whole_and_nothing_else_is_there(artifact: Path) -> None:
    assert_whole(artifact)
    manifest = open_artifact(artifact).manifest
    assert {p.name for p in artifact.iterdir()} == {
        "manifest.json",
        *(entry.path for entry in manifest.files.values()),
    }


def test_metrics_and_self_check_are_those_of_the_exported_weights(artifact: Path, sample_root: Path) -> None:
    opened = open_artifact(artifact)
    network = Network(opened.manifest.architecture, opened.manifest.preprocessing)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in opened.weights().items()})
    validation = cifar100.read(sample_root).validation
    labels = torch.from_numpy(validation.labels)
    batch = crop_resize_all(
        [decode(validation.payload(i)) for i in range(len(validation))], 32
    )  # as a client would send it
    check = opened.self_check()
    with torch.inference_mode():
        logits = network.eval()(torch.from_numpy(batch))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    told = opened.manifest.metrics["validation"]
    assert told["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert told["accuracy"] == pytest.approx((ranks == 0).float().mean().item())
    assert told["top5_accuracy"] == pytest.approx((ranks < 5).float().mean().item())
    assert len(check.inputs) >= 1
    for image, stored in zip(check.inputs, check.logits, strict=True):
        (index,) = (i for i in range(len(batch)) if (batch[i] == image).all())
        np.testing.assert_allclose(logits[index].numpy(), stored, atol=1e-4)


def test_the_example_is_a_validation_image_of_the_class_stated(artifact: Path, sample_root: Path) -> None:
    opened = open_artifact(artifact)
    validation = cifar100.read(sample_root).validation
    image = decode(opened.read("example"))
    (index,) = (i for i in range(len(validation)) if (validation.image(i) == image).all())
    assert opened.manifest.example.label == opened.manifest.classes[validation.labels[index]]
    assert opened.manifest.example.media_type == "image/png"
    assert opened.path("example").suffix == ".png"


def test_the_example_of_a_folder_of_images_is_the_file_itself(pictures: Path, tmp_path: Path) -> None:
    assert train(pictures, tmp_path / "model", *HEAD_ONLY) == 0
    opened = open_artifact(tmp_path / "model")
    originals = {path.read_bytes(): path.parent.name for path in pictures.rglob("*.png")}
    assert originals[opened.read("example")] == opened.manifest.example.label


# What a run does ------------------------------------------------------------------------------------------------


def test_a_run_reports_each_epoch_and_warns_of_frozen_random_blocks(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    # Batches of 7 of 8 images: the last has a single one, of which batch norm has no variance.
    assert train(pictures, tmp_path / "model", "--freeze", "stem", "--batch-size", "7", "--epochs", "2") == 0
    (warning,) = lines(caplog, logging.WARNING)
    assert "frozen blocks without pretrained weights stay random; --freeze none trains them" in warning
    number = r"\d+\.\d{4}"
    pattern = (
        rf"epoch=(\d)/2 train_loss={number} train_accuracy={number} validation_loss={number} "
        rf"validation_accuracy={number} learning_rate=0\.01748 seconds=[\d.e+-]+ remaining_minutes=[\d.]+"
    )
    epochs = [line for line in lines(caplog, logging.INFO) if line.startswith("epoch=")]
    assert [match[1] for line in epochs if (match := re.fullmatch(pattern, line))] == ["1", "2"]
    settings = next(line for line in lines(caplog, logging.INFO) if line.startswith("settings: "))
    assert all(f" {name}=" in settings for name in TrainingConfig.model_fields)
    last = next(line for line in lines(caplog, logging.INFO) if line.startswith("validation: accuracy"))
    version = open_artifact(tmp_path / "model").manifest.version
    assert re.search(rf"accuracy \d+\.\d\d %, loss {number}, n=2; .*version {version} in ", last)
    assert len(open_artifact(tmp_path / "model").manifest.metrics["history"]) == 2


def test_a_run_that_fails_before_its_first_epoch_leaves_no_empty_folder_for_the_model(tmp_path: Path) -> None:
    assert train(tmp_path / "nowhere", tmp_path / "model", *HEAD_ONLY) == 1
    assert not (tmp_path / "model").exists()
    (tmp_path / "model").mkdir()  # this one is not ours to remove
    assert train(tmp_path / "nowhere", tmp_path / "model", *HEAD_ONLY) == 1
    assert (tmp_path / "model").is_dir()


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(pictures: Path, tmp_path: Path) -> None:
    flags = ["--freeze", "none", "--augment", "flip-crop", "--batch-size", "3", "--hidden-units", "16"]
    versions = []
    for number, seed in enumerate(("1", "1", "2")):
        assert train(pictures, tmp_path / str(number), *flags, "--seed", seed) == 0
        versions.append(open_artifact(tmp_path / str(number)).manifest.files["weights"].sha256)
        if number:
            shutil.rmtree(tmp_path / str(number))
    assert versions[0] == versions[1] != versions[2]


def test_frozen_blocks_are_exported_as_they_came(pictures: Path, artifact: Path, tmp_path: Path) -> None:
    weights = open_artifact(artifact).path("weights")
    flags = ["--freeze", "stem,layer1,layer2,layer3", "--weights", str(weights), "--weight-decay", "0.1"]
    assert train(pictures, tmp_path / "model", *flags) == 0
    given, exported = open_artifact(artifact).weights(), open_artifact(tmp_path / "model").weights()
    assert open_artifact(tmp_path / "model").manifest.hyperparameters["weights"] == weights.name
    for name in given:
        if not name.startswith("fc."):
            same = given[name].tobytes() == exported[name].tobytes()
            if not name.startswith("layer4."):
                assert same, name
            elif given[name].ndim == 4:  # a batch norm of a branch that starts at zero hardly moves
                assert not same, name


@pytest.mark.parametrize(("epochs", "batch_size"), [("5", "8"), ("1", "8"), ("2", "3")])
def test_a_one_cycle_schedule_of_any_length_can_be_run(
    pictures: Path, tmp_path: Path, epochs: str, batch_size: str
) -> None:
    flags = ["--schedule", "one-cycle", "--epochs", epochs, "--batch-size", batch_size]
    assert train(pictures, tmp_path / "model", *HEAD_ONLY, *flags) == 0
    history = open_artifact(tmp_path / "model").manifest.metrics["history"]
    assert len(history) == int(epochs)


def test_a_new_artifact_replaces_the_old_one(pictures: Path, artifact: Path, tmp_path: Path) -> None:
    output = links(artifact, tmp_path / "model")
    folder = tmp_path / "model-run"
    folder.mkdir()
    reported = [folder / name for name in ("report.html", "evaluation.json", "curves.png")]
    for path in reported:
        path.write_text("of the old model")
    assert train(tmp_path / "nowhere", output, *HEAD_ONLY) == 1
    assert all(path.exists() for path in reported)
    assert train(pictures, output, *HEAD_ONLY, "--model-name", "second") == 0
    assert_whole(output)
    assert not any(path.exists() for path in reported)  # SMALL writes no report
    assert open_artifact(output).manifest.name == "second"
    assert len(list(output.iterdir())) == 4
    assert_whole(artifact)


def test_inside_a_sagemaker_job_the_environment_tells_places(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "ml"
    (root / "input" / "config").mkdir(parents=True)
    (root / "input" / "data").mkdir()
    (root / "input" / "data" / "training").symlink_to(pictures)
    given = {
        "weights": "none",
        "freeze": "none",
        "epochs": "1",
        "side": "8",
        "quantize": "off",
        "sagemaker_program": "x",
    }
    (root / "input" / "config" / "hyperparameters.json").write_text(
        json.dumps({name: json.dumps(value) for name, value in given.items()})
    )
    run(TrainingConfig.create(sagemaker_values(root, {})))
    assert_whole(root / "model")


# How a run can end otherwise ------------------------------------------------------------------------------------


def ends(caplog: pytest.LogCaptureFixture, status: int, expected: int) -> str:
    """The one sentence a run ended with; an exception would have failed the test before."""
    assert status == expected
    (sentence,) = lines(caplog, logging.ERROR)
    assert "Traceback" not in caplog.text
    return sentence


def test_missing_data_ends_with_a_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sentence = ends(caplog, train(tmp_path / "nowhere", tmp_path / "model"), 1)
    assert f"--data {tmp_path / 'nowhere'}: there is no such folder." in sentence


@pytest.mark.parametrize(
    ("side_px", "memory", "said"),
    [(32, 300 * 2**20, "at 32 px takes some 1.4 GiB"), (32, 2 * 2**30, ""), (8, 2**30, "at 8 px takes some 1.4 GiB"),
     (224, 3 * 2**30, "at 224 px takes some 3.3 GiB"), (224, 4 * 2**30, "")],
)  # fmt: skip
def test_where_little_memory_may_be_used_the_log_says_what_a_training_takes(
    side_px: int, memory: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("training.run.memory_bytes", lambda: memory)  # the container's limit stands in here
    train(tmp_path / "nowhere", tmp_path / "model", "--side", str(side_px))
    assert said in caplog.text and bool(said) is ("of memory may be used here" in caplog.text)


def test_an_empty_data_folder_ends_with_a_sentence_that_says_what_to_put_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    sentence = ends(caplog, train(tmp_path / "data", tmp_path / "model"), 1)
    assert "holds neither cifar-100-python/ nor one folder of images per class" in sentence
    assert "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz" in sentence


@pytest.mark.parametrize(("place", "said"), [("", "001.jpg"), ("dark", "images directly"), ("dark/0.png", "a file")])
def test_data_that_cannot_be_is_told_before_weights_are_looked_for_and_leaves_no_folder(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, said: str
) -> None:
    data = pictures / place if place else tmp_path / "empty"
    (tmp_path / "empty").mkdir()
    sentence = ends(caplog, train(data, tmp_path / "model", "--weights", "nowhere.pth"), 1)
    assert f"--data {data}" in sentence and said in sentence
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


def test_settings_that_are_missing_end_with_status_2(caplog: pytest.LogCaptureFixture) -> None:
    sentence = ends(caplog, main([]), 2)
    assert "--data is missing" in sentence
    assert "--output is missing" in sentence


@pytest.mark.parametrize("place", ["file", "file/model"])
def test_an_output_that_cannot_be_written_is_found_before_training(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").touch()
    sentence = ends(caplog, train(pictures, tmp_path / place), 2)
    assert f"--output {tmp_path / place}: the folder cannot be written to" in sentence
    assert "images to train on" not in caplog.text


def test_weights_that_are_not_there_end_with_a_sentence(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sentence = ends(caplog, train(pictures, tmp_path / "model", "--weights", "nowhere.pth"), 1)
    assert "--weights nowhere.pth: there is no such file" in sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_ends_with_a_sentence(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sentence = ends(caplog, train(pictures, tmp_path / "model", "--device", "cuda"), 2)
    assert "--device cuda: this machine has none that PyTorch can use; --device cpu always works" in sentence


def test_a_seed_that_no_generator_takes_ends_with_status_2(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "--seed" in ends(caplog, train(pictures, tmp_path / "model", "--seed", str(2**64)), 2)


def test_a_class_name_that_is_no_text_is_not_found_out_after_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data = draw(tmp_path / "data", 2, ("tea", b"caf\xe9"))
    sentence = ends(caplog, train(data, tmp_path / "model", *HEAD_ONLY), 1)
    assert "caf" in sentence
    assert "epoch=" not in caplog.text


@pytest.mark.parametrize(
    "flags",
    [
        ["--learning-rate", "1e6", "--epochs", "30", "--batch-size", "4"],
        ["--learning-rate", "1e30", "--batch-size", "8"],  # the only step is the one that ruins the weights
    ],
    ids=["in the middle", "in the last step"],
)
def test_a_diverging_run_ends_with_a_sentence_and_leaves_the_old_artifact(
    pictures: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, flags: list[str]
) -> None:
    output = links(artifact, tmp_path / "model")
    before = stamps(output)
    sentence = ends(caplog, train(pictures, output, "--freeze", "none", *flags), 1)
    assert re.search(r"(loss is (nan|inf)|not finite).* again with a smaller --learning-rate", sentence)
    assert stamps(output) == before


def test_a_full_disk_ends_with_a_sentence_and_leaves_the_old_artifact(
    pictures: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = links(artifact, tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, limits[1]))  # the weights have 85 MB
    try:
        status = train(pictures, output, *HEAD_ONLY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in ends(caplog, status, 1)
    assert open_artifact(output).manifest == open_artifact(artifact).manifest
    assert_whole(output)


# As a process ---------------------------------------------------------------------------------------------------


def test_an_unknown_flag_ends_the_process_with_status_2_and_what_is_meant(runs: dict[str, Run]) -> None:
    each = runs["unknown flag"]
    assert each.process.wait(PROCESS_LIMIT_S) == 2
    text = each.log.read_text()
    assert "Unknown flag --epoch. Did you mean --epochs?" in text
    assert "Traceback" not in text
    assert stamps(each.output) == each.before


@pytest.mark.parametrize(
    ("name", "sent", "status"), [("interrupted", signal.SIGINT, 130), ("killed", signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_process_that_is_interrupted_or_killed_leaves_the_old_artifact(
    runs: dict[str, Run], name: str, sent: signal.Signals, status: int
) -> None:
    each = runs[name]
    wait_for("epoch=2/", each.log, each.process)
    each.process.send_signal(sent)
    assert each.process.wait(PROCESS_LIMIT_S) == status
    text = each.log.read_text()
    assert ("stopped by SIGINT: a checkpoint is written" in text) == (name == "interrupted")
    assert "Traceback" not in text
    assert stamps(each.output) == each.before
    assert_whole(each.output)
