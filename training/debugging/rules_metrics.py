"""Rules about losses, labels and time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.debugging.observations import Observation
from training.debugging.rules import Firing, Pace, Rule, patterns, selected

TRAIN_LOSS, VALIDATION_LOSS = "scalar/epoch_loss", "scalar/validation_loss"


@dataclass
class LossNotDecreasing(Rule):
    """At more than `patience` checks in a row the loss was not `diff_percent` below its least, or it rose.

    AWS compares the losses of two batches, which differ by chance; here means are compared: of all steps since the
    last check, with a check at the end of an epoch, or every `num_steps` in files of smdebug, which keep no epochs.
    These differ by chance, too, where images are augmented; `patience`, which AWS does not have, is that of torch's
    ReduceLROnPlateau. A rise of more than `increase_threshold_percent` since the check before is found at once.
    `mode`: GLOBAL and TRAIN look at the training loss, EVAL at the validation loss.
    """

    collection_names: str | None = None
    tensor_regex: str | None = None
    use_losses_collection: bool = True
    num_steps: int = 10
    diff_percent: float = 0.1
    increase_threshold_percent: float = 5.0
    mode: str = "GLOBAL"
    patience: int = 1

    kinds = ("loss",)
    advice = (
        "At the start of a run: change the learning rate, check labels and normalisation. Late in a run it has "
        "converged: lower the learning rate or stop."
    )

    def __post_init__(self) -> None:
        self._by_epoch = False
        self._sums: dict[str, tuple[float, int]] = {}
        self._last: dict[str, tuple[int, float]] = {}
        self._least: dict[str, tuple[int, float]] = {}
        self._waited: dict[str, int] = {}
        self._checks: dict[str, int] = {}

    def judges_from(self, pace: Pace) -> int:
        """See `Rule`. The first check is at the end of the first epoch; for the next, a loss must be observed."""
        step = pace.epoch
        for _ in range(1 + self.patience):
            observed = pace.of_observation(1, after=step)
            step = pace.of_epoch(math.ceil(max(step + self.num_steps, observed) / pace.epoch))
        return step

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`."""
        if seen.kind == "start":
            self._by_epoch = True
        elif self.mode.upper() == "EVAL":
            if seen.name == VALIDATION_LOSS:
                self._add(seen)
                yield from self._check(seen)
        elif seen.kind == "loss" and self._takes(seen):
            self._add(seen)
            if not self._by_epoch:
                yield from self._check(seen)
        elif self._by_epoch and seen.name == TRAIN_LOSS:
            for name in [*self._sums]:
                yield from self._check(Observation(seen.step, name, "loss", seen.time_s))

    def _takes(self, seen: Observation) -> bool:
        return selected(seen, self.collection_names, self.tensor_regex, "losses" if self.use_losses_collection else "")

    def _add(self, seen: Observation) -> None:
        total, count = self._sums.get(seen.name, (0.0, 0))
        self._sums[seen.name] = total + seen.stats.get("mean", seen.value), count + 1

    def _check(self, seen: Observation) -> Iterator[Firing]:
        total, count = self._sums[seen.name]
        if not count or (seen.name in self._last and seen.step - self._last[seen.name][0] < self.num_steps):
            return
        now = total / count
        self._sums[seen.name] = 0.0, 0
        last_step, last = self._last.get(seen.name, (0, math.nan))
        least_step, least = self._least.get(seen.name, (0, math.nan))
        self._last[seen.name] = seen.step, now
        fell, rose = _percent(least - now, least), _percent(now - last, last)
        if not least or math.isnan(least) or fell >= self.diff_percent:
            self._least[seen.name] = seen.step, now
            waited = 0
        else:
            waited = self._waited[seen.name] + 1
        self._waited[seen.name] = waited
        self._checks[seen.name] = checks = self._checks.get(seen.name, 0) + 1
        self.judged = self.judged or checks > 1 + self.patience
        if rose > self.increase_threshold_percent:
            message = f"the loss rose by {rose:.3g} % since step {last_step}, from {last:.4g} to {now:.4g}."
            yield self.fire(seen, -rose, -self.increase_threshold_percent, message)
        elif waited > self.patience:
            what = f"fell by {fell:.3g} % only" if not fell < 0 else f"rose by {-fell:.3g} %"
            message = f"the loss {what} since step {least_step}, its least, from {least:.4g} to {now:.4g}."
            yield self.fire(seen, fell, self.diff_percent, message)


