"""What the service does at five times its capacity, and in ten minutes at 80 % of it, on a machine that is else idle.

    python -m tests.bench.endurance [--side 224] [--overload-seconds 20] [--soak-minutes 10] [--apart]

The generator runs on the same cores, in this process; `--apart` gives it the last core and the service the others, as
where clients have machines of their own: what the generator takes is then not missing where answers are made. Overload:
answers a second against the capacity measured just before, how soon refusals come, memory, and how soon after it
requests are served as before. Soak: photos, pictures in JSON and forms, damaged ones, unreadable ones; memory and file
descriptors over time, and again once the clients have gone. Writes tests/bench/results/endurance.{md,json,png}.
"""

import argparse
import base64
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from service.model.machine import cores
from tests.bench import load, open_loop
from tests.bench.inputs import payloads
from tests.bench.models import write
from tests.bench.open_loop import built
from tests.bench.processes import Server

RESULTS = Path(__file__).parent / "results"
CACHE = Path(tempfile.gettempdir()) / "resnet34-bench"
SAMPLE_S = 2.0
SETTLE_S = 10.0
"""After which the service has let go of connections that its clients closed."""
AFTER_S = 20.0
"""At half the capacity after the overload; the second half of it shows what is ordinary."""


def files(server: Server, port: int) -> tuple[int, int]:
    """File descriptors of all processes of a server: those of clients' connections, which its supervisor holds too so
    that it can answer for a worker that dies, and the others.
    """
    clients = every = 0
    for pid in server.pids():
        with suppress(psutil.NoSuchProcess):  # a decoder process that is replaced
            process = psutil.Process(pid)
            sockets = process.net_connections("tcp")
            every += process.num_fds()
            clients += sum(bool(socket.raddr) and socket.laddr.port == port for socket in sockets)
    return clients, every - clients


class Watch:
    """Memory and file descriptors of all processes of a server, sampled in a thread."""

    def __init__(self, server: Server, port: int) -> None:
        self.samples: list[tuple[float, float, int, int]] = []  # seconds, MiB (PSS), files of clients, other files
        self._port = port
        self._server = server
        self._begin_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            memory = self._server.memory().pss
            self.samples.append((time.monotonic() - self._begin_s, memory, *files(self._server, self._port)))
            if self._ended.wait(SAMPLE_S):
                return


def started(model: Path, port: int, log: Path, engine: str, apart: bool = False) -> Server:
    """The service with its defaults; `apart`: on all cores but the last, to which this process keeps from then on."""
    command = [sys.executable, "-m", "service", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    settings = {
        "CLASSIFIER_EXIT_WITH_PARENT": "false",
        "CLASSIFIER_ENGINE": engine,
    }  # fmt: skip
    server = Server(command, settings, f"http://127.0.0.1:{port}/ping", log, Path.cwd())
    if not apart:
        return server.start(120)
    *others, last = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, others)
    try:
        return server.start(120)
    finally:
        os.sched_setaffinity(0, {last})


