"""`python -m training`: what the container's `train` runs. One process, or torchrun with one a GPU.

The flag or hyperparameter `entry` says what runs: `train_model` (default), or `hpo`, a search on one host. All
other flags are those of what runs. Exit status: that of what runs, see there; 2 for wrong settings.
"""

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.command_line import configure_logging
from training.environment import ENTRY, ROOT, SageMakerJob, ranks, sagemaker_job, write_failure
from training.errors import ConfigError
from training.torchrun import command, run_child, variables, wait_for_name

log = logging.getLogger("training")

ENTRIES = {"train_model": "training.train_model", "hpo": "training.hpo"}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run what is asked for; returns the exit status."""
    configure_logging()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        job = sagemaker_job(root)
        implied = dict(job.hyperparameters) if job is not None else {}
        entry, rest = split_entry(given, str(implied.get(ENTRY, "train_model")))
        # In a job hpo makes one training, unless it is asked for a study of its own.
        study = entry == "hpo" and (job is None or "trials" in implied or take_flag(rest, "trials")[0] is not None)
        if study and job is not None and len(job.hosts) > 1:
            raise ConfigError(
                f"a study (hyperparameter trials) runs on one host, this job has {len(job.hosts)}; set its instance "
                "count to 1, or let SageMaker tune: each trial is then a job."
            )
        processes = gpus(take_flag(rest, "device")[0] or str(implied.get("device", "auto"))) or 1
        if study or ranks().is_distributed or (processes == 1 and (job is None or len(job.hosts) == 1)):
            return int(importlib.import_module(ENTRIES[entry]).main(rest))
        if job is not None and len(job.hosts) > 1:
            wait_for_name(job.hosts[0])
        environment = variables(processes, job)
        log_start(processes, job, environment)
        status = run_child(command(ENTRIES[entry], rest, processes, job), environment)
        if status not in (0, 130, 143):  # where a process has said more, that stays
            write_failure(f"The training ended with status {status}; the log says more.", root=root)
        return status
    except ConfigError as exc:
        log.error("%s", exc)
        write_failure(str(exc), root=root)
        return 2


def split_entry(arguments: Sequence[str], default: str) -> tuple[str, list[str]]:
    """What is to run, and the arguments without `--entry`. Raises: ConfigError."""
    given, rest = take_flag(arguments, ENTRY)
    entry = default if given is None else given
    if entry not in ENTRIES:
        raise ConfigError(f"entry {entry or '(nothing)'}: known are {', '.join(ENTRIES)}.")
    return entry, rest


def take_flag(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `--flag VALUE` or `--flag=VALUE`, None where it is not given, and the other arguments."""
    value, rest = None, []
    left = iter(arguments)
    for argument in left:
        name, equals, text = argument.partition("=")
        if name == f"--{flag}":
            value = text if equals else next(left, "")
        else:
            rest.append(argument)
    return value, rest


def gpus(device: str) -> int:
    """How many GPUs the run may use: all, but none where `device` asks for something else."""
    if device not in ("auto", "cuda"):
        return 0
    import torch  # takes seconds: not before the entry is right

    return torch.cuda.device_count()


def log_start(processes: int, job: SageMakerJob | None, environment: Mapping[str, str]) -> None:
    """Say how many processes start where, and what is added to their environment."""
    hosts = ("this machine",) if job is None else job.hosts
    log.info(
        "torchrun: %d process(es) on each of %d host(s) (%s), %s",
        processes, len(hosts), ", ".join(hosts), " ".join(f"{name}={value}" for name, value in environment.items()),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
