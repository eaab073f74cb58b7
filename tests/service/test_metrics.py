"""/metrics: what is counted is what happened, over all workers, and nothing falls when one of them dies."""

import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from service import metrics
from service.deaths import MemoryKills, cause_of
from service.errors import HTTP_ERRORS
from service.exposition import Exposition
from service.metrics import OUTCOMES, Gauges, Metrics, Page
from service.model.artifact import open_artifact
from service.record import RequestRecord
from service.runtime import State

ROOT = Path(__file__).parent.parent.parent

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(server: Any) -> Samples:
    return samples_in(server.ask("GET", "/metrics"))


def samples_in(answer: Any) -> Samples:
    """Every sample of one scrape by name and labels; fails on a duplicate, as Prometheus does."""
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: Samples = {}
    for family in parse(answer.body.decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def until(condition: Callable[[], Any], limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.fixture
def pair(artifact: Path, start_server: Any) -> Iterator[Any]:
    with start_server(artifact, CLASSIFIER_WORKERS="2") as running:
        yield running


def test_counts_are_those_of_all_workers_whichever_is_asked_and_outlive_a_worker(artifact: Path, pair: Any) -> None:
    body = open_artifact(artifact).read("example")
    for number in range(40):  # each on a connection of its own, spread by the kernel
        assert pair.ask("POST", "/invocations", body if number % 4 else b"no image").status == (
            200 if number % 4 else 400
        )
    assert pair.ask("GET", "/secret/path?token=1").status == 404

    def counted(samples: Samples) -> list[float]:
        return [
            value(samples, "classifier_requests_total", path="/invocations", status="200"),
            value(samples, "classifier_requests_total", path="/invocations", status="400"),
            value(samples, "classifier_requests_total", path="other", status="404"),
            value(samples, "classifier_rejected_requests_total", reason="unreadable_image"),
            value(samples, "classifier_request_duration_seconds_count", outcome="answered"),
            value(samples, "classifier_request_duration_seconds_count", outcome="refused"),
            value(samples, "classifier_stage_duration_seconds_count", stage="infer"),
            value(samples, "classifier_request_batch_size_images_count"),
            value(samples, "classifier_received_bytes_total"),
        ]

    expected = [30, 10, 1, 10, 30, 10, 30, 30, 30 * len(body) + 10 * len(b"no image")]
    until(lambda: counted(scrape(pair)) == expected)  # a record is written when its answer has been sent
    assert [counted(scrape(pair)) for _ in range(16)] == [expected] * 16

    before = scrape(pair)
    assert value(before, "classifier_workers") == value(before, "classifier_workers_ready") == 2
    assert value(before, "classifier_ready") == 1
    for worker in ("0", "1"):
        assert value(before, "process_resident_memory_bytes", worker=worker) > 20e6
        assert value(before, "process_open_fds", worker=worker) > 3
        assert value(before, "process_cpu_seconds_total", worker=worker) > 0

    killed = pair.workers()[1]
    os.kill(killed, signal.SIGKILL)
    # Until the new one accepts, its share of the connections gets 503, whatever they ask.
    until(lambda: pair.log.read_text().count("ready: http://") == 3)
    until(lambda: value(scrape(pair), "classifier_worker_deaths_total", cause="sigkill") == 1)
    until(lambda: value(scrape(pair), "classifier_workers_ready") == 2)
    after = [scrape(pair) for _ in range(8)]
    assert [counted(samples) for samples in after] == [expected] * 8
    falling = [
        key
        for samples in after
        for key, seen in before.items()
        if key[0].endswith(("_total", "_count", "_bucket", "_sum")) and samples.get(key, 0) < seen
    ]
    assert falling == []
    assert "worker 1 died (signal SIGKILL: probably the kernel's memory killer or an operator" in pair.log.read_text()


def test_both_text_formats_are_given_as_asked(server: Any, artifact: Path) -> None:
    assert server.ask("POST", "/invocations", b"no image").status == 400
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    answer = server.ask("GET", "/metrics", headers={"Accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in parse_openmetrics(answer.body.decode())}  # strict about the format
    assert {"classifier_requests", "classifier_state", "classifier_model", "classifier_stage_duration_seconds"} <= set(
        families
    )
    (model,) = families["classifier_model"].samples
    assert model.labels["name"] == "tiny"
    assert model.labels["version"] == open_artifact(artifact).manifest.version
    assert model.labels["engine"].startswith("openvino")
    for family in families.values():
        unit = [name for name in ("seconds", "bytes") if name in family.name]
        assert not unit or family.name.endswith((*unit, "_count")), family.name


def test_a_service_that_loads_is_not_ready_and_says_its_state(artifact: Path, start_server: Any) -> None:
    with start_server(artifact, ready=False) as server:
        states = set()

        def ready() -> bool:
            try:
                answer = server.ask("GET", "/metrics")
            except OSError:
                return False
            if answer.status == 503:  # the supervisor's, where a worker takes long to accept
                states.add(answer.json["status"])
                return False
            samples = samples_in(answer)
            state = {
                dict(labels)["classifier_state"]
                for (name, labels), on in samples.items()
                if name == "classifier_state" and on
            }
            assert len(state) == 1
            states.update(state)
            assert (state == {"ready"}) == (value(samples, "classifier_ready") == 1)
            return state == {"ready"}

        until(ready)
        assert states & {"loading", "warming_up"}


def record(path: str = "/invocations", status: int = 200, code: str = "ok", **known: Any) -> RequestRecord:
    return RequestRecord("id", "POST", path, status=status, code=code, **known)


def samples_of(counted: Metrics) -> Samples:
    families = list(Exposition(counted).collect())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_durations_fall_into_the_bucket_whose_bound_they_do_not_exceed() -> None:
    counted = Metrics()
    for total_ms in (0.5, 0.6, 5.0, 70_000.0):
        counted.record(record(total_ms=total_ms, decode_ms=0.1, queue_ms=0.0, infer_ms=2.5, batch_size=3))
    samples = samples_of(counted)
    name = "classifier_request_duration_seconds"
    bounds = {"0.0005": 1, "0.001": 2, "0.0025": 2, "0.005": 3, "60.0": 3, "+Inf": 4}
    assert {le: value(samples, f"{name}_bucket", outcome="answered", le=le) for le in bounds} == bounds
    assert math.isclose(value(samples, f"{name}_sum", outcome="answered"), 70.0061)
    assert value(samples, "classifier_stage_duration_seconds_bucket", stage="infer", le="0.0025") == 4
    assert value(samples, "classifier_request_batch_size_images_bucket", le="2.0") == 0
    assert value(samples, "classifier_request_batch_size_images_bucket", le="4.0") == 4


def test_what_a_client_makes_up_adds_no_series() -> None:
    counted = Metrics()
    before = len(samples_of(counted))
    for number in range(1000):
        counted.record(record(f"/{number}", 404, "not_found"))
        counted.record(record(status=600 + number, code=f"made up {number}"))
    samples = samples_of(counted)
    assert len(samples) == before + 2
    assert value(samples, "classifier_requests_total", path="other", status="404") == 1000
    assert value(samples, "classifier_rejected_requests_total", reason="other") == 1000


@pytest.mark.parametrize(("status", "code"), sorted(set(HTTP_ERRORS.values())))
def test_every_error_of_the_table_is_counted_by_its_code(status: int, code: str) -> None:
    counted = Metrics()
    counted.record(record(status=status, code=code, total_ms=1.0))
    samples = samples_of(counted)
    assert value(samples, "classifier_rejected_requests_total", reason=code) == 1
    assert value(samples, "classifier_requests_total", path="/invocations", status=str(status)) == 1
    outcome = "refused" if status < 500 else "failed"
    assert value(samples, "classifier_request_duration_seconds_count", outcome=outcome) == 1


def test_a_client_that_hung_up_was_neither_refused_nor_failed() -> None:
    counted = Metrics()
    counted.record(record(status=0, code="client_gone", total_ms=1.0))
    samples = samples_of(counted)
    counts = {name: value(samples, "classifier_request_duration_seconds_count", outcome=name) for name in OUTCOMES}
    assert counts == {"answered": 0, "refused": 0, "failed": 0, "gone": 1}


def test_a_page_in_a_file_is_one_for_all_who_map_it_and_keeps_what_the_dead_counted(tmp_path: Path) -> None:
    with (tmp_path / "page").open("w+b") as file:
        file.truncate(Page.size(2))
        of_supervisor = Page(2, file.fileno())
        workers = [Metrics(Page(2, file.fileno()), index) for index in range(2)]
        for index, worker in enumerate(workers):
            worker.gauges = Gauges(lambda: "ready", lambda: 2, lambda: 3, lambda: None)
            for _ in range(index + 1):
                worker.record(record())
        for worker in workers:
            worker.write_gauges()
        assert value(samples_of(workers[0]), "classifier_queue_depth_images") == 4
        of_supervisor.died(1, "sigsegv")
        replacement = Metrics(Page(2, file.fileno()), 1)
        replacement.record(record())
        samples = samples_of(workers[0])
    assert value(samples, "classifier_requests_total", path="/invocations", status="200") == 4
    assert value(samples, "classifier_worker_deaths_total", cause="sigsegv") == 1
    assert value(samples, "classifier_queue_depth_images") == 2
    assert value(samples, "classifier_images_under_way") == 3
    assert value(samples, "classifier_workers_ready") == 1


def test_the_states_are_those_of_the_runtime() -> None:
    assert set(get_args(State)) == set(metrics.STATES)


@pytest.mark.parametrize(
    ("returned", "memory_kill", "cause", "words"),
    [
        (3, False, "exit_status", "exit status 3; the lines above say why"),
        (-9, True, "out_of_memory", "out of memory, the kernel killed it; give it more memory"),
        (-9, False, "sigkill", "probably the kernel's memory killer or an operator"),
        (-11, True, "sigsegv", "signal SIGSEGV: a fault in a native library"),
        (-15, False, "other_signal", "signal SIGTERM"),
        (-40, False, "other_signal", "signal 40"),
    ],
)
def test_a_death_has_a_cause_and_words_that_help(returned: int, memory_kill: bool, cause: str, words: str) -> None:
    death = cause_of(returned, memory_kill)
    assert death.cause == cause
    assert death.cause in metrics.CAUSES
    assert words in death.how


@pytest.mark.parametrize(
    ("own", "file", "before", "after"),
    [
        ("0::/", "memory.events", "oom 4\noom_kill 3\n", "oom 5\noom_kill 4\n"),
        ("0::/a/b", "a/b/memory.events", "oom_kill 0\n", "oom_kill 2\n"),
        ("4:memory:/x", "memory/x/memory.oom_control", "under_oom 0\noom_kill 0\n", "under_oom 0\noom_kill 1\n"),
        ("9:memory:/gone", "memory/memory.oom_control", "oom_kill 7\n", "oom_kill 8\n"),
    ],
)
def test_kills_for_memory_are_noticed_in_both_versions_of_cgroups(
    tmp_path: Path, own: str, file: str, before: str, after: str
) -> None:
    (tmp_path / "own").write_text(f"{own}\n")
    events = tmp_path / "cgroup" / file
    events.parent.mkdir(parents=True)
    events.write_text(before)
    kills = MemoryKills(tmp_path / "cgroup", tmp_path / "own")
    assert not kills.any_new()
    events.write_text(after)
    assert kills.any_new()
    assert not kills.any_new()


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A memory cgroup of our own, without a limit yet; of either version."""
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"test-{os.getpid()}"
    try:
        group.mkdir()
        limit_of(group)
    except OSError as exc:
        pytest.skip(f"no memory cgroup can be made here: {exc}")
    yield group
    until(lambda: not (group / "cgroup.procs").read_text(), 30)
    group.rmdir()


def limit_of(group: Path) -> Path:
    """The file that limits the group's memory. Raises: OSError when the group has none."""
    names = ("memory.limit_in_bytes", "memory.max")
    found = [group / name for name in names if (group / name).exists()]
    if not found:
        raise OSError("the memory controller is not delegated")
    return found[0]


def test_a_worker_that_the_kernel_kills_for_memory_is_named_so(
    artifact: Path, tmp_path: Path, memory_group: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    limit_of(memory_group).write_text(str(200 * 2**20))  # too little for two workers that load a model
    command = [sys.executable, "-m", "service", "--model", str(artifact), "--host", "127.0.0.1", "--port", str(port)]
    moved = f"echo $$ > {memory_group}/cgroup.procs; exec {shlex.join(command)}"
    environment = {**os.environ, "CLASSIFIER_WORKERS": "2"}
    result = subprocess.run(
        ["sh", "-c", moved], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    (line, *_) = [line for line in result.stdout.splitlines() if "SIGKILL" in line]
    assert "ended before it was ready (signal SIGKILL: out of memory, the kernel killed it; give it more memory" in line


def test_without_cgroups_no_kill_for_memory_is_claimed(tmp_path: Path) -> None:
    assert not MemoryKills(tmp_path, tmp_path / "none").any_new()
