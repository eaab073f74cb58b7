"""A light closed-loop HTTP/1.1 load generator: one process, one thread, keep-alive sockets, epoll.

    python -m tests.bench.load http://127.0.0.1:8080/invocations --concurrency 32 --seconds 10 --images FOLDER

Closed loop: each of `concurrency` connections sends its next request when the answer to the last has arrived. It shares
the cores with the server it measures, so it does little: requests are built beforehand, of an answer it reads the
status line and the length. `run` starts it as a process of its own and reports its processor time a request.
"""

import argparse
import gc
import json
import math
import pickle
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
RETRY_S = 0.02
"""How long a connection rests after it was refused or closed, so that a dead server is not asked in a tight loop."""


@dataclass(frozen=True)
class LoadResult:
    """What one run measured; errors are no part of throughput and latency."""

    throughput: float
    """Answers with status 200 per second."""
    p50_ms: float
    p99_ms: float
    errors: dict[str, int]
    """Failed requests by kind: "status 503", "closed", "refused", "timeout", "garbage"."""
    n: int
    """Answers with status 200 in the measured time."""
    first_error: str = ""
    """What the first failed request was answered."""
    client_us: float = 0.0
    """Processor time of the generator per request, in microseconds."""


Requests = Sequence[tuple[bytes, str]]


def run(
    url: str, requests: Requests, concurrency: int, duration_s: float, warmup_s: float,
    headers: Mapping[str, str] | None = None, timeout_s: float = 60.0,
) -> LoadResult:  # fmt: skip
    """Send `requests` (body, content type) in turn for `duration_s` after `warmup_s`, from a process of its own."""
    plan = pickle.dumps((url, list(requests), concurrency, duration_s, warmup_s, dict(headers or {}), timeout_s))
    command = [sys.executable, "-m", "tests.bench.load", "--stdin"]
    result = subprocess.run(command, input=plan, stdout=subprocess.PIPE, cwd=ROOT, check=True)
    return LoadResult(**json.loads(result.stdout))


def generate(
    url: str, requests: Requests, concurrency: int, duration_s: float, warmup_s: float,
    headers: Mapping[str, str] | None = None, timeout_s: float = 60.0,
) -> LoadResult:  # fmt: skip
    """What `run` does, in this process."""
    parts = urlsplit(url)
    target = (parts.hostname or "127.0.0.1", parts.port or 80)
    fixed = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    path = parts.path or "/"
    built = [
        f"POST {path} HTTP/1.1\r\nHost: {target[0]}:{target[1]}\r\nContent-Type: {kind}\r\n{fixed}"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
        for body, kind in requests
    ]
    return _Generator(target, built, concurrency, timeout_s).run(duration_s, warmup_s)


def parse(received: bytes, ended: bool = False) -> tuple[int, bool] | None:
    """(status, whether the connection stays open) of a whole answer, None of a part of one.

    `ended`: the server has closed the connection, which ends an answer that states no length.
    Raises: ValueError if it is no HTTP answer.
    """
    split = received.find(b"\r\n\r\n")
    if split < 0:
        return None
    head = received[:split].lower()
    if not head.startswith(b"http/1."):
        raise ValueError("no HTTP answer")
    status = int(head[9:12])
    stays = head.startswith(b"http/1.1") and b"\r\nconnection: close" not in head
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        stop = head.find(b"\r\n", at + 2)
        length = int(head[at + 17 : stop if stop >= 0 else split])
        return (status, stays) if len(received) >= split + 4 + length else None
    if b"\r\ntransfer-encoding: chunked" in head:
        return (status, stays) if _chunks_end(received, split + 4) else None
    if status in (204, 304):
        return status, stays
    return (status, False) if ended else None


def _chunks_end(received: bytes, at: int) -> bool:
    while (stop := received.find(b"\r\n", at)) >= 0:
        size = int(received[at:stop].split(b";")[0], 16)
        if size == 0:  # trailers, then an empty line
            return received.startswith(b"\r\n", stop + 2) or b"\r\n\r\n" in received[stop + 2 :]
        at = stop + 2 + size + 2
    return False


@dataclass(eq=False, slots=True)
class _Connection:
    sock: socket.socket
    received: bytes = b""
    unsent: memoryview | None = None
    sent_s: float = 0.0


