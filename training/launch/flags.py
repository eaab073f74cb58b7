"""The command line: `python -m training.launch COMMAND`, one command a step of the journey."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from training.command_line import positive
from training.launch import autoscaling, batch, hosting, jobs, results
from training.launch.names import DEFAULT_PROJECT
from training.launch.wait import POLL_S

TRAINING_HELP = (
    "Settings of the training (--epochs, --learning-rate, --weights none, ...) may follow, as `python -m {0} --help` "
    "lists them; each becomes a hyperparameter of the job, checked here first. Places are the container's: --output is "
    "where the model comes to here, and --checkpoints, --cache-folder, --device and the like are left out. "
)
WATCHING_HELP = (
    "Two have other meanings here, --profile (of ~/.aws) and --debugger (SageMaker's): the training's own are set in a "
    'recipe, --recipe FILE.toml with the lines profile = false (no profiler) or debugger = "on" (smdebug\'s hook).'
)

SEARCHED_HELP = (
    "--trials N (default: 10), --learning-rate-range LOW:HIGH (0.0001:0.1), --batch-sizes A,B,... (32,64,128,256), "
    "--epochs-range LOW:HIGH (10:70); what is given as a value of its own (--epochs 30) is not searched. --metric is "
    "validation_accuracy here."
)


def parser() -> argparse.ArgumentParser:
    """All commands with their flags."""
    top = argparse.ArgumentParser(
        prog="python -m training.launch", description="Train, tune, deploy and call the model on Amazon SageMaker.",
        epilog="Every command may be repeated: it finds what is there already and goes on from it.",
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, **more: object) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **more)  # type: ignore[arg-type]
        _common(made)
        return made

    one = add("preflight", "look at everything that could go wrong before anything costs")
    one.add_argument(
        "--image", help="in ECR, for training and the endpoint alike (default: those that make push noted)"
    )
    one.add_argument("--role", help=ROLE)
    one.add_argument("--instance", default=jobs.INSTANCE, help="for training (default: %(default)s)")
    one.add_argument("--instances", type=positive, default=1, help="hosts of one training (default: %(default)s)")
    one.add_argument("--parallel", type=positive, default=1, help="trainings at once (default: %(default)s)")
    one.add_argument("--spot", action="store_true", help="look at the quota of one training on spare capacity as well")
    one.add_argument("--kind", choices=KINDS, default="realtime", help="of the endpoint (default: %(default)s)")
    one.add_argument(
        "--min", type=between(0, 1000), dest="min_count", help="instances of the endpoint at least (default: 1)"
    )  # fmt: skip
    one.add_argument(
        "--max", type=between(1, 1000), dest="max_count", help="instances of the endpoint at most (default: --min)"
    )  # fmt: skip
    one.add_argument("--hosting-instance", default=hosting.INSTANCE, help="for the endpoint (default: %(default)s)")
    one.add_argument(
        "--max-concurrency", type=positive, default=hosting.MAX_CONCURRENCY,
        help="of a serverless endpoint (default: %(default)s)",
    )  # fmt: skip
    one.add_argument("--batch-instance", default=batch.INSTANCE, help="for batch (default: %(default)s)")
    one.add_argument("--ami", help="InferenceAmiVersion of the endpoint (default: the one CUDA 13 needs)")
    one.add_argument("--startup-seconds", type=positive, default=hosting.STARTUP_S, help="default: %(default)s")

    one = add("iam-role", "make the role that jobs and endpoints run as, with the permissions they need and no more")
    one.add_argument("--mlflow", type=mlflow_arn, metavar="ARN", help="MLflow app or server that jobs may report to")
    one.add_argument(
        "--policy", action="store_true", help="print both its policies as JSON, for who makes roles; change nothing"
    )
    _dry_run(one)

    one = add("upload", "check data and bring it to S3; sends only what is not there")
    _data(one, required=True)
    one.add_argument(
        "--broken-files", choices=("refuse", "skip"), default="refuse",
        help="skip: go on where files cannot be decoded, as 'train --broken-files skip' does (default: %(default)s)",
    )  # fmt: skip
    _dry_run(one)

    one = add("train", "train on SageMaker, follow the log, bring the model home",
        epilog=TRAINING_HELP.format("training.train_model") + WATCHING_HELP,
    )  # fmt: skip
    _job(one, "it goes on from its checkpoints")
    one.add_argument("--output", type=Path, default=Path("artifacts/sagemaker"), help="default: %(default)s")
    one.add_argument(
        "--keep-warm-minutes", type=between(0, 60), default=0, help="keep the instance for the next job; it is billed"
    )
    one.add_argument("--debugger", action="store_true", help="SageMaker Debugger's hook, rules and profiler")
    one.add_argument(
        "--mlflow", type=mlflow_arn, metavar="ARN",
        help="SageMaker MLflow app or tracking server to report to (`iam-role --mlflow ARN` permits it)",
    )  # fmt: skip

    one = add(
        "tune",
        "search learning rate, batch size and epochs in parallel jobs",
        epilog=TRAINING_HELP.format("training.hpo"),
    )
    one.add_argument_group("what is searched (`python -m training.hpo --help` tells more)", SEARCHED_HELP)
    _job(one, "a trial that loses its machine begins anew")
    one.add_argument(
        "--output", type=Path, default=Path("artifacts/sagemaker-tuning"),
        help="folder of best.json and of the best trial's model (default: %(default)s)",
    )  # fmt: skip
    one.add_argument("--parallel", type=positive, default=2, help="trials at once (default: %(default)s)")
    one.add_argument(
        "--strategy", choices=("Bayesian", "Random"), default="Bayesian", help="of the search (default: %(default)s)"
    )
    one.add_argument("--no-early-stopping", action="store_true", help="let trials that fall behind go on")

    one = add("deploy", "register the model, create or update the endpoint, scale it, test it with real images")
    _model(one)
    one.add_argument(
        "--kind", choices=KINDS, default="realtime",
        help="realtime answers within 60 s on instances that always run, serverless costs nothing while it waits, "
        "async takes long requests through S3 and may go down to 0 instances (default: %(default)s)",
    )  # fmt: skip
    one.add_argument("--instance", default=hosting.INSTANCE, help="default: %(default)s")
    one.add_argument(
        "--min",
        type=between(0, 1000),
        dest="min_count",
        help="instances at least (default: 1; without --min and --max as it scales)",
    )
    one.add_argument(
        "--max", type=between(1, 1000), dest="max_count",
        help="instances at most (default: --min, no autoscaling; without either it scales on as it does)",
    )  # fmt: skip
    for name, ours in vars(hosting.Targets()).items():
        one.add_argument(
            autoscaling.flag_of(name), type=up_to(1_000_000), metavar="N",
            help=f"add instances where one has more {autoscaling.UNITS[name]} (default: as it does, else {ours:g})",
        )  # fmt: skip
    one.add_argument("--ami", help="InferenceAmiVersion (default: the one CUDA 13 needs)")
    one.add_argument(
        "--startup-seconds", type=between(60, 3600), default=hosting.STARTUP_S, help="default: %(default)s"
    )
    one.add_argument(
        "--capture-percent", type=between(0, 100), default=0, help="share of requests stored in S3 (default: none)"
    )
    one.add_argument(
        "--memory", type=int, default=hosting.MEMORY_MB, help="MB of a serverless endpoint (default: %(default)s)"
    )
    one.add_argument(
        "--max-concurrency", type=between(1, 1000), default=hosting.MAX_CONCURRENCY,
        help="of serverless and async (default: %(default)s)",
    )  # fmt: skip
    one.add_argument("--shadow", metavar="MODEL", help="a second model that gets a copy of every request")
    one.add_argument(
        "--approval", choices=("Approved", "PendingManualApproval"), default="Approved",
        help="of the model's version in the registry; one that is pending is not deployed (default: %(default)s)",
    )  # fmt: skip
    one.add_argument(
        "--smoke", type=Path, nargs="*", default=[], help="images or folders to test with, in place of its own example"
    )

    one = add("invoke", "classify images with an endpoint, or with a service at an address")
    where = one.add_mutually_exclusive_group()
    where.add_argument("--url", help="address of a service, such as http://127.0.0.1:8080")
    where.add_argument("--endpoint", type=endpoint_name, help="endpoint's name (default: the project's)")
    one.add_argument(
        "--asynchronous", action="store_true", help="the endpoint is asynchronous, where that may not be looked up"
    )
    _images(one)
    one.add_argument("--concurrency", type=between(1, 1000), default=8, help="requests at once (default: %(default)s)")

    one = add("batch", "classify images with a batch transform job, which ends when it is done")
    _model(one)
    _images(one)
    one.add_argument(
        "--instance", default=batch.INSTANCE, help="default: %(default)s; one with a GPU runs the image for GPUs"
    )
    one.add_argument("--instances", type=positive, default=1, help="default: %(default)s")

    add("status", "what the project has at AWS: a table on stdout, what the endpoint runs and costs, jobs that run")
    one = add("logs", "write the log of a job, or of the endpoint, to stdout")
    one.add_argument("name", nargs="?", metavar="NAME", help="a job or trial, or `endpoint` (default: the newest job)")
    one.add_argument("--follow", action="store_true", help="and the lines that come, until the job has ended")
    one.add_argument("--lines", type=between(1, 10_000), default=100, help="so many at most (default: %(default)s)")
    one = add("stop", "end jobs (training, tuning, batch) and wait until they have; what they wrote stays")
    one.add_argument("jobs", nargs="*", metavar="JOB", help="without one, those that run are listed, and you are asked")
    one.add_argument("--yes", action="store_true", help="do not ask: all that run")
    _dry_run(one)
    one = add("delete", "list what the project has at AWS, ask, and remove it")
    one.add_argument("--data", action="store_true", dest="with_data", help="what these commands wrote to S3 too")
    one.add_argument(
        "--role", action="store_true", dest="with_role", help="the role that iam-role made too, of all regions"
    )
    one.add_argument("--yes", action="store_true", help="do not ask")
    _dry_run(one)
    return top


def options_of(command: str) -> list[str]:
    """A command's flags, as they are typed."""
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    return [text for action in actions for text in action.option_strings if text.startswith("--")]


