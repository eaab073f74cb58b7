"""The journey, step by step: the README's commands as processes, against the rehearsal's cloud."""

import csv
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.rehearsal.containers import has_compose
from tests.rehearsal.control_plane import ACCOUNT, REGION
from tests.rehearsal.report import Result, Step, Typed
from tests.rehearsal.start import ASKED_OFTEN, IMAGE, Rehearsal
from training.launch.names import DEFAULT_PROJECT

log = logging.getLogger("rehearsal")

RUN = ("--weights", "none", "--quantize", "off", "--augment", "none")
"""Settings of every training here: from random weights, without what takes long and shows nothing more."""


class StepFailed(Exception):
    """What was expected did not come; the message holds what did."""


class Gap(Exception):
    """The step cannot be shown here; the message says why."""


class Journey:
    """Walks through the steps; each is told as PASS or FAIL, and the next is tried all the same."""

    def __init__(
        self, cloud: Rehearsal, folder: Path, data: Path, pictures: Path, images: tuple[str, str] | None
    ) -> None:
        """`images`: what trains and what serves in containers; None where jobs and endpoints are processes."""
        self._cloud, self._folder, self._data, self._pictures = cloud, folder, data, pictures
        self._images = images
        self.steps: list[Step] = []
        self._typed: list[Typed] = []
        """By the step that is being walked."""

    def walk(self) -> list[Step]:
        """Everything, then what is left is looked at."""
        for step in (
            self.preflight_says_what_is_missing, self.role, self.preflight_passes, self.upload_and_again, self.tune,
            self.train_and_leave, self.train_again_waits, self.deploy, self.deploy_again, self.update_with_shadow,
            self.invoke, self.batch_agrees, self.serverless, self.asynchronous, self.sdk, self.sdk_local,
            self.status, self.delete, self.nothing_is_left,
        ):  # fmt: skip
            self._step(step)
        return self.steps

    def _step(self, work: Callable[[], str]) -> None:
        name, start_s = work.__name__.replace("_", " "), time.monotonic()
        result: Result = "PASS"
        self._typed = []
        try:
            shown = work()
        except Gap as exc:
            result, shown = "GAP", str(exc)
        except Exception as exc:  # whatever it is: the other steps are walked, and the report is written
            result, shown = "FAIL", f"{type(exc).__name__}: {exc}"
        step = Step(name, result, time.monotonic() - start_s, shown, self._typed)
        self.steps.append(step)
        log.info("%s %s (%.0f s): %s", step.result, step.name, step.seconds, step.shown)

    def _run(self, *arguments: object, status: int = 0, say: str = "") -> str:
        """A command; what it wrote to stderr and stdout. Raises: StepFailed."""
        done = self._cloud.launch(*arguments)
        wrote = done.stderr + done.stdout
        self._typed.append(Typed([*map(str, arguments), *ASKED_OFTEN], done.returncode, wrote))
        if done.returncode != status:
            raise StepFailed(f"exit status {done.returncode}: {wrote[-1500:]}")
        if say not in wrote:
            raise StepFailed(f"it did not say {say!r}: {wrote[-1500:]}")
        return wrote

    def _objects(self, part: str) -> list[str]:
        """The keys of what the project has in S3 below this folder."""
        s3 = self._cloud.client("s3")
        pages = s3.get_paginator("list_objects_v2").paginate(
            Bucket=f"sagemaker-{REGION}-{ACCOUNT}", Prefix=f"{DEFAULT_PROJECT}/{part}/"
        )
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def preflight_says_what_is_missing(self) -> str:
        self._run("preflight", "--image", IMAGE, status=1, say="Not ready: role, image")
        return "no role, no image: both named, with what to do; exit status 1"

    def role(self) -> str:
        self._run("iam-role", say="is made")
        self._run("iam-role", say="was there")
        return "made, and brought up to date the second time"

    def preflight_passes(self) -> str:
        self._cloud.push_image()
        wrote = self._run("preflight", "--image", IMAGE, say="driver 580")
        return f"{wrote.count('PASS')} checks passed"

    def upload_and_again(self) -> str:
        self._run("upload", "--data", self._data, say="files sent")
        self._run("upload", "--data", self._data, say=": 0 of ")
        return "checked, uploaded; the second time nothing is sent"

    def tune(self) -> str:
        self._run(
            "tune", "--data", self._data, "--image", IMAGE, "--output", self._folder / "tuning", "--trials", 2,
            "--parallel", 2, "--learning-rate-range", "0.005:0.05", "--epochs-range", "2:4", "--batch-sizes", "8,16",
            *RUN,
            say="Completed, 2 trials done",
        )  # fmt: skip
        best = self._best()
        found = ", ".join(f"{name} {value:.4g}" for name, value in best.items())
        return f"2 trials in parallel; best: {found}; {_right(self._folder / 'tuning' / 'model')}"

    def _best(self) -> dict[str, float]:
        """What the tuning found: hyperparameters by name."""
        best = json.loads((self._folder / "tuning" / "best.json").read_text())
        return dict(best["hyperparameters"])

    def _train(self, *more: object, **expected: str) -> str:
        best = self._folder / "tuning" / "best.json"
        return self._run(
            "train", "--data", self._data, "--image", IMAGE, "--output", self._folder / "model", "--spot",
            "--from-tuning", best, "--quantize", "off", *more, **expected,
        )  # fmt: skip

    def train_and_leave(self) -> str:
        self._train("--no-wait", say="is started")
        return "spot job with checkpoints from best.json started, not waited for"

    def train_again_waits(self) -> str:
        wrote = self._train(say="for this very request is there")
        best = self._best()
        last = f"epoch={best['epochs']}/{best['epochs']}"
        if last not in wrote:  # it may have ended meanwhile
            wrote += self._run("logs")
        if last not in wrote:
            raise StepFailed(f"the log's lines were not shown: {wrote[-1500:]}")
        used = _manifest(self._folder / "model")["hyperparameters"]
        if {name: used[name] for name in best} != best:
            raise StepFailed(f"trained with {used}, not with what the tuning found: {best}")
        if not (self._folder / "model-run" / "report.html").is_file():
            raise StepFailed("the report was not brought home")
        written = self._objects("tensorboard")
        if not any("/tensorboard-output/events.out.tfevents" in key for key in written):
            raise StepFailed(f"no curves for TensorBoard in S3: {written}")
        return (
            "the same command found its job, showed its log, brought the model home, trained anew with the best "
            f"trial's settings; {_right(self._folder / 'model')}"
        )

    def deploy(self) -> str:
        wrote = self._run(
            "deploy", "--image", IMAGE, "--max", 3, "--capture-percent", 100, "--smoke", self._pictures,
            say="predicts as this machine does",
        )  # fmt: skip
        if "scales from 1 to 3 instances" not in wrote:
            raise StepFailed(f"no autoscaling: {wrote[-1500:]}")
        client = self._cloud.client("application-autoscaling")
        policies = client.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
        metrics = [
            policy["TargetTrackingScalingPolicyConfiguration"]["PredefinedMetricSpecification"]["PredefinedMetricType"]
            for policy in policies
        ]
        if len(metrics) != 2:
            raise StepFailed(f"policies {metrics}")
        if not self._objects("captured"):
            raise StepFailed("nothing of the smoke test's requests was captured")
        return (
            "newest job's model registered, endpoint answers as this machine does, scaled on requests and concurrency"
        )

    def deploy_again(self) -> str:
        self._run("deploy", "--image", IMAGE, "--max", 3, "--capture-percent", 100, say="is unchanged")
        return "nothing to do, found in AWS's state"

    def update_with_shadow(self) -> str:
        self._run(
            "deploy", "--image", IMAGE, "--model", self._folder / "tuning" / "model", "--shadow",
            self._folder / "model", "--max", 3, say="is updated",
        )  # fmt: skip
        if len(self._cloud.ask("/rehearsal/leftovers")["servers"]) != 2:
            raise StepFailed("the shadow does not run")
        return "another model in place, the first as shadow; both run, callers see the new one"

    def invoke(self) -> str:
        output = self._folder / "answers.csv"
        self._run("invoke", self._pictures, "--output", output, "--concurrency", 4, say="0 with a problem")
        rows = _rows(output)
        right = sum(Path(row["file"]).stem.startswith(row["label"]) for row in rows)
        return f"{len(rows)} pictures, {right} of them right (by the model of the best trial, which the update brought)"

    def batch_agrees(self) -> str:
        output = self._folder / "batch.csv"
        self._run(
            "batch", "--image", IMAGE, "--model", self._folder / "tuning" / "model", "--output", output, self._pictures,
            say="0 with a problem",
        )  # fmt: skip
        there, here = _rows(output), _rows(self._folder / "answers.csv")
        if [row["label"] for row in there] != [row["label"] for row in here]:
            raise StepFailed("batch transform and endpoint give other labels")
        return f"{len(there)} pictures, the same labels as from the endpoint"

    def serverless(self) -> str:
        project = ("--project", "resnet34-sless")
        model = ("--model", self._folder / "model", "--image", IMAGE, "--role", "resnet34-sagemaker")
        self._run("deploy", *project, *model, "--kind", "serverless", say="is created")
        self._run("delete", *project, "--yes", "--data", say="all of it is removed")
        return "created, tested, removed"

    def asynchronous(self) -> str:
        project = ("--project", "resnet34-async")
        model = ("--model", self._folder / "model", "--image", IMAGE, "--role", "resnet34-sagemaker")
        self._run("deploy", *project, *model, "--kind", "async", "--min", 0, "--max", 2, say="scales from 0 to 2")
        picture = sorted(self._pictures.iterdir())[0]
        self._run("invoke", *project, picture)
        self._run("delete", *project, "--yes", "--data", say="all of it is removed")
        return "created, answered through S3, removed"

    def sdk(self) -> str:
        from tests.rehearsal.sdk import train_by_sdk

        return train_by_sdk(self._cloud, self._data)

    def sdk_local(self) -> str:
        if self._images is None:
            raise Gap("the SDK's local mode needs a container engine")
        if not has_compose():
            raise Gap("the SDK's local mode needs docker compose")
        from tests.rehearsal.sdk import serve_by_sdk, train_here_by_sdk

        train, serve = self._images
        archive = train_here_by_sdk(self._cloud, self._data, self._folder, train)
        served = serve_by_sdk(self._cloud, archive, self._pictures, serve)
        return f"ModelTrainer in LOCAL_CONTAINER mode trained with {train}; {served}"

    def status(self) -> str:
        wrote = self._run("status", say="1 running, 1 desired")
        return f"{len(wrote.splitlines())} lines: what is there, what the endpoint runs and costs, where logs are"

    def delete(self) -> str:
        self._run("delete", "--data", "--role", "--dry-run", say="to be removed")
        self._run("delete", status=2, say="--yes")
        wrote = self._run("delete", "--data", "--role", "--yes", say="all of it is removed")
        return f"listed, not without being asked, then {wrote.count('removed ')} things removed"

    def nothing_is_left(self) -> str:
        found = {**self._cloud.ask("/rehearsal/leftovers"), **self._cloud.ask("/rehearsal/traces")}
        left = {kind: names for kind, names in found.items() if names}
        if left:
            raise StepFailed(f"still there: {left}")
        return f"no {', '.join(found)}"


def _manifest(model: Path) -> dict[str, Any]:
    return dict(json.loads((model / "manifest.json").read_text()))


def _right(model: Path) -> str:
    """A model's accuracy in words, with the number of images, which are few: one more or less is points."""
    figures = _manifest(model)["metrics"]["validation"]
    return f"{round(figures['accuracy'] * figures['n'])} of {figures['n']} validation images right"


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))