def overload(server: Server, port: int, bodies: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Five times the capacity for `seconds`, then half of it."""
    requests = [(body, "image/jpeg") for body in bodies]
    capacity = load.run(f"http://127.0.0.1:{port}/invocations", requests, 32, seconds / 2, 3.0).throughput
    before = server.memory().pss
    with Watch(server, port) as watch:
        outcome = open_loop.run(
            port, [built(body) for body in bodies], [(5 * capacity, seconds), (capacity / 2, AFTER_S)]
        )
    over, after = outcome.sent(0, seconds), outcome.sent(seconds)
    goodput = outcome.rate(seconds / 4, seconds)  # once the places are taken
    ordinary_ms = after.sent(seconds + AFTER_S / 2).quantile_ms(0.99)
    odd = [a.due_s - seconds for a in after.answers if a.kind != "200" or a.latency_ms > 2 * ordinary_ms]
    refused = "503" in over.counts()
    return {
        "capacity": capacity, "offered": 5 * capacity, "goodput": goodput, "kept": goodput / capacity,
        "counts": over.counts(),
        "refusal_p50_ms": over.quantile_ms(0.5, "503") if refused else None,
        "refusal_p99_ms": over.quantile_ms(0.99, "503") if refused else None,
        "answer_p99_ms": over.quantile_ms(0.99), "memory_before": before,
        "memory_most": max(sample[1] for sample in watch.samples), "memory_after": watch.samples[-1][1],
        "counts_after": after.counts(),
        "last_refusal_s": max((a.due_s - seconds for a in after.answers if a.kind != "200"), default=0.0),
        "back_after_s": max((at_s for at_s in odd if at_s < AFTER_S / 2), default=0.0), "p99_after_ms": ordinary_ms,
    }  # fmt: skip


def mixture(bodies: Sequence[bytes]) -> list[bytes]:
    """What clients send: mostly photos, now and then something else."""
    damaged = [body[: len(body) // 2] for body in bodies[:4]]
    form = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.jpg"\r\n\r\n' + body + b"\r\n"
        for body in [*bodies[:3], b"no image"]
    )
    document = json.dumps({"images": [base64.b64encode(body).decode() for body in bodies[:2]]}).encode()
    return [
        *[built(body) for body in bodies],
        *[built(body) for body in damaged],
        built(form + b"--b--\r\n", "multipart/form-data; boundary=b"),
        built(document, "application/json"),
        built(b"not an image", "image/png"),
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    ]


def soak(server: Server, port: int, bodies: Sequence[bytes], minutes: float, capacity: float) -> dict[str, Any]:
    """80 % of the capacity for `minutes`."""
    requests = mixture(bodies)
    images = sum(request.count(b"filename") + request.count(b'"images"') * 2 or 1 for request in requests)
    rate = 0.8 * capacity * len(requests) / images
    before = (server.memory().pss, *files(server, port))
    with Watch(server, port) as watch:
        outcome = open_loop.run(port, requests, [(rate, 60 * minutes)])
    time.sleep(SETTLE_S)
    time_s, memory, clients, others = (np.asarray(column) for column in zip(*watch.samples, strict=True))
    settled = time_s > time_s[-1] / 5
    return {
        "rate": rate, "minutes": minutes, "counts": outcome.counts(), "p50_ms": outcome.quantile_ms(0.5),
        "p99_ms": outcome.quantile_ms(0.99), "samples": watch.samples,
        "memory_mib_per_hour": float(np.polyfit(time_s[settled], memory[settled], 1)[0] * 3600),
        "memory_range_mib": [float(memory[settled].min()), float(memory[settled].max())],
        "clients_range": [int(clients[settled].min()), int(clients[settled].max())],
        "files_range": [int(others[settled].min()), int(others[settled].max())],
        "before": before, "after": (server.memory().pss, *files(server, port)),
    }  # fmt: skip


def plot(result: dict[str, Any], path: Path) -> None:
    """Memory and file descriptors during the soak."""
    import matplotlib.pyplot as plt

    time_s, memory, clients, others = zip(*result["soak"]["samples"], strict=True)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    above.plot(np.asarray(time_s) / 60, memory)
    above.set(ylabel="memory, MiB (PSS)", ylim=(0, 1.1 * max(memory)), title="At 80 % of capacity")
    below.plot(np.asarray(time_s) / 60, clients, color="0.7", label="of clients' connections")
    below.plot(np.asarray(time_s) / 60, others, label="others")
    below.set(ylabel="file descriptors", ylim=(0, None), xlabel="minutes")
    below.legend()
    figure.savefig(path, dpi=120)


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    over, long = result["overload"], result["soak"]
    return f"""# The service under overload and over time

{result["hardware"]}; side {result["side_px"]} px, {result["engine"]}, places by default, the generator on {result["generator"]}; one run.
Written by `python -m tests.bench.endurance`.

| At 5 times the capacity | |
|---|---|
| capacity, 32 clients in a closed loop | {over["capacity"]:.0f} images/s |
| offered | {over["offered"]:.0f} requests/s |
| answered a second, once the places are taken | {over["goodput"]:.0f} images/s: {over["kept"]:.2f} of the capacity |
| answers by status | {over["counts"]} |
| refusals come after | {over["refusal_p50_ms"] or 0:.1f} ms (p50), {over["refusal_p99_ms"] or 0:.1f} ms (p99) |
| memory before, most, 20 s after | {over["memory_before"]:.0f}, {over["memory_most"]:.0f}, {over["memory_after"]:.0f} MiB |
| at half the capacity from then on | {over["counts_after"]}, last refusal {over["last_refusal_s"]:.1f} s after the change |
| an answer takes more than twice the ordinary p99 ({over["p99_after_ms"]:.0f} ms) | until {over["back_after_s"]:.1f} s after the change |

| {long["minutes"]:g} minutes at 80 % of the capacity, mixed requests | |
|---|---|
| offered | {long["rate"]:.0f} requests/s |
| answers by status | {long["counts"]} |
| latency of answers with 200 | {long["p50_ms"]:.1f} ms (p50), {long["p99_ms"]:.1f} ms (p99) |
| memory after the first fifth | {long["memory_range_mib"][0]:.0f} to {long["memory_range_mib"][1]:.0f} MiB, slope {long["memory_mib_per_hour"]:+.1f} MiB an hour |
| file descriptors after the first fifth | {long["files_range"][0]} to {long["files_range"][1]}, and {long["clients_range"][0]} to {long["clients_range"][1]} of clients' connections |
| before, and {SETTLE_S:.0f} s after it | {long["before"][0]:.0f} and {long["after"][0]:.0f} MiB; {long["before"][2]} and {long["after"][2]} file descriptors, of connections {long["before"][1]} and {long["after"][1]} |

![memory and file descriptors](endurance.png)
"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--engine", default="openvino-int8")
    parser.add_argument("--overload-seconds", type=float, default=20)
    parser.add_argument("--soak-minutes", type=float, default=10)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--apart", action="store_true", help="the generator has the last core, the service the others")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = CACHE / f"endurance-{options.side}"
    bodies, what = payloads(options.side, CACHE)
    if not (model / "facts.json").exists():
        write(model, options.side, bodies)
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    result: dict[str, Any] = {
        "hardware": f"{cores()} cores of {cpu}, Python {platform.python_version()}, {what}", "side_px": options.side
    }  # fmt: skip
    result["engine"] = options.engine
    where = "a core of its own, the service on the others" if options.apart else "the same cores"
    result["generator"] = where
    server = started(model / "artifact", options.port, CACHE / "endurance.log", options.engine, options.apart)
    try:
        result["overload"] = overload(server, options.port, bodies, options.overload_seconds)
        print(json.dumps(result["overload"], indent=1))
        capacity = result["overload"]["capacity"]
        result["soak"] = soak(server, options.port, bodies, options.soak_minutes, capacity)
    finally:
        server.stop()
    print(json.dumps({**result["soak"], "samples": len(result["soak"]["samples"])}, indent=1))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "endurance.json").write_text(json.dumps(result, indent=1))
    (options.output / "endurance.md").write_text(table(result))
    plot(result, options.output / "endurance.png")


if __name__ == "__main__":
    main()
