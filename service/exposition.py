"""GET /metrics: the page of numbers (`service.metrics`) in Prometheus' words, whichever worker is asked.

Names and units as https://prometheus.io/docs/practices/naming/ says; text format 0.0.4 or OpenMetrics, by Accept.
"""

import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.registry import Collector

from service import metrics
from service.metrics import Histogram, Metrics

router = APIRouter()

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


@router.get("/metrics")
async def show_metrics(request: Request) -> Response:
    """What the service has done since it started and what it is at, over all its processes, for Prometheus."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(Exposition(request.app.state.metrics)), headers={"content-type": content_type})


class Exposition(Collector):
    """All families of metrics, made from the page when it is asked."""

    def __init__(self, shown: Metrics) -> None:
        self._metrics = shown
        self._page = shown.page

    def collect(self) -> Iterator[Metric]:
        """The families, in the order of the text."""
        self._metrics.write_gauges()
        yield from self._requests()
        yield from self._durations()
        yield from self._now()
        yield from self._workers()
        yield from _processes(self._pids(), self._column(metrics.CPU_SECONDS))

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "classifier_requests",
            "Requests that are over, by path and HTTP status (0: none, the client left). Their rate is the load.",
            labels=["path", "status"],
        )
        for path in metrics.PATHS:
            for status in metrics.STATUSES:
                count = self._page.value(metrics.request_cell(path, status))
                if count or (path, status) == (metrics.INVOCATIONS, 200):
                    requests.add_metric([path, str(status)], count)
        yield requests
        rejected = CounterMetricFamily(
            "classifier_rejected_requests",
            "Invocations that got no answer but an error, by its code. overloaded, deadline_exceeded: add instances; "
            "not_ready: see classifier_state (of a worker that does not accept yet, probes count too); "
            "engine_failure, internal_error: see the log; others are the client's.",
            labels=["reason"],
        )
        for reason in metrics.REASONS:
            rejected.add_metric([reason], self._page.value(metrics.rejected_cell(reason)))
        yield rejected
        yield CounterMetricFamily(
            "classifier_received_bytes",
            "Bytes of request bodies that were read.",
            value=self._page.value(metrics.BYTES_IN),
        )

    def _durations(self) -> Iterator[Metric]:
        total = HistogramMetricFamily(
            "classifier_request_duration_seconds",
            "From the head of an invocation to the end of its answer, by outcome: answered 2xx, refused 4xx, failed "
            "5xx, gone for clients that hung up. Near 55 s requests meet the deadline.",
            labels=["outcome"],
        )
        for outcome, cells in metrics.TOTAL.items():
            self._add(total, [outcome], cells)
        yield total
        stages = HistogramMetricFamily(
            "classifier_stage_duration_seconds",
            "What an invocation spent in each stage. decode grows with the pictures: give it threads or smaller ones; "
            "queue grows when the engine is busy: add instances; infer is the engine's own time for the whole batch.",
            labels=["stage"],
        )
        for stage, cells in metrics.STAGES.items():
            self._add(stages, [stage], cells)
        yield stages
        batch = HistogramMetricFamily(
            "classifier_request_batch_size_images",
            "Images that shared the engine's batch with the request's, counted once for each request. "
            "1 under load: nothing is batched.",
            labels=[],
        )
        self._add(batch, [], metrics.BATCH)
        yield batch

    def _now(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "classifier_queue_depth_images",
            "Images decoded that wait for the engine. Lastingly above a batch's size: add instances.",
            value=sum(self._column(metrics.QUEUE_DEPTH)),
        )
        yield GaugeMetricFamily(
            "classifier_images_under_way",
            "Images that hold places, from decoding to the answer; at CLASSIFIER_MAX_IMAGES per worker, or before "
            "where answers are slow, more are refused.",
            value=sum(self._column(metrics.UNDER_WAY)),
        )
        gauges = self._metrics.gauges
        state = gauges.state() if gauges else "loading"
        yield GaugeMetricFamily(
            "classifier_ready",
            "1 while the worker that was asked answers GET /ping with 200, else 0. 0 for minutes: see the log.",
            value=float(state == "ready"),
        )
        yield StateSetMetricFamily(
            "classifier_state",
            "How far the worker that was asked is, as GET /ping says.",
            value={name: name == state for name in sorted({*metrics.STATES, state})},
        )
        if gauges and (model := gauges.model()):
            info = InfoMetricFamily("classifier_model", "The model that answers, and what computes it.")
            info.add_metric([], dict(zip(("name", "version", "engine"), model, strict=True)))
            yield info

    def _workers(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "classifier_workers", "Processes that shall answer (CLASSIFIER_WORKERS).", value=self._page.count
        )
        ready = 1 + metrics.STATES.index("ready")
        states = self._column(metrics.STATE)
        yield GaugeMetricFamily(
            "classifier_workers_ready",
            "Processes that do. Less than classifier_workers for minutes: workers die, the log says why.",
            value=sum(state == ready for state in states),
        )
        deaths = CounterMetricFamily(
            "classifier_worker_deaths",
            "Workers that died, by cause; each lost the requests it had. out_of_memory: fewer workers or more memory; "
            "sigsegv, sigbus, sigabrt: a fault of a library or the machine; the log has a line for each.",
            labels=["cause"],
        )
        for cause in metrics.CAUSES:
            deaths.add_metric([cause], self._page.value(metrics.death_cell(cause)))
        yield deaths

    def _column(self, cell: int) -> list[float]:
        """A cell of every worker's row."""
        return [self._page.cells[row * metrics.CELLS + cell] for row in range(self._page.count)]

    def _pids(self) -> list[tuple[str, int]]:
        """The workers' processes that live, by number."""
        return [(str(index), int(pid)) for index, pid in enumerate(self._column(metrics.PID)) if pid]

    def _add(self, family: HistogramMetricFamily, labels: list[str], cells: Histogram) -> None:
        buckets, count = [], 0.0
        for offset, bound in enumerate([*map(str, cells.bounds), "+Inf"]):
            count += self._page.value(cells.at + offset)
            buckets.append((bound, count))
        family.add_metric(labels, buckets, self._page.value(cells.end - 1))


def _processes(pids: Iterable[tuple[str, int]], cpu_s: list[float]) -> Iterator[Metric]:
    """The standard families, each process apart; memory and files only where there is /proc (Linux)."""
    cpu = CounterMetricFamily(
        "process_cpu_seconds", "Processor time of the worker and of those before it.", labels=["worker"]
    )
    for index, seconds in enumerate(cpu_s):
        cpu.add_metric([str(index)], seconds)
    memory = GaugeMetricFamily(
        "process_resident_memory_bytes",
        "Memory the worker has in RAM, with what it shares with others. Growth that goes on for hours is a leak.",
        labels=["worker"],
    )
    files = GaugeMetricFamily(
        "process_open_fds", "Files and sockets the worker has open; one for each connection.", labels=["worker"]
    )
    for worker, pid in pids:
        try:
            memory.add_metric([worker], int((_PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE_BYTES)
            files.add_metric([worker], len(os.listdir(_PROC / str(pid) / "fd")))  # noqa: PTH208  # names suffice
        except OSError:  # it has just died, or there is no /proc
            continue
    yield from (cpu, memory, files)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield GaugeMetricFamily("process_max_fds", "Files and sockets each process may have open.", value=float(limit))
