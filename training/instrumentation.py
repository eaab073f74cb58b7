"""What watches a training of `train_model.py`: Debugger's hook and rules, profiler, TensorBoard, MLflow.

The same flags and hyperparameters as the training's own settings (see `training.config`); none of them changes what is
trained, unless a rule with the action "stop" ends the run.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.environment import SageMakerJob
from training.errors import ConfigError
from training.flags import Settings

if TYPE_CHECKING:
    from training.callbacks import Callback


class Instrumentation(Settings):
    """Which instruments a run has."""

    observe_every: int = Field(
        100, ge=0, description="steps between observations of weights, gradients and activations for the rules; 0: none"
    )
    rules: str = Field(
        "all", description="debugging rules that watch the run: all, none, or a .json or .toml file with a list of them"
    )
    observe_modules: str | None = Field(
        None, description="regular expression of the modules whose activations are observed; default: trained ReLUs"
    )
    debugger: Literal["auto", "on", "off"] = Field(
        "auto",
        description="smdebug's hook, which saves tensors as SageMaker Debugger does; auto: where SageMaker configures "
        "it; on: into RUN_FOLDER/tensors too",
    )
    debugger_interval: int = Field(
        500,
        ge=1,
        description="steps between saves of --debugger on, but once an epoch at least, and the first step too: 100 MB "
        "each for the blocks that are trained",
    )
    debugger_activations: str = Field(
        r".*(relu|activation)_output", description="regular expression of the activations that --debugger on saves"
    )
    debugger_folder: Path | None = Field(
        None, description="folder for the tensors of --debugger on; default: RUN_FOLDER/tensors"
    )
    tensorboard: bool = Field(True, description="scalars and histograms into RUN_FOLDER/tensorboard")
    mlflow_uri: str | None = Field(None, description="MLflow's tracking server or store to report to; default: none")
    profile: bool = Field(
        True, description="find out where the time goes: profile.json and a trace of a few steps in RUN_FOLDER"
    )

    def callbacks(self, job: SageMakerJob | None) -> "list[Callback]":
        """The instruments, in the order in which they are told.

        Raises: ConfigError for rules that are none, and for what was asked for by name and is not installed.
        """
        from training.debugging.configuration import create_rules, read_rules
        from training.debugging.mlflow_log import MlflowLog
        from training.debugging.observer import Observer
        from training.debugging.smdebug_hook import SmdebugHook, import_smdebug
        from training.debugging.tensorboard import TensorBoardLog
        from training.metrics_log import MetricsLog
        from training.profiling.profiler import Profiler

        if self.debugger == "on" and import_smdebug() is None:
            raise ConfigError(
                "--debugger on needs smdebug, which cannot be imported: `uv sync --inexact --group debugger` installs "
                "it; the rules run without, and --debugger auto saves tensors only where it is there."
            )
        if self.mlflow_uri and importlib.util.find_spec("mlflow") is None:
            raise ConfigError(
                f"--mlflow-uri {self.mlflow_uri} needs mlflow, which is not installed: `uv sync --inexact --group "
                "mlflow` installs it; TensorBoard's files are written without."
            )
        chosen: list[Callback] = [MetricsLog()]
        hook_config = job.debug_hook_config if job else None
        if self.debugger == "on" or (self.debugger == "auto" and hook_config is not None):
            chosen.append(
                SmdebugHook(hook_config, self.debugger_folder, self.debugger_interval, self.debugger_activations)
            )
        observer = None
        if self.observe_every:
            rules = None
            if self.rules != "none":
                rules = create_rules() if self.rules == "all" else read_rules(Path(self.rules))
            observer = Observer(self.observe_every, rules, self.observe_modules)
            chosen.append(observer)
        if self.tensorboard:  # after the observer, as it shows the rules' verdicts
            chosen.append(TensorBoardLog())
        if self.mlflow_uri:  # likewise
            chosen.append(MlflowLog(self.mlflow_uri, run_name=job.name if job else None, observer=observer))
        if self.profile:
            chosen.append(Profiler())
        return chosen