KINDS = ("realtime", "serverless", "async")
PUSHED_HELP = "(default: what make push noted in artifacts/image.json)"
MAX_HOURS = 672
"""AWS lets a job run 28 days at most."""
ROLE = "ARN or name of the role jobs run as (default: the project's, else this machine's)"


def up_to(most: float) -> Callable[[str], float]:
    """What reads a flag's number above 0 and up to `most`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"given {text}, allowed are numbers above 0, up to {most:g}")
        return value

    return number


def between(low: int, high: int) -> Callable[[str], int]:
    """What reads a flag's whole number from `low` to `high`."""

    def number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"given {text}, allowed are whole numbers from {low} to {high}")
        return int(text)

    return number


def endpoint_name(text: str) -> str:
    """A flag's name of an endpoint, as AWS allows them. Raises: argparse.ArgumentTypeError."""
    if not re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", text):
        raise argparse.ArgumentTypeError(
            f"given {text}, allowed are up to 63 letters and digits, with hyphens between them; `status` names "
            "the project's"
        )
    return text


def mlflow_arn(text: str) -> str:
    """A flag's ARN of SageMaker's MLflow. Raises: argparse.ArgumentTypeError."""
    if not re.fullmatch(r"arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:mlflow-(app|tracking-server)/.+", text):
        raise argparse.ArgumentTypeError(
            f"given {text}, allowed is an ARN such as arn:aws:sagemaker:REGION:ACCOUNT:mlflow-app/NAME; a server at an "
            "address is --mlflow-uri"
        )
    return text


