"""SageMaker Debugger's own hook: writes a run's tensors in smdebug's format, for its tools, and for AWS's rules where
an account still has them.

smdebug 1.0.34 is the last version, so what it does wrong is worked around here:
- a scalar saved at a step whose tensors are not saved appears at a later step, or never (awslabs/sagemaker-debugger
  #22): scalars are saved at saved steps only, and written at once;
- it counts steps from 0, of all processes since the start of this one: its count is set to ours, and what it would
  save at step 0 is saved at the first step;
- it refuses a folder that an ended run has written to: a later run gets the folder with a number behind it;
- it saves validation batches into the steps of their own count: of validation only an epoch's figures are saved;
- it keeps frozen weights, which never change, at every saved step: only trained ones are kept (and gradients are
  asked only of these; of frozen ones they would fail, #184), those that begin to be trained later from then on;
- it looks at activations after the pass, when an inplace ReLU has overwritten its input: what is saved as
  relu_input is the output. `Observer` looks before.
"""

import atexit
import importlib
import json
import logging
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from training.callbacks import Callback, RunContext, Step
from training.debugging.observer import trained_parameters
from training.epoch_metrics import EpochMetrics
from training.errors import ConfigError

log = logging.getLogger(__name__)

Configuration = dict[str, Any]

PARAMETERS = {"weights": "^(?!gradient).*weight", "biases": "^(?!gradient).*bias"}
"""Debugger's collections of parameters, and the regular expression that each has where nothing else is configured."""


