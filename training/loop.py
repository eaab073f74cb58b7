"""The training loop: one epoch of steps, and evaluation. Knows the network and batches, not where they come from."""

import logging
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from service.model.network import Network
from training.callbacks import Callback, Step, StopTraining, tell
from training.checkpoint import Progress
from training.config import TrainingConfig
from training.data import augment
from training.distributed import Group, share_statistics
from training.epoch_metrics import Evaluation
from training.errors import DivergedError
from training.interruption import Interrupted, Interruption
from training.metric_lines import TRAIN, pass_title
from training.optimization import Ema, make_optimizer, schedule, set_rate
from training.progress import BatchLines
from training.randomness import Draws, generator
from training.sources import Source, StepPlan
from training.validation import validate

log = logging.getLogger(__name__)

CHECK_EVERY = {"cpu": 1, "cuda": 50, "mps": 50}
"""Steps between looking at the loss, which makes the processor wait for a GPU."""


class Trainer:
    """Holds what a step needs: network, optimizer, schedule, precision, how far it is."""

    def __init__(
        self,
        network: Network,
        config: TrainingConfig,
        *,
        images: int,
        device: torch.device,
        bf16: bool,
        group: Group,
        callbacks: Sequence[Callback],
        interruption: Interruption,
    ) -> None:
        """`images`: how many are trained on. Moves `network` to `device`."""
        self.network = network
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.progress = Progress()
        self.steps_per_epoch = steps_per_epoch(images, config.batch_size, group.world_size)
        self._config, self._images, self._device, self._bf16 = config, images, device, bf16
        self._group, self._callbacks, self._interruption = group, callbacks, interruption
        self._unfrozen = False
        self._validation_s = 0.0  # of the last pass; before the first nothing is known of it
        self._best: dict[str, Tensor] = {}
        # Faster from 64 px on, and everywhere in bf16 (2 cores of an AVX512-BF16 EPYC, torch 2.13, n = 3 to 8 steps:
        # 224 px fp32 62 img/s with it, 54 without; 32 px bf16 447 and 407; 32 px fp32, nothing frozen, 299 and 341).
        if bf16 or device.type == "cuda" or config.side >= 64:
            network.to(memory_format=torch.channels_last)
        network.to(device)
        share_statistics(network, group)
        self._start_phase(config.learning_rate, first=1, last=self._frozen_epochs)

    @property
    def _frozen_epochs(self) -> int:
        """The epochs of the first phase, before everything is trained."""
        return min((self._config.unfreeze_at or self._config.epochs + 1) - 1, self._config.epochs)

    def _start_phase(self, rate: float, first: int, last: int) -> None:
        """Make the optimizer, schedule and moving average for epochs `first` to `last`."""
        self.optimizer = make_optimizer(self._config, self.network, rate)
        self._first_step = (first - 1) * self.steps_per_epoch
        warmup = round(self._config.warmup_epochs * self.steps_per_epoch)
        self._share = schedule(self._config.schedule, (last - first + 1) * self.steps_per_epoch, warmup)
        self.ema = Ema(self.network, self._config.ema_decay) if self._config.ema_decay else None
        self._module: nn.Module = self._group.wrap(self.network, self._device)
        if self._config.compile:
            if self._callbacks:
                log.warning("--compile: activations are not observed, as hooks are compiled away")
            self._module = torch.compile(self._module)  # type: ignore[assignment]

    def start_epoch(self) -> None:
        """Unfreeze the network if its time has come."""
        if self._config.unfreeze_at is not None and self.progress.epoch >= self._config.unfreeze_at:
            self._unfreeze()

    def _unfreeze(self) -> None:
        if not self._unfrozen:
            log.info("epoch %d: every block is trained from here on", self.progress.epoch)
            if self.ema is not None and self.progress.steps == 0:
                self.ema.swap()  # go on from the average
            if self._best:  # of an epoch in which these blocks were frozen: the best network has them as they are now
                self._best = {**self.network.state_dict(), **self._best}
                self._best = {name: tensor.detach().clone() for name, tensor in self._best.items()}
            self.network.unfreeze()
            share_statistics(self.network, self._group)
            self._unfrozen = True
            rate = self._config.learning_rate * self._config.unfreeze_rate
            self._start_phase(rate, first=self._frozen_epochs + 1, last=self._config.epochs)

    def train_epoch(self, source: Source) -> None:
        """The steps of this epoch that are left, in random order; `progress` has their sums.

        Raises: DivergedError, Interrupted, StopTraining.
        """
        done = self.progress
        self.network.train()
        title = pass_title(done.epoch, self._config.epochs, TRAIN)
        plans = self._plans(done.epoch)[done.steps :]
        sums = torch.zeros(2, device=self._device)  # loss and hits since the last look
        seen, stop = done.seen, None
        began_s, first = time.perf_counter(), done.step
        with BatchLines(title, self._images, done.seen, quiet=not self._group.is_first) as lines:
            started_s = time.perf_counter()
            batches = source.training_batches([plan for _, plan in plans])
            for (size, plan), (inputs, labels) in zip(plans, batches, strict=True):
                waited_s = time.perf_counter() - started_s
                step = self._step(inputs, labels, size, plan, source, waited_s)
                sums += torch.stack([step.loss_tensor * len(labels), step.hits_tensor])
                done.steps, done.step, seen = done.steps + 1, done.step + 1, seen + size
                step.seconds = time.perf_counter() - started_s
                done.seconds += step.seconds
                stop = self._told(step) or stop
                look = done.step % CHECK_EVERY[self._device.type] == 0 or done.steps == self.steps_per_epoch
                if look or (stop is not None and self._group.world_size == 1):
                    loss_sum, hits = self._group.sum(sums).tolist()
                    sums = torch.zeros_like(sums)
                    done.loss_sum, done.hits, done.seen = done.loss_sum + loss_sum, done.hits + hits, seen
                    if not math.isfinite(done.loss_sum):
                        raise DivergedError(
                            f"{title}, step {done.steps}: the loss is {step.loss} at learning rate "
                            f"{step.learning_rate:.3g}; start again with a smaller --learning-rate."
                        )
                    left_s = self._left_s(time.perf_counter() - began_s, done.step - first)
                    lines.show(done.seen, step.loss, step.accuracy, left_s)
                    self._stop_together(stop)
                started_s = time.perf_counter()

    def _left_s(self, took_s: float, steps: int) -> float:
        """About how long the rest of the run takes, after `steps` steps that took `took_s`."""
        epochs = self._config.epochs - self.progress.epoch  # after this one
        left = self.steps_per_epoch * (epochs + 1) - self.progress.steps
        return left * took_s / steps + (epochs + 1) * self._validation_s

    def _told(self, step: Step) -> StopTraining | None:
        """Tell the callbacks of a step's end; a request to stop is kept until all processes can follow it."""
        try:
            tell(self._callbacks, "on_step_end", step)
        except StopTraining as exc:
            return exc
        return None

    def stop_if_interrupted(self) -> None:
        """Raises: Interrupted in every process when a signal came to any of them."""
        number = self._interruption.signal_number
        if self._group.any(number is not None, self._device):
            raise Interrupted(number or signal.SIGTERM)

    def _stop_together(self, stop: StopTraining | None) -> None:
        """Raise in every process what happened in any of them."""
        self.stop_if_interrupted()
        if self._group.any(stop is not None, self._device):
            raise stop or StopTraining("another process stopped the training")

    def _plans(self, epoch: int) -> list[tuple[int, StepPlan]]:
        """Size of the global batch and this process's part of it, for each step of an epoch.

        A last batch too small for every process to have an image of it, or of a single image (batch norm has no
        variance of one value), is left out; it holds other images in each epoch.
        """
        order = torch.randperm(self._images, generator=generator(self._config.seed, "order", epoch))
        plans = []
        for number, indices in enumerate(torch.split(order, self._config.batch_size)[: self.steps_per_epoch]):
            mine = self._group.share(len(indices))
            draws = Draws((self._config.seed, "augment", epoch, number), len(indices), mine, self._device)
            plans.append((len(indices), StepPlan(indices[mine], draws)))
        return plans

    def _step(self, inputs: Tensor, labels: Tensor, size: int, plan: StepPlan, source: Source, waited_s: float) -> Step:
        """Forward, backward and update; `size` is that of the global batch."""
        config, number, from_features = self._config, self.progress.step + 1, source.from_features
        rate = set_rate(self.optimizer, self._share(self.progress.step - self._first_step))
        tell(self._callbacks, "on_step_start", number)
        targets, heavier = labels, labels
        if config.mixup or config.cutmix:
            classes = self.network.architecture.num_classes
            partners = self._partners(inputs, size), self._partners(labels, size)
            inputs, targets = augment.mix(
                (inputs, labels), partners, classes, plan.draws, config.mixup, config.cutmix
            )  # fmt: skip
            heavier = targets.argmax(1)
        if from_features and not self._bf16:
            inputs = inputs.float()
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            logits = self._module(inputs, from_features=from_features)  # [N, K]
        loss = self.criterion(logits.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)  # not sooner: callbacks may look at gradients after the step
        # Processes average their gradients: each weighs its mean by its share of the global batch.
        weight = len(labels) * self._group.world_size / size
        (loss * weight if weight != 1 else loss).backward()
        hits = (logits.detach().argmax(1) == heavier).sum().float()
        shown = loss.detach()
        if targets is not labels or config.label_smoothing:  # what is reported is comparable with validation's
            shown = nn.functional.cross_entropy(logits.detach().float(), heavier)
        true = source.labels[plan.indices]
        step = Step(number, self.progress.epoch, rate, true, shown, hits, waited_s)
        tell(self._callbacks, "on_backward_end", step)
        if config.clip_norm:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, config.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return step

    def _partners(self, mine: Tensor, size: int) -> Tensor:
        """Of each image of this process that before it in the global batch, whose order is random."""
        return self._group.whole(mine, size).roll(1, 0)[self._group.share(size)]

    def evaluate(self, source: Source, title: str) -> Evaluation:
        """Loss and accuracy of the weights that would be kept, in eval mode, without augmentation."""
        started_s = time.perf_counter()
        if self.ema is not None:
            self.ema.swap()
        try:
            return validate(
                self.network, source, self._device, title,
                bf16=self._bf16, group=self._group, watch=self.stop_if_interrupted,
            )  # fmt: skip
        finally:
            self._validation_s = time.perf_counter() - started_s
            if self.ema is not None:
                self.ema.swap()

    def rate_of_epoch(self, epoch: int) -> float:
        """The highest learning rate of an epoch's first step."""
        share = self._share((epoch - 1) * self.steps_per_epoch - self._first_step)
        return max(float(group["peak"]) * share for group in self.optimizer.param_groups)

    def remember_best(self, accuracy: float) -> None:
        """Keep these weights if they are the best so far (only where early stopping may go back to them)."""
        if self._config.early_stopping and accuracy > self.progress.best_accuracy:
            self.progress.best_accuracy, self.progress.best_epoch = accuracy, self.progress.epoch
            if self.ema is not None:
                self.ema.swap()
            self._best = {name: tensor.detach().clone() for name, tensor in self._trained_state().items()}
            if self.ema is not None:
                self.ema.swap()

    def keep_final(self) -> None:
        """Put into the network what is kept: the best epoch's weights, or the average, or what it has."""
        if self._best:
            self.network.load_state_dict(self._best, strict=False)
            log.info("the weights of epoch %d are kept, the best on the validation images", self.progress.best_epoch)
        elif self.ema is not None:
            self.ema.swap()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds (see `training.checkpoint`)."""
        return {
            "progress": asdict(self.progress),
            "unfrozen": self._unfrozen,
            "network": self._trained_state(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "best": self._best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.progress = Progress(**state["progress"])
        if state["unfrozen"]:
            self._unfreeze()
        self.network.load_state_dict(state["network"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self._best = {name: tensor.to(self._device) for name, tensor in state["best"].items()}

    def _trained_state(self) -> dict[str, Tensor]:
        """The network's state without what is frozen."""
        frozen = tuple(
            f"{name}." for name, module in self.network.named_modules()
            if any(module is other for other in self.network.frozen_modules())
        )  # fmt: skip
        return {
            name: value for name, value in self.network.state_dict().items() if not name.startswith(frozen or ("?",))
        }


def steps_per_epoch(images: int, batch_size: int, processes: int = 1) -> int:
    """Batches of one epoch; a last batch of a single image, or of fewer than `processes`, is left out."""
    full, rest = divmod(images, batch_size)
    return full + (rest >= max(2, processes))