def _percent(change: float, of: float) -> float:
    """NaN where there is nothing to compare with."""
    return 100 * change / abs(of) if of else math.nan


@dataclass
class Overfit(Rule):
    """(validation loss - training loss) / training loss is above `ratio_threshold` for more than `patience` epochs.

    AWS counts saved steps; here an epoch is the step, since that is how often there is a validation loss. Of these
    there is one pair, which `tensor_regex` takes by the name of either, or of the loss that they are means of.
    """

    tensor_regex: str | None = None
    start_step: int = 0
    patience: int = 1
    ratio_threshold: float = 0.1

    kinds = ("scalar",)
    advice = "More images, augmentation, weight decay, label smoothing, more frozen blocks, or fewer epochs."

    def __post_init__(self) -> None:
        self._train, self._exceeded, self._compared = math.nan, 0, 0
        self._taken = not patterns(self.tensor_regex)

    def judges_from(self, pace: Pace) -> int:
        """See `Rule`."""
        return pace.of_epoch(max(1, math.ceil(self.start_step / pace.epoch)) + self.patience)

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`."""
        if not self._taken and (seen.kind == "loss" or seen.name in (TRAIN_LOSS, VALIDATION_LOSS)):
            self._taken = selected(seen, None, self.tensor_regex, "")
        if seen.name == TRAIN_LOSS:
            self._train = seen.value
        elif seen.name == VALIDATION_LOSS and self._taken and seen.step >= self.start_step:
            ratio = (seen.value - self._train) / self._train if self._train > 0 else math.nan
            self._compared += 1
            self.judged = self._compared > self.patience
            self._exceeded = self._exceeded + 1 if ratio > self.ratio_threshold else 0
            if self._exceeded > self.patience:
                message = (
                    f"the validation loss {seen.value:.4g} is {100 * ratio:.0f} % above the training loss "
                    f"{self._train:.4g}, for {self._exceeded} epochs in a row."
                )
                yield self.fire(seen, ratio, self.ratio_threshold, message)


@dataclass
class Overtraining(Rule):
    """A loss has not improved by `delta` for more epochs than its patience; an epoch is the step, as for `Overfit`."""

    patience_train: int = 5
    patience_validation: int = 10
    delta: float = 0.01

    kinds = ("scalar",)
    advice = "Stop earlier and take the weights of the best epoch (--early-stopping N), or lower the learning rate."

    def __post_init__(self) -> None:
        self._best: dict[str, tuple[float, int]] = {}
        self._seen: dict[str, int] = {}

    def judges_from(self, pace: Pace) -> int:
        """See `Rule`. A loss is best in its first epoch at the earliest."""
        return pace.of_epoch(min(self.patience_train, self.patience_validation) + 2)

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`."""
        patience = {TRAIN_LOSS: self.patience_train, VALIDATION_LOSS: self.patience_validation}.get(seen.name)
        if patience is None:
            return
        self._seen[seen.name] = self._seen.get(seen.name, 0) + 1
        self.judged = self.judged or self._seen[seen.name] > patience + 1
        best, waited = self._best.get(seen.name, (math.inf, 0))
        if seen.value < best - self.delta:
            best, waited = seen.value, -1
        self._best[seen.name] = best, waited + 1
        if waited + 1 > patience:
            message = f"the loss has not gone {self.delta:g} below {best:.4g} for {waited + 1} epochs."
            yield self.fire(seen, waited + 1, patience, message)


@dataclass
class ClassImbalance(Rule):
    """Classes are unequally frequent by more than `threshold_imbalance`, or rare classes are mostly predicted wrong.

    Judged once `samples` labels were seen, but at least 50 for each class: AWS's 500 are meant for 10 classes, and of
    100 equal ones chance alone would make some look rare. AWS also reports every class with more than
    `threshold_misprediction` predicted wrong, which at the start of a run is each; here only those count that have
    less than half as many images as the average class.

    `argmax`, `labels_regex` and `predictions_regex`, which tell AWS where labels and predictions are, are accepted
    and have no effect: the loop hands both over.
    """

    threshold_imbalance: float = 10.0
    threshold_misprediction: float = 0.7
    samples: int = 500
    argmax: bool = False
    labels_regex: str = ".*labels"
    predictions_regex: str = ".*predictions"

    kinds = ("labels",)
    advice = "Collect more images of the rare classes, sample them more often, or weight the loss by class."

    def __post_init__(self) -> None:
        self._counts: npt.NDArray[np.float64] = np.zeros((3, 0))
        self._next = 0.0

    def judges_from(self, pace: Pace) -> int:
        """See `Rule`."""
        return pace.of_images(self._least(self._counts.shape[1]))

    def _least(self, classes: int) -> int:
        return max(self.samples, 50 * classes)

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`."""
        if seen.kind != "labels":
            return
        counts = np.reshape(seen.series, (3, -1))  # seen, predicted, predicted wrong
        self._counts = counts + (self._counts if self._counts.shape == counts.shape else 0)
        labels, predicted, wrong = self._counts
        enough = max(self._least(len(labels)), self._next)
        if labels.sum() < enough or len(labels) < 2:
            return
        self.judged = True
        self._next = 2 * labels.sum()  # counts change slowly: look again when there are twice as many
        ratio = float(labels.max() / max(1.0, labels.min()))
        if ratio > self.threshold_imbalance:
            message = (
                f"class {int(labels.argmax())} has {labels.max():.0f} of {labels.sum():.0f} labels, class "
                f"{int(labels.argmin())} {labels.min():.0f}."
            )
            yield self.fire(seen, ratio, self.threshold_imbalance, message)
        for rare in np.flatnonzero((labels < labels.mean() / 2) & (predicted >= 10)):
            share = float(wrong[rare] / predicted[rare])
            if share > self.threshold_misprediction:
                message = f"{100 * share:.0f} % of the images of the rare class {rare} are predicted wrong."
                yield self.fire(seen, share, self.threshold_misprediction, message)
        self._counts[1:] = 0  # predictions of a worse network no longer count