class SmdebugHook(Callback):
    """Without smdebug: one line in the log, and training is the same."""

    def __init__(
        self,
        config_path: Path | None = None,
        out_dir: Path | None = None,
        save_interval: int = 500,
        activation_regex: str = r".*(relu|activation)_output",
    ) -> None:
        """`config_path`: SageMaker's JSON; it decides everything, but for `out_dir` when that is given too.

        Without it: losses, trained weights, gradients and what `activation_regex` matches are kept in `out_dir` (None:
        `tensors` in the run's folder) at the first step and every `save_interval` steps, once an epoch at least,
        whole; for ResNet-34's last block that is 100 MB each time.
        """
        self._config_path, self._out_dir = config_path, out_dir
        self._local = (save_interval, activation_regex)
        self._hook: Any = None

    @property
    def out_dir(self) -> Path | None:
        """Where the tensors are written; None before the start, and without smdebug."""
        return Path(self._hook.out_dir) if self._hook is not None else None

    def on_run_start(self, context: RunContext) -> None:
        """See `Callback`. Raises: ConfigError when the configuration cannot be read."""
        configuration = self._configuration(context)
        smd = import_smdebug()
        if smd is None:
            log.warning(
                "smdebug is not installed: Debugger's tensors are not written (uv sync --inexact --group debugger)."
            )
            return
        self._smd = smd
        path = context.folder / "debughookconfig.json"
        path.write_text(json.dumps(configuration, indent=2), encoding="utf-8")
        try:
            hook = _quiet(smd).create_from_json_file(str(path))
        except Exception as exc:
            raise ConfigError(f"smdebug does not accept its configuration {path}: {exc}") from exc
        self._watched = (context.network, context.criterion)
        self._tables = [(table, set(table)) for table in _hooks(*self._watched)]
        self._regexes = {name: [*hook.get_collection(name).include_regex] for name in PARAMETERS}
        self._trained = self._select(hook)
        hook.register_module(context.network)
        hook.register_loss(context.criterion)
        hook.set_mode(smd.modes.TRAIN)
        hook.first_step = context.first_step
        hook._prepare_collections()
        later = range(context.first_step + 1, context.total_steps + 1)
        plans = [collection.save_config for collection in hook._get_all_collections_to_save()]
        if not any(plan.should_save_step(smd.modes.TRAIN, number) for number in later for plan in plans):
            log.warning(
                "smdebug: of the run's %d steps tensors of the first are saved only; give a smaller save_interval",
                context.total_steps,
            )
        self._hook = hook
        log.info("smdebug: tensors go to %s", hook.out_dir)

    def on_epoch_start(self, epoch: int) -> None:
        """See `Callback`."""
        if self._hook is None:
            return
        self._hook.set_mode(self._smd.modes.TRAIN)
        trained = self._select(self._hook)
        for name in trained.keys() - self._trained.keys():  # the hook has asked the others for their gradients
            self._hook.exported_collections = False  # their expressions have changed
            table = _table(trained[name])
            self._tables.append((table, set(table)))
            trained[name].register_hook(self._hook.backward_hook(self._prefix + name))  # type: ignore[no-untyped-call]
        self._trained = trained

    def on_step_start(self, number: int) -> None:
        """See `Callback`."""
        if self._hook is not None:
            self._hook.mode_steps[self._smd.modes.TRAIN] = number - 1  # the forward pass counts one up

    def on_step_end(self, step: Step) -> None:
        """See `Callback`."""
        if self._hook is None:
            return
        if self._hook.writer is not None:  # tensors of this step were saved
            self._hook.save_scalar("batch_loss", step.loss, sm_metric=True)
            self._hook.save_scalar("batch_accuracy", step.accuracy, sm_metric=True)
        self._flush()

    def on_validation_start(self, epoch: int) -> None:
        """See `Callback`."""
        if self._hook is not None:
            self._flush()
            self._hook.set_mode(self._smd.modes.EVAL)

    def on_epoch_end(self, metrics: EpochMetrics) -> None:
        """See `Callback`. Scalars of an epoch are in mode EVAL, whose steps are the epochs."""
        if self._hook is None:
            return
        self._hook.set_mode(self._smd.modes.EVAL)
        self._hook.mode_steps[self._smd.modes.EVAL] = metrics.epoch - 1
        self._hook._increment_step()  # or its file would take the place of the last training step's
        for name, value in (
            ("epoch_loss", metrics.train_loss),
            ("epoch_accuracy", metrics.train_accuracy),
            ("validation_loss", metrics.validation_loss),
            ("validation_accuracy", metrics.validation_accuracy),
        ):
            self._hook.save_scalar(name, value, sm_metric=True)
        self._flush()
        self._hook.set_mode(self._smd.modes.TRAIN)

    def on_run_end(self, error: BaseException | None) -> None:
        """See `Callback`. The network and the loss are left without hooks."""
        if self._hook is None:
            return
        for table, others in self._tables:
            for key in [key for key in table if key not in others]:
                del table[key]
        for watched in self._watched:
            for module in watched.modules():
                module.__dict__.pop("_module_name", None)
        self._hook.close()
        atexit.unregister(self._hook._cleanup)  # would close it again when the process ends
        self._hook = None

    @property
    def _prefix(self) -> str:
        """What smdebug puts before a parameter's name."""
        return f"{type(self._watched[0]).__name__}_"

    def _select(self, hook: Any) -> dict[str, nn.Parameter]:
        """Have the hook save the parameters that are trained now, where its configuration does not name others.

        Returns: these by name.
        """
        network = self._watched[0]
        trained = trained_parameters(network)
        for collection, default in PARAMETERS.items():
            names = "|".join(re.escape(name) for name in trained if name.endswith(default[-4:]))
            hook.get_collection(collection).include_regex[:] = [
                f"^{re.escape(self._prefix)}({names})$" if regex == default else regex
                for regex in self._regexes[collection]
            ]
        hook.tensor_to_collections.clear()  # it keeps what it has found by the expressions of before
        return trained

    def _flush(self) -> None:
        self._hook._close_writers()

    def _configuration(self, context: RunContext) -> Configuration:
        """SageMaker's JSON, or one of our own, with a folder that is free. Raises: ConfigError."""
        interval, activations = self._local
        if self._config_path is not None:
            try:
                configuration = json.loads(self._config_path.read_text(encoding="utf-8"))
                if not isinstance(configuration, dict):
                    raise ValueError("not an object")
            except (OSError, ValueError, RecursionError) as exc:
                raise ConfigError(f"{self._config_path} cannot be read as Debugger's configuration: {exc}.") from exc
        else:
            configuration = {
                "HookParameters": {"save_interval": min(interval, context.steps_per_epoch)},
                "CollectionConfigurations": [{"CollectionName": name} for name in ("losses", "weights", "gradients")]
                + [
                    {"CollectionName": "activations", "CollectionParameters": {"include_regex": activations}},
                ],
            }
        wanted = self._out_dir or Path(
            configuration.get(
                "LocalPath", "/opt/ml/output/tensors" if self._config_path else context.folder / "tensors"
            )
        )
        return configuration | {"LocalPath": str(_free(wanted))}


