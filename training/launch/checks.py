"""What preflight looks for, and what it found: a plan, and the rows of its table."""

from dataclasses import dataclass
from typing import Literal

from training.launch import batch, images
from training.launch.errors import LaunchError
from training.launch.hosting import MAX_CONCURRENCY, STARTUP_S, Hosting, Kind

Result = Literal["PASS", "FAIL", "WARN"]


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    name: str
    result: Result
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Plan:
    """What is going to be used."""

    training_instance: str
    hosting_instance: str
    image: str | None = None
    """For training and hosting alike; None: those that were pushed."""
    role: str | None = None
    training_count: int = 1
    """Instances of all trainings that run at once."""
    hosting_count: int = 1
    """Instances of the endpoint at most."""
    hosting_least: int | None = None
    """At least; None: as many as at most."""
    spot_count: int = 0
    """Instances of a training on spare capacity, besides."""
    ami: str | None = None
    startup_s: int = STARTUP_S
    kind: Kind = "realtime"
    max_concurrency: int = MAX_CONCURRENCY
    """Of a serverless endpoint."""
    batch_instance: str = batch.INSTANCE

    @property
    def hosting(self) -> Hosting:
        """How the endpoint is to run. Raises: ConfigError where it cannot."""
        least = self.hosting_count if self.hosting_least is None else self.hosting_least
        return Hosting(self.kind, self.hosting_instance, least, self.hosting_count)

    @property
    def hosting_target(self) -> images.Target:
        """Which of the images the endpoint runs."""
        return images.hosting_target(self.kind, self.hosting_instance)

    @property
    def batch_target(self) -> images.Target:
        """Which of the images a batch runs."""
        return images.hosting_target("batch", self.batch_instance)


def failed(name: str, exc: Exception) -> Check:
    """The row for an error: its first line, and what it says below that as what to do."""
    found, _, fix = str(exc).partition("\n")
    return Check(name, "FAIL", found, fix)


def table(checks: list[Check]) -> str:
    """The checks as text; what to do below each that did not pass."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"  {check.result}  {check.name:<{width}}  {check.found}")
        if check.fix and check.result != "PASS":
            lines += [f"        {'':<{width}}  {line}" for line in check.fix.splitlines()]
    return "\n".join(lines)


def require(checks: list[Check]) -> None:
    """Raises: LaunchError where a check failed."""
    names = [check.name for check in checks if check.result == "FAIL"]
    if names:
        raise LaunchError(f"Not ready: {', '.join(dict.fromkeys(names))}. What to do stands above.")


def ready(checks: list[Check]) -> str:
    """What to say where no check failed."""
    warned = list(dict.fromkeys(check.name for check in checks if check.result == "WARN"))
    return "nothing failed" + (f"; warnings, which stand above, are of: {', '.join(warned)}" if warned else "")