@dataclass(eq=False)
class _Generator:
    target: tuple[str, int]
    built: list[bytes]
    concurrency: int
    timeout_s: float
    place: int = 0
    first_error: str = ""
    times_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    begin_s: float = math.inf
    """From when on answers count."""

    def run(self, duration_s: float, warmup_s: float) -> LoadResult:
        self.poll = select.epoll()
        self.open: dict[int, _Connection] = {}
        self.resting: list[float] = [0.0] * self.concurrency  # when each missing connection is to be opened
        gc.disable()
        self.begin_s = time.perf_counter() + warmup_s
        end_s = self.begin_s + duration_s
        self.check_s = 0.0
        cpu_s, asked = time.process_time(), self.place
        try:
            while (now_s := time.perf_counter()) < end_s:
                if self.resting or now_s > self.check_s:
                    self._housekeeping(now_s)
                for fd, event in self.poll.poll(min(end_s - now_s, RETRY_S if self.resting else 0.5)):
                    connection = self.open.get(fd)
                    if connection is not None:
                        self._on_event(connection, event)
        finally:
            gc.enable()
            for connection in self.open.values():
                connection.sock.close()
            self.poll.close()
        cpu_us = 1e6 * (time.process_time() - cpu_s) / max(1, self.place - asked)
        times = sorted(self.times_ms)
        p50_ms, p99_ms = (percentile(times, share) for share in (0.5, 0.99))
        return LoadResult(
            len(times) / duration_s, p50_ms, p99_ms, dict(self.errors), len(times), self.first_error, cpu_us
        )

    def _housekeeping(self, now_s: float) -> None:
        """Open what is missing, give up what has waited too long."""
        due = [when for when in self.resting if when <= now_s]
        self.resting = [when for when in self.resting if when > now_s]
        for _ in due:
            try:
                sock = socket.create_connection(self.target, timeout=self.timeout_s)
            except OSError as exc:
                self._failed("refused", str(exc))
                self.resting.append(time.perf_counter() + RETRY_S)
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(sock)
            self.open[sock.fileno()] = connection
            self.poll.register(sock.fileno(), select.EPOLLIN)
            self._send_next(connection)
        self.check_s = now_s + 0.5
        for connection in [one for one in self.open.values() if now_s - one.sent_s > self.timeout_s]:
            self._failed("timeout", "")
            self._drop(connection)

    def _send_next(self, connection: _Connection) -> None:
        request = self.built[self.place % len(self.built)]
        self.place += 1
        connection.received = b""
        connection.sent_s = time.perf_counter()
        try:
            sent = connection.sock.send(request)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._failed("closed", str(exc))
            self._drop(connection)
            return
        if sent < len(request):
            connection.unsent = memoryview(request)[sent:]
            self.poll.modify(connection.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _on_event(self, connection: _Connection, event: int) -> None:
        if event & select.EPOLLOUT and connection.unsent is not None:
            try:
                connection.unsent = connection.unsent[connection.sock.send(connection.unsent) :]
            except BlockingIOError:
                pass
            except OSError:
                event |= select.EPOLLIN  # an answer may have come before the server closed; the read tells
                connection.unsent = None
            if not connection.unsent:
                connection.unsent = None
                self.poll.modify(connection.sock.fileno(), select.EPOLLIN)
        if event & ~select.EPOLLOUT:
            self._read(connection)

    def _read(self, connection: _Connection) -> None:
        ended = False
        try:
            data = connection.sock.recv(65536)
            ended = not data
        except BlockingIOError:
            return
        except OSError:
            data, ended = b"", True
        received = connection.received = connection.received + data if connection.received else data
        try:
            answer = parse(received, ended)
        except ValueError:
            self._failed("garbage", received[:500].decode("utf-8", "replace"))
            self._drop(connection)
            return
        if answer is None:
            if ended:
                self._failed("closed", received[:500].decode("utf-8", "replace"))
                self._drop(connection)
            return
        status, stays = answer
        done_s = time.perf_counter()
        if status == 200:
            if done_s >= self.begin_s:
                self.times_ms.append(1000 * (done_s - connection.sent_s))
        else:
            self._failed(f"status {status}", received.partition(b"\r\n\r\n")[2][:500].decode("utf-8", "replace"))
        if not stays or connection.unsent is not None:  # answered before all was sent: what follows is undefined
            self._drop(connection, rest_s=0.0 if status == 200 else RETRY_S)
        else:
            self._send_next(connection)

    def _failed(self, kind: str, what: str) -> None:
        if not self.first_error:
            self.first_error = f"{kind}: {what}"
        if time.perf_counter() >= self.begin_s:
            self.errors[kind] += 1

    def _drop(self, connection: _Connection, rest_s: float = RETRY_S) -> None:
        del self.open[connection.sock.fileno()]  # closing takes it out of the poll, too
        connection.sock.close()
        self.resting.append(time.perf_counter() + rest_s)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed (nearest rank); NaN of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--warmup", type=float, default=2)
    parser.add_argument("--images", type=Path, help="folder of JPEG files")
    parser.add_argument("--stdin", action="store_true", help="the plan comes pickled from our own `run`")
    options = parser.parse_args()
    if options.stdin:
        result = generate(*pickle.loads(sys.stdin.buffer.read()))
    elif options.url is None or options.images is None:
        parser.error("name a URL, and a folder of images with --images")
    else:
        files = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        requests = [(path.read_bytes(), "image/jpeg") for path in files]
        result = generate(options.url, requests, options.concurrency, options.seconds, options.warmup)
    print(json.dumps(asdict(result), indent=None if options.stdin else 1))


if __name__ == "__main__":
    main()