def import_smdebug() -> ModuleType | None:
    """`smdebug.pytorch`, with its logger quiet; None where it (or what it needs) is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its code is of 2022: old escapes, protobuf descriptors, distutils, six
        logging.disable(logging.INFO)  # it tells of itself while it is imported
        try:
            smd = importlib.import_module("smdebug.pytorch")
        except (ImportError, AttributeError, TypeError) as exc:  # TypeError: generated code and a newer protobuf
            log.debug("smdebug cannot be imported: %s", exc)
            return None
        finally:
            logging.disable(logging.NOTSET)
    # An old six inside pyinstrument, which smdebug brings, would make every later import warn.
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != "pyinstrument.vendor.six"]
    logger = logging.getLogger("smdebug")
    logger.handlers.clear()  # it writes to stdout
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    return smd


def _quiet(smd: ModuleType) -> Any:
    """smdebug's Hook, which saves the first step too, without a warning for each tensor it writes."""

    class QuietHook(smd.Hook):  # type: ignore[name-defined, misc]  # smdebug has no types
        first_step = 1
        _collections_to_save_for_step: Any

        def _get_collections_to_save_for_step(self) -> Any:
            step = self.mode_steps[self.mode]
            if self.mode == smd.modes.TRAIN and step == self.first_step and self._collections_to_save_for_step is None:
                self._collections_to_save_for_step = {
                    collection for collection in self._get_all_collections_to_save()
                    if any(collection.save_config.should_save_step(self.mode, each) for each in (0, step))
                }  # fmt: skip
            return super()._get_collections_to_save_for_step()

        def forward_pre_hook(self, module: nn.Module, inputs: Any) -> None:
            if self._watches(module):
                super().forward_pre_hook(module, inputs)

        def forward_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
            if self._watches(module):
                super().forward_hook(module, inputs, outputs)

        def fhook(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
            if self._watches(module):
                super().fhook(module, inputs, outputs)

        def _watches(self, module: nn.Module) -> bool:
            # Not the copies of a network (of running means, say); and of validation the epoch's figures are enough.
            return self.mode == smd.modes.TRAIN and module in self.module_set

        def __deepcopy__(self, memo: object) -> "QuietHook":
            return self

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return _NoHook, ()

        def _write_raw_tensor_simple(self, *arguments: Any, **named: Any) -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"tostring\(\) is deprecated", DeprecationWarning)
                super()._write_raw_tensor_simple(*arguments, **named)

    return QuietHook


class _NoHook:
    """What a pickled hook becomes: it does nothing."""

    def forward_pre_hook(self, *arguments: object) -> None:
        """Nothing."""

    forward_hook = fhook = forward_pre_hook


def _hooks(network: nn.Module, criterion: nn.Module) -> list[dict[int, Any]]:
    """The tables of hooks of all modules and trained parameters."""
    tables: list[dict[int, Any]] = []
    for module in (*network.modules(), *criterion.modules()):
        tables += [module._forward_hooks, module._forward_pre_hooks]
    tables += [_table(parameter) for parameter in network.parameters() if parameter.requires_grad]
    return tables


def _table(parameter: nn.Parameter) -> dict[int, Any]:
    """The table of a parameter's own hooks, which is made with the first."""
    if parameter._backward_hooks is None:
        parameter.register_hook(lambda gradient: None).remove()  # type: ignore[no-untyped-call]
    table: dict[int, Any] = parameter._backward_hooks  # type: ignore[assignment]
    return table


def _free(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... in which no run has left its marks or events."""
    number, candidate = 1, folder
    while any((candidate / mark).exists() for mark in ("END_OF_JOB.ts", "claim.smd", "events")):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
