"""What a rehearsal showed, as text and as Markdown; and what was typed for it, with what came back."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Result = Literal["PASS", "FAIL", "GAP"]

GAPS = {
    "permissions": "moto lets everyone do everything; preflight's simulation reads inline policies only",
    "registry": "the image is entered into moto's ECR, not pulled from it; the engine runs its own",
    "GPU": "no driver, no CUDA, no InferenceAmiVersion: instance types are names here",
    "quotas, capacity, prices": "invented quotas; capacity errors are ordered by tests (tests/launch)",
    "spot": "nobody takes the machine away; what a job does then, tests/launch/test_resume.py ends it for",
    "warm pool": "KeepAlivePeriodInSeconds is checked against AWS's model; no machine is kept",
    "AWS's own tries": "RetryStrategy is checked against AWS's model; nothing is tried again",
    "AWS's PyTorch image": "--send-code is run by AWS's toolkit with packages of this machine (tests/launch/"
    "test_source.py), not in that image, and requirements.txt is not installed there",
    "MLflow": "MlflowConfig is checked against AWS's model; no app, no tracking server",
    "IAM": "roles and policies hold at once; at AWS seconds later, which tests/launch/test_interrupted.py orders",
    "capture, shadow": "the copies in S3 and to the shadow are made by the rehearsal, not by SageMaker",
    "the SDK's local mode": "training and hosting by our images where there is an engine with compose; on one host, "
    "without a GPU, with data of this machine",
    "several hosts": "one host a job; two of one job are run by tests/training/test_hosts.py",
    "the tuner's strategy": "trials are drawn at random; Bayesian search and early stopping are AWS's",
    "blue/green": "the swap is real, alarms do not fire; traffic is not shifted bit by bit",
    "autoscaling": "targets and policies are kept and checked; nothing scales",
    "metrics": "CloudWatch's graphs, and its reading of /metrics, are AWS's",
    "Debugger": "requests are checked against AWS's model; no hook's configuration reaches the job, no rule container "
    "runs",
    "network": "no VPC, no network isolation, no TLS",
}  # fmt: skip
"""What no rehearsal on one machine shows."""


TRANSCRIPT = "transcript.md"
"""Beside the report."""


@dataclass(frozen=True)
class Typed:
    """A command of `training.launch`, and how it ended."""

    arguments: Sequence[str]
    status: int
    wrote: str
    """To stderr, then to stdout."""


@dataclass(frozen=True)
class Step:
    """One step of the journey."""

    name: str
    result: Result
    seconds: float
    shown: str
    typed: Sequence[Typed] = ()


def text(steps: list[Step]) -> str:
    """A line a step."""
    width = max(len(step.name) for step in steps)
    return "\n".join(f"  {s.result:<4}  {s.name:<{width}}  {s.seconds:5.0f} s  {s.shown}" for s in steps)


def write(path: Path, steps: list[Step], engine: str, answers: dict[str, str]) -> None:
    """The report as Markdown, and beside it the transcript."""
    failed, gaps = ([step.name for step in steps if step.result == result] for result in ("FAIL", "GAP"))
    outcome = f"FAILED: {', '.join(failed)}" if failed else "Every step passed"
    if gaps and not failed:
        outcome = f"Every step passed but {', '.join(gaps)}, which could not be shown here"
    lines = [
        "# Rehearsal of the journey to SageMaker",
        "",
        f"{time.strftime('%Y-%m-%d %H:%M')}; jobs and endpoints ran as {engine}. "
        f"{outcome}; {sum(s.seconds for s in steps):.0f} s.",
        "",
        "| Step | Result | Seconds | Shown |",
        "|---|---|---|---|",
        *(f"| {s.name} | {s.result} | {s.seconds:.0f} | {s.shown.replace('|', '/')} |" for s in steps),
        "",
        f"[{TRANSCRIPT}]({TRANSCRIPT}) has each command as it is typed, and what it wrote.",
        "",
        "## What this cannot show",
        "",
        *(f"- GAP, {name}: {why}." for name, why in GAPS.items()),
        "",
        "## Answered by the rehearsal, not by moto alone",
        "",
        *(f"- {call}: {who}" for call, who in sorted(answers.items()) if who != "moto"),
        "",
        f"The other {sum(who == 'moto' for who in answers.values())} operations were answered by moto as it is.",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    path.with_name(TRANSCRIPT).write_text(transcript(steps))


def transcript(steps: list[Step]) -> str:
    """Each step's commands with what they wrote, as Markdown."""
    lines = [
        "# The rehearsal's commands and what they wrote",
        "",
        "Of each command first what is told (stderr), then its results (stdout). At AWS the same is typed, without "
        "`--poll-seconds 0.5`, and with images, data and places of your own.",
    ]
    for step in steps:
        lines += ["", f"## {step.name}: {step.result}, {step.seconds:.0f} s", "", step.shown]
        for typed in step.typed:
            command = f".venv/bin/python -m training.launch {shlex.join(typed.arguments)}"
            ended = f"\n(exit status {typed.status})" if typed.status else ""
            lines += ["", "~~~~text", f"$ {command}\n{typed.wrote.rstrip()}{ended}", "~~~~"]
    return "\n".join(lines) + "\n"