def _common(one: argparse.ArgumentParser) -> None:
    one.add_argument("--project", default=DEFAULT_PROJECT, help="name that everything carries (default: %(default)s)")
    one.add_argument("--region", help="default: as in ~/.aws or AWS_DEFAULT_REGION")
    one.add_argument("--profile", help="of ~/.aws (default: AWS_PROFILE)")
    one.add_argument("--bucket", help="default: SageMaker's own, sagemaker-REGION-ACCOUNT")
    one.add_argument(
        "--poll-seconds", type=up_to(3600), default=POLL_S, help="how often AWS is asked (default: %(default)g)"
    )


def _dry_run(one: argparse.ArgumentParser) -> None:
    one.add_argument("--dry-run", action="store_true", help="say what would be done and what it costs; change nothing")


def _data(one: argparse.ArgumentParser, required: bool) -> None:
    one.add_argument("--data", required=required, help="folder as for train_model, or s3://bucket/folder/")
    one.add_argument("--validation", help="folder to validate on, likewise")
    one.add_argument(
        "--weights", help="pretrained weights: imagenet, none, or a file, which is uploaded (default: imagenet)"
    )  # fmt: skip


def _job(one: argparse.ArgumentParser, interrupted: str) -> None:
    """`interrupted`: what becomes of a training from which spare capacity is taken."""
    _data(one, required=True)
    one.add_argument("--image", help=f"in ECR; it must understand `train` {PUSHED_HELP}")
    one.add_argument(
        "--send-code", action="store_true",
        help="--image is AWS's PyTorch image, or another with SageMaker's training toolkit: it gets our code and "
        "installs what that needs",
    )  # fmt: skip
    one.add_argument("--role", help=ROLE)
    one.add_argument("--instance", default=jobs.INSTANCE, help="default: %(default)s")
    one.add_argument("--instances", type=positive, default=1, help="hosts of one training (default: %(default)s)")
    one.add_argument("--volume-gb", type=between(1, 16384), default=50, help="default: %(default)s")
    one.add_argument(
        "--max-hours", type=up_to(MAX_HOURS), default=24.0, help="AWS ends the job then (default: %(default)g)"
    )
    one.add_argument("--spot", action="store_true", help=f"spare capacity: cheaper, may be taken away; {interrupted}")
    one.add_argument(
        "--retries", type=between(1, 30), default=1, help="after AWS's own failures (default: %(default)s)"
    )
    one.add_argument("--no-wait", action="store_true", help="start and return; the same command waits later")
    _dry_run(one)


def _model(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--model", help="artifact folder, model.tar.gz, s3:// address, or training job (default: the newest job's)"
    )  # fmt: skip
    one.add_argument("--image", help=f"in ECR; it must understand `serve` {PUSHED_HELP}")
    one.add_argument("--role", help=ROLE)
    one.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the container; repeatable")
    _dry_run(one)


def _images(one: argparse.ArgumentParser) -> None:
    one.add_argument("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER")
    one.add_argument(
        "--output", type=Path, help="file.csv, .json (one array) or .jsonl (an object a line; default: CSV on stdout)"
    )
    one.add_argument(
        "--format", choices=get_args(results.Format), help="of the results (default: by --output's ending, else csv)"
    )
