"""Single behaviours of the loop: divergence, clipping, early stopping, blended targets, RandAugment, compiling."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from service.model.artifact import open_artifact
from training import progress
from training.callbacks import Callback, RunContext, Step
from training.checkpoint import Progress
from training.config import TrainingConfig
from training.data import augment
from training.epoch_metrics import EpochMetrics
from training.errors import DivergedError
from training.loop import Trainer
from training.randomness import Draws
from training.run import Fitted, fit, prepare, run

Settings = Callable[..., TrainingConfig]
CPU = torch.device("cpu")


def fitted(config: TrainingConfig, *callbacks: Callback) -> Fitted:
    return fit(config, prepare(config), callbacks)


def draws(seed: int, size: int) -> Draws:
    return Draws(("test", seed), size, slice(None), CPU)


class Watching(Callback):
    """The network at each epoch's end, the largest update of a step and the gradients' norm."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.updates: list[float] = []
        self.norms: list[tuple[float, float]] = []
        self.accuracies: list[float] = []

    def on_run_start(self, context: RunContext) -> None:
        self._network = context.network

    def _trained(self) -> list[torch.Tensor]:
        return [p for p in self._network.parameters() if p.requires_grad]

    def _norm(self) -> float:
        return float(torch.stack([p.grad.norm() for p in self._trained() if p.grad is not None]).norm())

    def on_backward_end(self, step: Step) -> None:
        self._before = [p.detach().clone() for p in self._trained()]
        self._unclipped = self._norm()

    def on_step_end(self, step: Step) -> None:
        moved = [(p.detach() - q).norm() for p, q in zip(self._trained(), self._before, strict=True)]
        self.updates.append(float(torch.stack(moved).norm()))
        self.norms.append((self._unclipped, self._norm()))

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        self.weights.append({name: t.detach().clone() for name, t in self._network.state_dict().items()})
        self.accuracies.append(metrics.validation_accuracy)


def test_a_loss_that_is_no_number_ends_the_run_naming_the_step_and_the_rate(settings: Settings) -> None:
    sentence = r"epoch \d/9 train, step \d: the loss is (nan|inf) at learning rate 1e\+20; start again with a smaller"
    with pytest.raises(DivergedError, match=sentence):
        fitted(settings(side=16, learning_rate=1e20, epochs=9))


def test_clipping_bounds_the_gradients_and_so_the_update(settings: Settings) -> None:
    watching = Watching()
    fitted(settings(side=16, epochs=1, clip_norm=0.05, momentum=0, learning_rate=0.1), watching)
    assert all(before > 0.05 for before, _ in watching.norms)  # otherwise nothing is shown
    assert all(after <= 0.05 * 1.001 for _, after in watching.norms)
    assert all(update <= 0.1 * 0.05 * 1.01 for update in watching.updates)


def test_without_clipping_gradients_stay_as_they_are(settings: Settings) -> None:
    watching = Watching()
    fitted(settings(side=16, epochs=1), watching)
    assert all(before == after for before, after in watching.norms)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_early_stopping_ends_the_run_and_keeps_the_best_epochs_weights(settings: Settings, decay: float) -> None:
    watching = Watching()
    config = settings(side=16, epochs=30, early_stopping=2, learning_rate=0.05, ema_decay=decay)
    run(config, [watching])
    metrics = open_artifact(config.output).manifest.metrics
    accuracies = [epoch["validation_accuracy"] for epoch in metrics["history"]]
    best = int(np.argmax(accuracies))
    assert len(accuracies) == best + 1 + 2 < 30
    assert metrics["stopped"] == "no better validation accuracy in 2 epochs"
    assert metrics["validation"]["accuracy"] == pytest.approx(accuracies[best])
    assert metrics["validation"]["loss"] == pytest.approx(metrics["history"][best]["validation_loss"], rel=1e-4)
    if not decay:  # with an average the network in training is another than the one that is kept
        kept = open_artifact(config.output).weights()
        assert all(np.array_equal(kept[name], tensor.numpy()) for name, tensor in watching.weights[best].items())


def test_the_best_epoch_before_unfreezing_is_kept_whole(settings: Settings, backbone: Path) -> None:
    watching = Watching()
    config = settings(
        side=16, epochs=4, early_stopping=3, unfreeze_at=2, unfreeze_rate=1.0, learning_rate=0.5, augment="none"
    )
    result = fitted(config, watching)
    best = int(np.argmax(watching.accuracies))
    state = result.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in watching.weights[best].items()), best


def test_an_average_is_what_is_evaluated_and_exported(settings: Settings) -> None:
    watching = Watching()
    config = settings(side=16, epochs=2, ema_decay=0.9)
    run(config, [watching])
    kept = open_artifact(config.output)
    live = watching.weights[-1]["fc.classes.weight"].numpy()
    assert not np.array_equal(kept.weights()["fc.classes.weight"], live)
    told = kept.manifest.metrics
    assert told["validation"]["loss"] == pytest.approx(told["history"][-1]["validation_loss"], rel=1e-4)


