"""Where the service's time goes under load: processor time an image by thread, and the lines that hold the GIL.

    python -m tests.bench.service_profile [--side 224] [--clients 32] [--seconds 10]

The closed-loop generator runs on the same cores, with a connection for each client. Lines are sampled by py-spy, which
uv fetches (https://github.com/benfred/py-spy; it reads another process's memory: as root, or with CAP_SYS_PTRACE).
Writes tests/bench/results/profile-{SIDE}px.txt, of one client profile-{SIDE}px-1-client.txt.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import psutil

from service.model.machine import cores
from tests.bench import load
from tests.bench.endurance import CACHE, RESULTS, started
from tests.bench.inputs import payloads
from tests.bench.models import write
from tests.bench.processes import Server
from tests.bench.table import commit, machine

PY_SPY = "py-spy@0.4.3"
RATE_HZ = 400
WARMUP_S = 3.0
SHOWN = 40
"""Lines of each kind in the file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile and write the file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--engine", default="openvino-int8")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--port", type=int, default=8093)
    options = parser.parse_args(arguments)
    CACHE.mkdir(parents=True, exist_ok=True)
    bodies, inputs = payloads(options.side, CACHE)
    folder = CACHE / f"endurance-{options.side}"
    if not (folder / "facts.json").exists():
        write(folder, options.side, bodies)
    server = started(folder / "artifact", options.port, CACHE / "profile.log", options.engine)
    try:
        text = profiled(server, options.port, bodies, options.clients, options.seconds)
    finally:
        server.stop()
    head = (
        f"{date.today()}, commit {commit()}, {machine()}; {options.side} px, {options.engine}, "
        f"{options.clients} client{'s' * (options.clients > 1)}, inputs: {inputs}.\n"
    )
    path = RESULTS / f"profile-{options.side}px{'' if options.clients > 1 else '-1-client'}.txt"
    path.write_text(head + text)
    sys.stdout.write(head + text)
    return 0


def profiled(server: Server, port: int, bodies: Sequence[bytes], clients: int, seconds: int) -> str:
    """Load without the profiler, whose time would be in the figures, then with it."""
    url, requests = f"http://127.0.0.1:{port}/invocations", [(body, "image/jpeg") for body in bodies]
    workers = sorted(pid for pid in server.pids() if psutil.Process(pid).name().startswith("worker-"))
    load.run(url, requests, clients, 1.0, WARMUP_S)
    before = {pid: _processor_s(pid) for pid in server.pids()}
    result = load.run(url, requests, clients, float(seconds), 0.0)
    after = {pid: _processor_s(pid) for pid in server.pids()}
    took = {
        pid: tuple(now - was for now, was in zip(after[pid], before.get(pid, (0.0, 0.0)), strict=True)) for pid in after
    }
    event_loops = sum(took[pid][1] for pid in workers)
    threads = sum(took[pid][0] for pid in workers) - event_loops
    others = sum(whole for pid, (whole, _) in took.items() if pid not in workers)
    rows = [
        ("event loop", event_loops),
        ("network and decoding threads", threads),
        ("supervisor and decoder processes", others),
        ("load generator", result.client_us * 1e-6 * result.n),
    ]
    lines = [
        f"{result.throughput:.0f} images/s, {result.p50_ms:.1f} ms (p50, n = {result.n}); of {cores()} cores an image "
        "takes, in ms of one:\n"
    ]
    lines += [f"  {seconds_ * 1000 / result.n:6.3f}  {name}\n" for name, seconds_ in rows]
    return "".join(lines) + _lines_of(workers[0], url, requests, clients, seconds)


def _processor_s(pid: int) -> tuple[float, float]:
    """Processor time of a process, and that of its first thread (proc_pid_schedstat: nanoseconds)."""
    times = psutil.Process(pid).cpu_times()
    first = int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9
    return times.user + times.system, first


def _lines_of(pid: int, url: str, requests: load.Requests, clients: int, seconds: int) -> str:
    """The lines of one worker that hold the GIL most often."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        uv = os.environ.get("UV", "uv")
        command = [uv, "tool", "run", PY_SPY, "record", "--gil"]
        command += ["-r", str(RATE_HZ), "-d", str(seconds), "-f", "raw", "-o", str(raw), "-p", str(pid)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as spy:
            load.run(url, requests, clients, seconds + 2.0, WARMUP_S)
            _, problem = spy.communicate()
        if spy.returncode:
            return f"py-spy failed: {problem.decode(errors='replace').strip()}\n"
        return _summary(raw.read_text(), seconds)


def _summary(raw: str, seconds: int) -> str:
    """`raw`: a line for each stack, "frame;frame;... count"."""
    own, whole = Counter[str](), Counter[str]()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        own[frames[-1]] += int(count)
        for frame in {each.rpartition(":")[0] for each in frames}:
            whole[frame] += int(count)
    samples = own.total()
    text = [
        f"{PY_SPY} --gil, {RATE_HZ} Hz for {seconds} s of one worker: {samples} of {RATE_HZ * seconds} samples hold "
        "the GIL. A thread that waits for a core while it holds the GIL counts as well. 'self': the line itself; "
        "'cum': with what it calls.\n"
    ]
    text += [f"  self {100 * count / samples:5.1f}%  {frame}\n" for frame, count in own.most_common(SHOWN)]
    text += [f"  cum  {100 * count / samples:5.1f}%  {frame})\n" for frame, count in whole.most_common(SHOWN)]
    return "".join(text)


if __name__ == "__main__":
    sys.exit(main())