@dataclass
class StalledTrainingRule(Rule):
    """No progress for `threshold` seconds: live, no step ends (a watchdog looks); afterwards, a gap in the times.

    In files of smdebug epochs follow all steps, whatever their times: a gap is counted from the latest time so far.
    `stop_training_on_fire` is the action "stop"; a step that never ends can only be reported, not stopped. It is this
    run that is stopped: `training_job_name_prefix`, by which AWS finds it, is accepted and has no effect.
    """

    threshold: int = 1800
    stop_training_on_fire: bool = False
    training_job_name_prefix: str | None = None

    kinds = ("loss", "scalar")
    advice = "Look at the loader's processes, the network file system, and the GPU (nvidia-smi); start again."

    def __post_init__(self) -> None:
        self.live = False
        self._latest: Observation | None = None

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`; nothing when live."""
        earlier = self._latest
        if earlier is None or seen.kind == "start" or seen.time_s > earlier.time_s:
            self._latest = seen
        self.judged = self.judged or earlier is not None
        if self.live or earlier is None or seen.kind == "start":
            return
        if seen.time_s - earlier.time_s > self.threshold:
            yield self.stalled(seen.step, seen.time_s - earlier.time_s)

    def stalled(self, step: int, seconds: float) -> Firing:
        """The firing about `seconds` without progress after `step`."""
        message = f"nothing happened for {seconds:.0f} s after step {step}."
        return Firing(step, "", seconds, self.threshold, message, self.advice)


ALL = (LossNotDecreasing, Overfit, Overtraining, ClassImbalance, StalledTrainingRule)
