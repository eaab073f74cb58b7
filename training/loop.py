"""The training loop: one epoch of steps, and evaluation. Knows the network and batches, not where they come from."""

import logging
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from service.model.network import Network
from training.data import augment
from training.data.loader import Batch, Loader
from training.errors import DivergedError
from training.evaluation import Evaluation
from training.progress import LINE_EVERY_S, in_terminal

log = logging.getLogger(__name__)


class Trainer:
    """Holds what a step needs: network, optimizer, schedule, precision, randomness."""

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        *,
        device: torch.device,
        bf16: bool,
        augmentation: str,
        generator: torch.Generator,
    ) -> None:
        """`augmentation`: "none", "flip" or "flip-crop". `generator` is the source of order and augmentation."""
        self.network = network
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._device = device
        self._bf16 = bf16
        self._augmentation = augmentation
        self._generator = generator
        self._criterion = nn.CrossEntropyLoss()

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def train_epoch(self, loader: Loader, title: str) -> tuple[float, float]:
        """One pass in random order. Returns: loss and accuracy over its images. Raises: DivergedError."""
        self.network.train()
        order = torch.randperm(len(loader), generator=self._generator)
        total_loss, correct, seen = 0.0, 0, 0
        with _BatchLines(title, len(loader)) as lines:
            for images, labels in self._without_lone_image(loader.batches(order)):
                loss, hits = self._step(self._augmented(images).to(self._device), labels.to(self._device))
                total_loss, correct, seen = total_loss + loss * len(labels), correct + hits, seen + len(labels)
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"{title}: the loss is {loss} at learning rate {self.learning_rate:.3g}; "
                        "start again with a smaller --learning-rate."
                    )
                lines.add(len(labels), loss, hits / len(labels))
        return total_loss / seen, correct / seen

    def evaluate(self, loader: Loader, title: str) -> Evaluation:
        """Loss and accuracy in eval mode, in float32, without augmentation."""
        return evaluate(self.network, loader, self._device, title)

    def _step(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            logits = self.network(images)  # [N, K]
        loss = self._criterion(logits.float(), labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        return loss.item(), int((logits.argmax(1) == labels).sum())

    def _augmented(self, images: Tensor) -> Tensor:
        if self._augmentation != "none":
            images = augment.flip(images, self._generator)
        if self._augmentation == "flip-crop":
            images = augment.crop(images, self._generator)
        return images

    @staticmethod
    def _without_lone_image(batches: Iterator[Batch]) -> Iterator[Batch]:
        """Leave out a last batch of one: batch norm has no variance of a single value (another image each epoch)."""
        return (batch for batch in batches if len(batch[1]) > 1)


def evaluate(network: Network, loader: Loader, device: torch.device, title: str) -> Evaluation:
    """See `Trainer.evaluate`."""
    network.eval()
    total_loss, correct, top5, seen = 0.0, 0, 0, 0
    with torch.inference_mode(), _BatchLines(title, len(loader)) as lines:
        for images, labels in loader.batches():
            labels = labels.to(device)
            logits = network(images.to(device))  # [N, K]
            loss = nn.functional.cross_entropy(logits, labels)
            total_loss += loss.item() * len(labels)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [N, 5]
            hits = best == labels[:, None]
            correct, top5, seen = correct + int(hits[:, 0].sum()), top5 + int(hits.sum()), seen + len(labels)
            lines.add(len(labels), loss.item(), int(hits[:, 0].sum()) / len(labels))
    return Evaluation(total_loss / seen, correct / seen, top5 / seen, seen)


class _BatchLines:
    """Shows batch loss and batch accuracy: in a bar, or in plain lines, every LINE_EVERY_S seconds and at the end."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._seen = title, total, 0
        self._last_s = time.monotonic()
        self._bar = tqdm(
            desc=title, total=total, unit="img", leave=False, dynamic_ncols=True, disable=not in_terminal()
        )
        self._redirect = logging_redirect_tqdm()

    def __enter__(self) -> "_BatchLines":
        self._redirect.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
        self._redirect.__exit__(None, None, None)

    def add(self, count: int, loss: float, accuracy: float) -> None:
        self._seen += count
        self._bar.update(count)
        self._bar.set_postfix_str(f"batch_loss={loss:.4f} batch_accuracy={accuracy:.4f}", refresh=False)
        due = time.monotonic() - self._last_s >= LINE_EVERY_S or self._seen == self._total
        if self._bar.disable and due:
            self._last_s = time.monotonic()
            log.info(
                "%s images=%d/%d batch_loss=%.4f batch_accuracy=%.4f",
                self._title,
                self._seen,
                self._total,
                loss,
                accuracy,
            )
