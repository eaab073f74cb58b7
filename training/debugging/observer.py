"""Collects observations from a run, every `save_interval` steps; hands them to the rules and to the file.

Reads only: random numbers, gradients and weights are as without it. Hooks sit on the network during observed steps
only, and what does not run (frozen blocks whose features are cached) is not observed.
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.callbacks import Callback, RunContext, Step, StopTraining
from training.debugging import observations as obs
from training.debugging import statistics
from training.debugging.observations import Observation, ObservationFile
from training.debugging.rules import Pace
from training.debugging.verdicts import RuleSet
from training.epoch_metrics import EpochMetrics
from training.errors import TrainingError

log = logging.getLogger(__name__)


class Observer(Callback):
    """See the module. With rules: each observation goes to them as it comes, and they may end the run."""

    def __init__(
        self, save_interval: int = 100, rules: RuleSet | None = None, activation_regex: str | None = None
    ) -> None:
        """`save_interval`: steps between observations; the first step of a run is always observed.

        `activation_regex`: names of the modules whose inputs and outputs are observed; None: the ReLUs beside
        trained layers.
        """
        self._interval, self._rules, self._regex = save_interval, rules, activation_regex
        self._atol = rules.atol if rules else 1e-8
        self._tables: list[tuple[str, obs.Kind, dict[str, Tensor]]] = []
        self._passes: Counter[str] = Counter()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._earlier: dict[str, Tensor] = {}
        self._earlier_step = 0
        self._predicted: Tensor | None = None
        self._last_step = 0
        self._file: ObservationFile | None = None
        self.latest: list[Observation] = []
        """What was seen of the step that was observed last."""

    def on_run_start(self, context: RunContext) -> None:
        """See `Callback`."""
        self._context, self._last_step = context, context.first_step - 1
        self._watch_trained()
        self._prefix = f"{type(context.network).__name__}_"  # smdebug puts the class before a parameter's name
        self._loss_name = f"{type(context.criterion).__name__}_output_0"
        classes = len(context.dataset.classes)
        self._labels = torch.zeros(3, classes, dtype=torch.int64)  # seen, predicted, predicted wrong
        self._losses: Tensor | None = None
        self._losses_seen = 0
        self._file = ObservationFile(context.folder, context.first_step)
        if self._rules is not None:
            self._rules.start(context.folder, self._file.earlier)
        pace = Pace(self._interval, context.steps_per_epoch, context.config.batch_size)
        self._publish([Observation(self._last_step, "run", "start", time.time(), {**vars(pace)})])

    def on_epoch_start(self, epoch: int) -> None:
        """See `Callback`."""
        self._watch_trained()  # blocks may have begun to be trained
        self._progressed()

    def on_step_start(self, number: int) -> None:
        """See `Callback`."""
        self._progressed()
        self._last_step = number
        if not self._observed(number):
            return
        self._passes.clear()
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._input_hook(name)))
            self._handles.append(module.register_forward_hook(self._output_hook(name)))
        self._handles.append(self._context.network.register_forward_hook(self._logits_hook))

    def on_backward_end(self, step: Step) -> None:
        """See `Callback`."""
        if not self._observed(step.number):
            return
        with torch.no_grad():
            state = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
            for (name, before), table in zip(state.items(), statistics.tensor_figures([*state.values()]), strict=True):
                if name in self._earlier:
                    table |= statistics.changes(before, self._earlier[name], self._atol)
                self._tables.append((self._prefix + name, "weight", table))
            gradients = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
            figures = statistics.tensor_figures([*gradients.values()])
            for (name, gradient), table in zip(gradients.items(), figures, strict=True):
                self._tables.append(
                    (f"gradient/{self._prefix}{name}", "gradient", table | statistics.percentiles(gradient))
                )
        self._earlier = state

    def on_step_end(self, step: Step) -> None:
        """See `Callback`. Raises: StopTraining when a rule with the action "stop" fires."""
        self._progressed()
        self._losses_seen += 1
        loss = step.loss_tensor.detach().float()
        self._losses = loss if self._losses is None else self._losses + loss
        self._labels[0] += torch.bincount(step.labels, minlength=self._labels.shape[1])
        if self._observed(step.number):
            self._unhook()
            self.latest = self._seen(step)
            self._clear()
            self._publish(self.latest)
        if self._rules is not None:
            self._rules.check_stalled()

    def on_validation_start(self, epoch: int) -> None:
        """See `Callback`."""
        self._progressed()

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        """See `Callback`. Raises: StopTraining when a rule with the action "stop" fires."""
        self._progressed()
        now = time.time()
        figures = {
            "epoch": metrics.epoch, "epoch_loss": metrics.train_loss, "epoch_accuracy": metrics.train_accuracy,
            "validation_loss": metrics.validation_loss, "validation_accuracy": metrics.validation_accuracy,
        }  # fmt: skip
        self._publish([obs.scalar(self._last_step, f"scalar/{name}", value, now) for name, value in figures.items()])
        if self._rules is not None:
            self._rules.check_stalled()

    def on_run_end(self, error: BaseException | None) -> None:
        """See `Callback`. Of a run that failed, the state it failed in is observed as well."""
        if self._file is None:
            return  # it has not begun
        self._unhook()
        self._clear()
        try:
            if isinstance(error, TrainingError):
                self._publish(self._state())
        except StopTraining:
            pass  # it has ended
        finally:
            self._earlier = {}
            self._file.close()
            if self._rules is not None:
                self._rules.finish()

    def _watch_trained(self) -> None:
        network = self._context.network
        self._trained = trained_parameters(network)
        self._modules = observed_modules(network, self._regex)

    def _observed(self, number: int) -> bool:
        return number % self._interval == 0 or number == self._context.first_step

    def _publish(self, seen: list[Observation]) -> None:
        assert self._file is not None
        self._file.write(seen)
        if self._rules is not None:
            self._rules.observe(seen)

    def _seen(self, step: Step) -> list[Observation]:
        """What was gathered of an observed step, with one wait for the device."""
        assert self._losses is not None
        with torch.no_grad():
            for name, kind, table in self._tables:
                if kind == "weight":
                    before = self._earlier[name.removeprefix(self._prefix)]
                    after = self._trained[name.removeprefix(self._prefix)].detach()
                    table["update_ratio"] = (after - before).norm() / before.norm()
        batch = {"loss": step.loss_tensor, "losses": self._losses, "hits": step.hits_tensor}
        if self._predicted is not None and len(self._predicted) == len(step.labels):
            batch["predicted"] = self._predicted
        first, *others = statistics.transfer([batch, *(table for _, _, table in self._tables)])
        now, number = time.time(), step.number
        loss, mean = first["loss"][0], first["losses"][0] / self._losses_seen
        seen = [
            obs.scalar(number, self._loss_name, loss, now, "loss", mean=mean),
            obs.scalar(number, "scalar/batch_loss", loss, now),
            obs.scalar(number, "scalar/batch_accuracy", first["hits"][0] / len(step.labels), now),
        ]
        for (name, kind, _), figures in zip(self._tables, others, strict=True):
            shares = tuple(round(share, 2) for share in figures.pop("activity", []))
            stats = {figure: value for figure, (value,) in figures.items()}
            if "needed_rtol" in stats:
                stats |= {"since": float(self._earlier_step), "atol": self._atol}
            if kind == "weight":
                stats["rate_share"] = step.learning_rate / self._context.config.learning_rate
            seen.append(Observation(number, name, kind, now, stats, shares))
        self._earlier_step = number
        if "predicted" in first:
            wrong = torch.tensor(first["predicted"], dtype=torch.int64) != step.labels
            self._labels[1] = torch.bincount(step.labels, minlength=self._labels.shape[1])
            self._labels[2] = torch.bincount(step.labels[wrong], minlength=self._labels.shape[1])
        counts = tuple(float(count) for count in self._labels.flatten().tolist())
        return [*seen, Observation(number, "labels", "labels", now, {}, counts)]

    def _state(self) -> list[Observation]:
        """Weights and gradients as they are now."""
        tensors = {self._prefix + name: p.detach() for name, p in self._trained.items()}
        tensors |= {f"gradient/{self._prefix}{name}": p.grad for name, p in self._trained.items() if p.grad is not None}
        tables = statistics.transfer(statistics.tensor_figures([*tensors.values()]))
        figures = [{figure: value for figure, (value,) in table.items()} for table in tables]
        kinds: list[obs.Kind] = ["gradient" if name.startswith("gradient/") else "weight" for name in tensors]
        return [
            Observation(self._last_step, name, kind, time.time(), stats)
            for name, kind, stats in zip(tensors, kinds, figures, strict=True)
        ]

    def _progressed(self) -> None:
        if self._rules is not None:
            self._rules.progressed(self._last_step)

    def _clear(self) -> None:
        self._tables, self._predicted = [], None
        self._labels.zero_()
        self._losses, self._losses_seen = None, 0

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _input_hook(self, name: str) -> Callable[..., None]:
        # Before the pass: an inplace ReLU overwrites its input (smdebug, which looks afterwards, sees the output).
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                seen = f"{name}_input_{self._passes[name]}"
                self._tables.append((seen, "activation_input", statistics.tensor_figures([inputs[0]])[0]))

        return look

    def _output_hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(output, Tensor):
                seen = f"{name}_output_{self._passes[name]}"
                table = statistics.tensor_figures([output])[0]
                if output.ndim > 1:
                    table["activity"] = statistics.activity(output)
                self._tables.append((seen, "activation_output", table))
            self._passes[name] += 1

        return look

    def _logits_hook(self, module: nn.Module, inputs: object, output: object) -> None:
        self._predicted = output.detach().argmax(1) if isinstance(output, Tensor) and output.ndim == 2 else None


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Those that are trained now, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def observed_modules(network: nn.Module, regex: str | None = None) -> dict[str, nn.Module]:
    """Modules by name: those that `regex` matches, or the ReLUs whose neighbours are trained."""
    if regex is not None:
        return {name: module for name, module in network.named_modules() if name and re.search(regex, name)}
    relus: dict[str, nn.Module] = {}
    for name, parent in network.named_modules():
        children = [*parent.named_children()]
        # A neighbour is a layer, not a block: the stem's ReLU lies beside layer4, but belongs to conv1 and bn1.
        layers = [child for _, child in children if not any(True for _ in child.children())]
        if any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
            relus.update({f"{name}.{n}".lstrip("."): child for n, child in children if isinstance(child, nn.ReLU)})
    return relus
