"""OpenTelemetry: a span for each request and its stages, where the standard variables ask for it.

Settings are OpenTelemetry's own (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_SDK_DISABLED,
OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_*, ...), read by its SDK:
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/. Its packages (dependency group
`tracing`) are imported when a variable asks for it, and never else. Spans are made from the record when the request is
over, and sent by a thread: a collector that is slow or gone costs spans, never requests.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from service.settings import trace_collector

if TYPE_CHECKING:
    from service.record import RequestRecord

log = logging.getLogger(__name__)

SERVICE_NAME = "resnet34-classifier"
"""Unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say another."""

FLUSH_S = 3.0
"""How long the spans that are left may take to be sent when the service stops; SageMaker kills 30 s after SIGTERM."""

QUIET_S = 60.0
"""The libraries' lines about a collector that cannot be reached are shown this far apart, at least."""

Headers = list[tuple[bytes, bytes]]


class Tracing:
    """Makes spans of records while it runs, if that is wanted and can be had."""

    def __init__(self) -> None:
        self.on = False
        self._tracer: Any = None
        self._api: Any = None
        self._extract: Any = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send spans inside the block. What is missing is said in one line; the service serves without traces."""
        collector = trace_collector()
        provider = self._open(collector) if collector is not None else None
        try:
            yield
        finally:
            self.on = False
            if provider is not None:
                _finish(provider)

    def record(self, request: "RequestRecord", headers: Headers) -> str | None:
        """Make the spans of a request that is over, below the client's own span (W3C traceparent) if it names one.

        Returns: the trace's id, or None when it is not sampled.
        """
        try:
            return self._record(request, headers)
        except Exception:  # the request is answered: this must not turn it into a failure
            log.exception("request_id=%s: its spans could not be made", request.request_id)
            return None

    def _open(self, collector: str) -> Any:
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as exc:
            log.warning(
                "OTEL_* variables ask for traces, but a package is missing (%s); install the dependency group tracing "
                "(uv sync --inexact --group tracing), or set OTEL_SDK_DISABLED=true.", exc,
            )  # fmt: skip
            return None
        try:
            host = _host(collector)
            resource = Resource.create()
            if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):  # the SDK's default
                resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
            provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        except Exception:  # whatever a variable has in it
            log.exception("OTEL_* variables are set, but traces cannot be sent with them; the service serves without.")
            return None
        quiet = _Quiet()
        for handler in logging.getLogger().handlers:
            handler.addFilter(quiet)
        self._api, self._extract = trace, propagate.extract
        self._tracer = provider.get_tracer("service")
        self.on = True
        log.info("traces go to %s as service %s", host, resource.attributes["service.name"])
        return provider

    def _record(self, request: "RequestRecord", headers: Headers) -> str | None:
        api = self._api
        ended_ns = time.time_ns()
        offset_ns = ended_ns - time.perf_counter_ns()  # from the record's clock to the calendar's
        started_ns = int(request.started_s * 1e9) + offset_ns
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        span = self._tracer.start_span(
            f"{request.method} {request.path}" if request.status != 404 else request.method,
            context=self._extract(carrier), kind=api.SpanKind.SERVER, start_time=started_ns,
        )  # fmt: skip
        if not span.is_recording():
            return None
        span.set_attributes(_attributes(request))
        if request.status >= 500 or not request.status:
            span.set_status(api.StatusCode.ERROR, request.code)
        answered_s = request.answered_s or request.started_s + request.total_ms / 1000
        inside = api.set_span_in_context(span)
        for name, begin_s, end_s in _stages(request, answered_s):
            stage = self._tracer.start_span(name, context=inside, start_time=int(begin_s * 1e9) + offset_ns)
            stage.end(int(end_s * 1e9) + offset_ns)
        span.end(int((request.started_s + request.total_ms / 1000) * 1e9) + offset_ns)
        return str(api.format_trace_id(span.get_span_context().trace_id))


class _Quiet(logging.Filter):
    """Lets one line a minute through of what the libraries say about the collector, without its trace."""

    def __init__(self) -> None:
        super().__init__()
        self._last_s = -QUIET_S

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(("opentelemetry", "urllib3")):
            return True
        now_s = time.monotonic()
        if now_s - self._last_s < QUIET_S:
            return False
        self._last_s = now_s
        record.exc_info = record.exc_text = None
        return True


def _attributes(request: "RequestRecord") -> dict[str, Any]:
    """https://opentelemetry.io/docs/specs/semconv/http/http-spans/, and our own."""
    known = {
        "http.request.method": request.method,
        "url.path": request.path[:200],
        "http.response.status_code": request.status,
        "http.request.body.size": request.bytes_in,
        "request.id": request.request_id,
        "classifier.code": request.code,
        "classifier.batch_size": request.batch_size,
        "error.type": str(request.status) if request.status >= 500 else None,
    }
    return {name: value for name, value in known.items() if value is not None}


def _stages(request: "RequestRecord", answered_s: float) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of each stage, on the record's clock.

    The record has durations: the stages follow each other, and the answer begins when the last has ended.
    """
    end_s = answered_s
    for name, duration_ms in (("infer", request.infer_ms), ("queue", request.queue_ms), ("decode", request.decode_ms)):
        if duration_ms is not None:
            begin_s = max(request.started_s, end_s - duration_ms / 1000)
            yield name, begin_s, end_s
            end_s = begin_s


def _finish(provider: Any) -> None:
    """Send what is left, but wait no longer than FLUSH_S: the exporter itself would try for longer."""
    ending = threading.Thread(target=provider.shutdown, name="tracing", daemon=True)
    ending.start()
    ending.join(FLUSH_S)


def _host(url: str) -> str:
    """Of the collector's address what is no secret: neither user nor path nor query."""
    return urlsplit(url).netloc.rpartition("@")[2]
