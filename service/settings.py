"""The service's settings: the only place of `service` that reads the environment or the command line.

Flags override CLASSIFIER_* variables, these override the defaults. SageMaker's own SAGEMAKER_BIND_TO_PORT
sets the port where nothing else does (https://docs.aws.amazon.com/sagemaker/latest/dg/multi-model-endpoints.html).
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from service.engines.names import Wanted
from service.logs import Format, masked
from service.model.machine import SAGEMAKER_MODEL, cores

PREFIX = "CLASSIFIER_"
LOCAL_MODEL = Path("artifacts/model")


def default_model() -> Path:
    """Where SageMaker puts the model if that folder is there, else where `make serve` puts it."""
    return SAGEMAKER_MODEL if SAGEMAKER_MODEL.is_dir() else LOCAL_MODEL


def _number(value: object) -> object:
    """The environment has text alone."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _place(value: object) -> object:
    """Before it is a path, which would have one slash of the two and hide that there is a password in it."""
    if isinstance(value, str) and "://" in value:
        raise ValueError("that is an address; copy the model to this machine and name its folder or .tar.gz")
    if value == "":
        raise ValueError("that is no name; name a folder or .tar.gz")
    return value


class Settings(BaseModel):
    """Everything that can be set; each sentence tells the consequence. `load` alone reads the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Annotated[Path, BeforeValidator(_place)] = Field(default_factory=default_model)
    """Artifact folder or .tar.gz archive of one; loaded, verified and warmed up before /ping turns 200.
    Default: /opt/ml/model where that folder is, else artifacts/model."""
    host: str = Field("0.0.0.0", min_length=1)  # noqa: S104  # SageMaker connects from outside the container
    """Address to listen on; 0.0.0.0, which SageMaker needs, is reachable from the network, 127.0.0.1 is not."""
    port: int = Field(8080, ge=1, le=65535)
    """TCP port; SageMaker calls 8080."""
    engine: Wanted = "auto"
    """What computes: the fastest engine whose answers are those of the training ("auto"), or the one of this name."""
    workers: int = Field(0, ge=0, le=256)
    """Processes that answer, each with a model of its own; 0: one per GPU, else as many as the event loops need, from
    one per core at 32 px to one for every 4.6 cores at 224 px."""
    engine_threads: int = Field(default_factory=cores, ge=1, le=4096)
    """Threads of engines that run on the CPU, of all workers together; default: the cores this process may use."""
    start_timeout_s: float = Field(450.0, gt=0)
    """A worker that is not ready by then ends the service with a line that says so; below the 8 minutes after which
    SageMaker gives an endpoint's container up (ContainerStartupHealthCheckTimeoutInSeconds raises them)."""
    max_payload_bytes: int = Field(25 * 2**20, ge=1)
    """Larger request bodies are refused with 413; the default is the limit of SageMaker's real-time endpoints."""
    max_body_bytes: int = Field(512 * 2**20, ge=1)
    """Bytes of request bodies held at once in a worker, an eighth for bodies of up to 1 MiB alone; more get 503 at
    once. Forms and base64 take up to three times that in memory."""
    body_timeout_s: float = Field(30.0, gt=0)
    """A request body that is not there by then gets 408, so that slow senders do not hold memory."""
    deadline_s: float = Field(55.0, gt=0)
    """A request not answered by then gets 504; below SageMaker's 60 s, so that the client reads the reason."""
    max_images: int = Field(256, ge=1)
    """Images under way at once in a worker, from decoding to the answer; requests for which there is no place get 503
    at once."""
    max_queue_s: float = Field(1.25, gt=0)
    """Of these places, no more are given than are answered within this time at the rate seen of late, but 32 at least;
    at half the load, the service is back to normal within twice that after an overload."""
    overload_status: Annotated[Literal[503, 429], BeforeValidator(_number)] = 503
    """The status of those answers, both with Retry-After; 429 for clients that take 503 for a broken server."""
    drain_s: float = Field(0.0, ge=0, le=20)
    """After SIGTERM, /ping answers 503 and requests are still taken for this long; then until none is under way."""
    max_batch: int = Field(32, ge=1)
    """Images the engine gets at once, at most; it gets fewer where more would not be faster."""
    max_wait_ms: float = Field(0.0, ge=0, le=60_000)
    """How long a batch waits for company, counted from its first image; 0 takes what is there and just coming in."""
    decode_threads: int = Field(default_factory=cores, ge=1, le=4096)
    """Threads that decode plain JPEGs, and processes that decode everything else, of all workers together; default: the
    cores this process may use."""
    decode_limit_s: float = Field(5.0, gt=0, le=3600)
    """An image that takes a decoder process more processor time gets 413; no honest one of 25 MB needs as much. The
    images of one request have that together."""
    page: bool = True
    """Serve a page for people at / (and the model's example image at /example); false: 404 there."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines below this level are not written; "warning" silences the line per request, "debug" adds one when it arrives
    and shows successful probes."""
    log_format: Format = "text"
    """Lines for people ("text"), or one JSON object each for CloudWatch and the like ("json"); times are UTC."""
    exit_with_parent: bool = True
    """Stop when the process that started the service ends, so that no server is left behind; false for nohup."""

    @model_validator(mode="after")
    def _room_for_one(self) -> Self:
        if self.max_body_bytes < self.max_payload_bytes:
            raise ValueError(
                f"{PREFIX}MAX_BODY_BYTES = {self.max_body_bytes} is less than {PREFIX}MAX_PAYLOAD_BYTES = "
                f"{self.max_payload_bytes}: raise the one or lower the other"
            )
        return self

    @classmethod
    def load(cls, arguments: Sequence[str] | None = None) -> "Settings":
        """Read environment and command line (default: this process's). A variable that is empty is not set.

        Raises: SystemExit with a sentence on stderr when something is unknown or not allowed.
        """
        parser = argparse.ArgumentParser(
            prog="python -m service",
            description="Serve an image classifier over HTTP: GET /ping, POST /invocations.",
            epilog=f"Environment: {', '.join(names())}; README, section Settings. Flags override them.",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        parser.add_argument(
            "--model",
            metavar="DIR_OR_TAR_GZ",
            help="artifact folder or .tar.gz (default: /opt/ml/model if present, else artifacts/model)",
        )
        parser.add_argument("--host", help="address to listen on (default: 0.0.0.0)")
        parser.add_argument("--port", help="TCP port (default: 8080)")
        flags = vars(parser.parse_args(arguments))
        sources = {name: f"--{name} " for name in flags}
        if not os.environ.get(f"{PREFIX}PORT") and os.environ.get("SAGEMAKER_BIND_TO_PORT") and "port" not in flags:
            flags["port"], sources["port"] = os.environ["SAGEMAKER_BIND_TO_PORT"], "SAGEMAKER_BIND_TO_PORT="
        unknown = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name not in names())
        if unknown:
            parser.error(f"unknown setting {', '.join(unknown)}; known are: {', '.join(names())}")
        # Not by pydantic-settings, whose import is 0.17 s of each process's start (2.16.3, one core of an EPYC, n = 2).
        variables = {field: text for field in cls.model_fields if (text := os.environ.get(PREFIX + field.upper()))}
        try:
            return cls.model_validate({**variables, **flags})
        except ValidationError as exc:
            problems = [_problem(error, sources) for error in exc.errors()]
            parser.exit(2, f"error: {'; '.join(problems)}\n")


def _problem(error: ErrorDetails, sources: Mapping[str, str]) -> str:
    """What was set where, and why it is not allowed; `sources` of what the environment's own names do not say."""
    said = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of the settings together
        return said
    name, given = str(error["loc"][0]), str(error["input"])
    shown = masked(given if given.isprintable() else repr(given))
    return f"{sources.get(name, f'{PREFIX}{name.upper()}=')}{shown}: {said[0].lower()}{said[1:]}"


def heaps_are_chosen() -> bool:
    """Whether glibc is told how many heaps to have (mallopt(3))."""
    return "MALLOC_ARENA_MAX" in os.environ


def trace_collector() -> str | None:
    """Where OpenTelemetry's variables send traces; None when they name no collector, or switch traces off."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    if disabled or exporter != "otlp":
        return None
    urls = [os.environ.get(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT", "").strip() for kind in ("TRACES_", "")]
    return next((url for url in urls if url), None)


def names() -> list[str]:
    """The environment variables that are read, by field."""
    return [PREFIX + field.upper() for field in Settings.model_fields]
