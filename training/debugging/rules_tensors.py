"""Rules about tensors: weights, gradients, activations."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from training.debugging.observations import Observation
from training.debugging.rules import Firing, Pace, Rule, selected

IN_A_ROW = 3
"""Observations in a row before zeros or tiny gradients count; AWS fires on a single step."""
SETTLED_STEP = 20
"""Up to here nothing that is too small counts. A network whose residual branches start at zero (Goyal et al. 2017,
https://arxiv.org/abs/1706.02677, 5.1) has zero gradients in its first step and tiny ones after it: in a layer4 trained
from random weights (SGD 0.01) the first convolution's gradient was 0, 2e-8, 4e-8, 7e-8, and above 1e-7 from step 6."""

RELU_OUTPUTS = ".*relu_output,.*activation_output"
RELU_INPUTS = ".*relu_input,.*activation_input"


@dataclass
class _Streaks(Rule):
    """A rule that fires when something holds for IN_A_ROW observations of a tensor in a row."""

    def __post_init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._settled: dict[str, int] = {}

    def judges_from(self, pace: Pace) -> int:
        """See `Rule`."""
        return pace.of_observation(IN_A_ROW, after=SETTLED_STEP)

    def lasts(self, seen: Observation, holds: bool) -> bool:
        """Whether it holds now and held in the observations before."""
        self._settled[seen.name] = self._settled.get(seen.name, 0) + (seen.step > SETTLED_STEP)
        self.judged = self.judged or self._settled[seen.name] >= IN_A_ROW
        self._rows[seen.name] = self._rows.get(seen.name, 0) + 1 if holds and seen.step > SETTLED_STEP else 0
        return self._rows[seen.name] >= IN_A_ROW


@dataclass
class VanishingGradient(_Streaks):
    """The mean of a gradient's absolute values is below `threshold`; here for IN_A_ROW observations in a row."""

    threshold: float = 0.0000001

    kinds = ("gradient",)
    advice = (
        "Check that the layers above still pass gradients (saturated or dead activations), use ReLU, batch norm and "
        "residual connections, or a larger learning rate; with a loss near zero it only means that training is over."
    )

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`."""
        if seen.kind == "gradient":
            value = seen.stats["mean_abs"]
            if self.lasts(seen, value < self.threshold):
                yield self.fire(seen, value, self.threshold, f"the gradient is {value:.3g} on average, almost nothing.")


@dataclass
class ExplodingTensor(Rule):
    """A tensor or loss has values that are NaN or, unless `only_nan`, infinite."""

    collection_names: str | None = None
    tensor_regex: str | None = None
    only_nan: bool = False

    kinds = ("loss", "scalar", "weight", "gradient", "activation_input", "activation_output")
    advice = (
        "Start again with a smaller learning rate, gradient clipping, or in fp32; check the images for broken ones."
    )

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`."""
        default = "weights,biases,gradients,losses,relu_input,relu_output,scalars"
        if not selected(seen, self.collection_names, self.tensor_regex, default):
            return
        self.judged = True
        nan, inf = seen.stats.get("nan", 0), 0 if self.only_nan else seen.stats.get("inf", 0)
        if nan + inf > 0:
            yield self.fire(seen, nan + inf, 0, f"{nan + inf:.0f} values are NaN or infinite.")


FIRST_LOSSES, FALLEN = 2, 0.01
"""What `PoorWeightInitialization` takes for the loss at the start, and the share of it that counts as a fall."""


@dataclass
class PoorWeightInitialization(Rule):
    """In the first `steps` observations the loss does not fall, and the weights look guilty.

    It does not fall if the mean of `patience` observed losses is not a hundredth below the mean of the first two: one
    batch's loss says little. In a simulation (noise of a tenth of the loss), single losses made 4 to 42 % of runs that
    do fall look stuck, depending on how they fall; by these means it is 3 to 28 %, most where they fall slowly.

    Guilty: the variances of the inputs of activations differ between layers by more than a factor of `threshold`, or
    the 5th and 95th percentile of some gradient are nearer to each other than `distribution_range`. AWS's page leaves
    open how the three conditions join; either of the last two alone holds for every ResNet-34, healthy or not
    (gradients of layers with millions of weights are small), so here they count only with a loss that does not fall.
    AWS's default for `activation_inputs_regex`, ".*relu_input", does not match the head's activation, ours does.
    """

    activation_inputs_regex: str = RELU_INPUTS
    threshold: float = 10.0
    distribution_range: float = 0.001
    patience: int = 5
    steps: int = 10

    kinds = ("loss", "activation_input", "gradient")
    advice = (
        "Start from pretrained weights, or initialise with He's or Xavier's method; check that inputs are normalised."
    )

    def __post_init__(self) -> None:
        self._step, self._observed = 0, 0
        self._variances: dict[str, float] = {}
        self._range = math.inf
        self._losses: list[float] = []
        self._done = False

    def judges_from(self, pace: Pace) -> int:
        """See `Rule`. What was seen of a step is judged when the next one is observed."""
        return pace.of_observation(FIRST_LOSSES + self.patience + 1)

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`."""
        if seen.kind in ("start", "scalar", "labels") or self._done:
            return
        if seen.step != self._step:
            yield from self._judge(seen)  # all of the step before is known now
            self._step, self._variances, self._range = seen.step, {}, math.inf
            self._observed += 1
            self._done = self._done or self._observed > self.steps
        if seen.kind == "loss":
            self._losses.append(seen.stats.get("mean", seen.value))
        elif seen.kind == "activation_input" and selected(seen, None, self.activation_inputs_regex, ""):
            self._variances[seen.name] = seen.stats["std"] ** 2
        elif seen.kind == "gradient" and "p95" in seen.stats and seen.stats["size"] > 1:
            self._range = min(self._range, seen.stats["p95"] - seen.stats["p5"])

    def _judge(self, seen: Observation) -> Iterator[Firing]:
        if len(self._losses) < FIRST_LOSSES + self.patience:
            return
        self.judged = True
        first, last = fmean(self._losses[:FIRST_LOSSES]), fmean(self._losses[-self.patience :])
        if last < (1 - FALLEN) * first:
            return
        low, high = min(self._variances.values(), default=1.0), max(self._variances.values(), default=1.0)
        ratio = high / low if low > 0 else math.inf
        stuck = f"the loss has not fallen in the first {len(self._losses)} observations ({first:.3g}, then {last:.3g})"
        if ratio > self.threshold or math.isnan(ratio):
            name = max(self._variances, key=lambda layer: self._variances[layer])
            message = f"{stuck}, and the variances of the inputs of activations differ by a factor of {ratio:.3g}."
            finite = ratio if math.isfinite(ratio) else None
            yield Firing(self._step, name, finite, self.threshold, message, self.advice)
            self._done = True
        elif self._range < self.distribution_range:
            message = f"{stuck}, and the percentiles 5 and 95 of a gradient differ by {self._range:.3g} only."
            yield Firing(self._step, "gradients", self._range, self.distribution_range, message, self.advice)
            self._done = True


@dataclass
class DeadRelu(Rule):
    """More than `threshold_layer` percent of a ReLU's units are dead: above zero for less than
    `threshold_inactivity` percent of the inputs of a batch.

    A unit is a channel. AWS's default for `tensor_regex`, ".*relu_output", finds the ReLUs of the residual blocks and
    not the head's, which is named `fc.activation`; ours finds both.
    """

    tensor_regex: str = RELU_OUTPUTS
    threshold_inactivity: float = 1.0
    threshold_layer: float = 50.0

    kinds = ("activation_output",)
    advice = "Use a smaller learning rate, look for large negative biases, or replace ReLU by LeakyReLU."

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`."""
        if seen.kind != "activation_output" or not seen.series or not selected(seen, None, self.tensor_regex, ""):
            return
        self.judged = True
        dead = 100 * sum(active < self.threshold_inactivity for active in seen.series) / len(seen.series)
        if dead > self.threshold_layer:
            yield self.fire(seen, dead, self.threshold_layer, f"{dead:.0f} % of the units are dead.")


@dataclass
class AllZero(_Streaks):
    """`threshold` percent of a tensor's values are zero; here for IN_A_ROW observations in a row.

    AWS wants `collection_names` or `tensor_regex`; without both, weights, gradients and outputs of ReLUs are looked
    at. Biases are not: those of batch norms start at zero.
    """

    collection_names: str | None = None
    tensor_regex: str | None = None
    threshold: float = 100.0

    kinds = ("weight", "gradient", "activation_input", "activation_output")
    advice = "Look for a layer that is cut off: dead activations before it, a wrong mask, weights set to zero."

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`."""
        if "zeros" not in seen.stats:
            return
        if selected(seen, self.collection_names, self.tensor_regex, "weights,gradients,relu_output"):
            zeros = 100 * seen.stats["zeros"]
            if self.lasts(seen, zeros >= self.threshold):
                yield self.fire(seen, zeros, self.threshold, f"{zeros:.4g} % of the values are zero.")


RESTING_SHARE = 0.1
"""Of its learning rate, below which a schedule brings a run to rest: that weights hardly move there is its purpose."""


def _rests(seen: Observation) -> bool:
    """Whether the schedule, not a fault, keeps a weight from moving. A rate of zero is a fault; files may not tell."""
    return 0 < seen.stats.get("rate_share", 1.0) < RESTING_SHARE


@dataclass
class UnchangedTensor(Rule):
    """A tensor is the same, as `numpy.allclose` sees it, in the last `num_steps` observations.

    AWS wants `collection_names` or `tensor_regex`; without both, weights and biases are looked at. Only of these are
    changes known. Where a schedule has brought the learning rate below a tenth of its own, nothing is judged.
    """

    collection_names: str | None = None
    tensor_regex: str | None = None
    num_steps: int = 3
    rtol: float = 1e-05
    atol: float = 1e-08
    equal_nan: bool = False

    kinds = ("weight",)
    advice = "Check that the learning rate is not (almost) zero and that the optimizer was given this parameter."

    def __post_init__(self) -> None:
        self._same: dict[str, int] = {}
        self._compared: dict[str, int] = {}

    def judges_from(self, pace: Pace) -> int:
        """See `Rule`."""
        return pace.of_observation(self.num_steps - 1, after=SETTLED_STEP)

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`. Raises: ValueError when the observations were made with another `atol`."""
        needed = seen.stats.get("needed_rtol")
        if needed is None or not selected(seen, self.collection_names, self.tensor_regex, "weights,biases"):
            return
        if _rests(seen):
            self._same[seen.name] = 1
            return
        if seen.stats.get("atol", self.atol) != self.atol:
            raise ValueError(
                f"the observations were made for atol={seen.stats['atol']}, the rule has {self.atol}; give the rule "
                "the same, or train again with the rule's."
            )
        self._compared[seen.name] = self._compared.get(seen.name, 0) + (seen.step > SETTLED_STEP)
        self.judged = self.judged or self._compared[seen.name] >= self.num_steps - 1
        close = seen.step > SETTLED_STEP and needed <= self.rtol and (self.equal_nan or not seen.stats["nan"])
        self._same[seen.name] = self._same.get(seen.name, 1) + 1 if close else 1
        if self._same[seen.name] >= self.num_steps:
            message = f"the tensor is the same as {self.num_steps - 1} observations ago."
            yield self.fire(seen, seen.stats["change_ratio"], self.rtol, message)


@dataclass
class WeightUpdateRatio(Rule):
    """The update of a weight is too large or too small beside it: ||after - before|| / ||before||.

    The update is that of one step, or with `num_steps` that since the observation before, where it is at most
    `num_steps` steps ago; in smdebug's files it is always the latter. A weight of zeros has no ratio, and where a
    schedule has brought the learning rate below a tenth of its own, no update is too small.
    """

    num_steps: int | None = None
    large_threshold: float = 10.0
    small_threshold: float = 0.00000001
    epsilon: float = 0.000000001

    kinds = ("weight",)
    advice = "Updates should be about a thousandth of the weight: change the learning rate, or the optimizer."

    def observe(self, seen: Observation) -> Iterator[Firing]:
        """See `Rule`."""
        if not selected(seen, "weights", None, ""):
            return
        ratio = seen.stats.get("update_ratio")
        if ratio is None or (self.num_steps and seen.step - seen.stats.get("since", -math.inf) <= self.num_steps):
            ratio = seen.stats.get("change_ratio")
        if ratio is None or seen.stats["l2"] <= self.epsilon:
            return
        self.judged = True
        if ratio > self.large_threshold:
            yield self.fire(seen, ratio, self.large_threshold, f"the update is {ratio:.3g} times the weight.")
        elif ratio < self.small_threshold and seen.step > SETTLED_STEP and not _rests(seen):
            yield self.fire(seen, ratio, self.small_threshold, f"the update is {ratio:.3g} of the weight, nothing.")


ALL = (
    VanishingGradient, ExplodingTensor, PoorWeightInitialization, DeadRelu, AllZero, UnchangedTensor,
    WeightUpdateRatio,
)  # fmt: skip