def mix(
    images: torch.Tensor, labels: torch.Tensor, classes: int, draws: Draws, mixup: float, cutmix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return augment.mix((images, labels), (images.roll(1, 0), labels.roll(1)), classes, draws, mixup, cutmix)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
@pytest.mark.parametrize("count", [2, 7])
def test_blended_targets_are_probabilities_and_images_stay_in_range(mixup: float, cutmix: float, count: int) -> None:
    images = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8)
    before, labels = images.clone(), torch.arange(count) % 3
    for seed in range(20):
        mixed, targets = mix(images, labels, 3, draws(seed, count), mixup, cutmix)
        assert (mixed.shape, mixed.dtype, targets.shape) == (images.shape, torch.float32, (count, 3))
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
        assert 0 <= float(targets.min()) <= float(targets.max()) <= 1
        assert 0 <= float(mixed.min()) <= float(mixed.max()) <= 255
        again, _ = mix(images, labels, 3, draws(seed, count), mixup, cutmix)
        assert torch.equal(mixed, again)
    assert torch.equal(images, before)


def test_a_patchs_share_of_the_image_is_its_share_of_the_target() -> None:
    images = torch.stack([torch.zeros(16, 16, 3), torch.full((16, 16, 3), 255.0)]).to(torch.uint8)
    for seed in range(20):
        mixed, targets = mix(images, torch.tensor([0, 1]), 2, draws(seed, 2), 0.0, 1.0)
        bright = (mixed == 255).float().mean((1, 2, 3))
        torch.testing.assert_close(targets[:, 1], bright)


def test_rand_augment_is_determined_by_its_draws_and_leaves_the_global_generator_alone() -> None:
    images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = augment.rand_augment(images, draws(0, 6))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(augment.rand_augment(images, draws(0, 6)), one)
    assert not torch.equal(augment.rand_augment(images, draws(1, 6)), one)
    assert (one.shape, one.dtype) == (images.shape, torch.uint8)
    share = Draws(("test", 0), 6, slice(1, 6, 2), CPU)
    assert torch.equal(augment.rand_augment(images[1::2], share), one[1::2])  # a second process of two


def test_label_smoothing_raises_the_least_possible_loss(settings: Settings) -> None:
    class Criterion(Callback):
        def on_run_start(self, context: RunContext) -> None:
            sure = torch.tensor([[50.0, 0.0, 0.0]])
            self.loss = float(context.criterion(sure, torch.tensor([0])))

    plain, smooth = Criterion(), Criterion()
    fitted(settings(side=16, epochs=1), plain)
    fitted(settings(side=16, epochs=1, label_smoothing=0.3), smooth)
    assert plain.loss == pytest.approx(0, abs=1e-6)
    assert smooth.loss == pytest.approx(0.3 * 2 / 3 * 50)


def test_with_deterministic_every_operation_is_and_two_runs_are_bitwise_equal(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Callback):
        def on_step_start(self, number: int) -> None:
            assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)  # what the run sets is taken back afterwards
    config = settings(
        deterministic=True, augment="flip-crop", mixup=0.2, cutmix=1.0, ema_decay=0.9, clip_norm=1.0,
        unfreeze_at=2, precision="bf16",
    )  # fmt: skip
    try:
        one, other = (fitted(config, Asked()).network.state_dict() for _ in range(2))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("side", "bf16"), [(16, False), (17, True)])
def test_bf16_is_not_used_where_a_processors_gradients_are_wrong(
    settings: Settings, caplog: pytest.LogCaptureFixture, side: int, bf16: bool
) -> None:
    watching = Watching()
    config = settings(side=side, precision="bf16", epochs=1, augment="none")
    prepared = prepare(config)
    assert prepared.bf16 == bf16
    fit(config, prepared, [watching])
    assert max(before for before, _ in watching.norms) < 1e3  # unwritten memory: up to 1e37
    said = "training in float32: below 17 px bfloat16 gives wrong gradients on processors"
    assert (said in caplog.messages) != bf16


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch's compiler
@pytest.mark.parametrize("side", [16, 32])
def test_a_compiled_network_trains_as_the_plain_one(side: int, settings: Settings) -> None:
    plain, compiled = (fitted(settings(side=side, epochs=1, compile=flag)) for flag in (False, True))
    assert compiled.history[0].train_loss == pytest.approx(plain.history[0].train_loss, rel=1e-3)
    assert set(compiled.network.state_dict()) == set(plain.network.state_dict())


def test_the_time_left_of_the_run_is_told_from_the_first_epoch_on(
    settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    fitted(settings(side=16, epochs=2))
    said = [line.split()[1:3] for line in caplog.messages if re.search(r" images=.* remaining_minutes=\d+\.\d$", line)]
    assert said == [["1/2", "train"]] * 4 + [["2/2", "train"]] * 4
    # Two of 3 x 10 steps took 4 s, and a validation pass 3 s: 28 steps and three passes are left.
    run = SimpleNamespace(
        _config=SimpleNamespace(epochs=3), progress=Progress(epoch=1, steps=2), steps_per_epoch=10, _validation_s=3.0
    )
    assert Trainer._left_s(run, took_s=4.0, steps=2) == 28 * 2 + 3 * 3  # type: ignore[arg-type]
