"""Servers under measurement: started with a mark in their environment, by which every process of theirs is found.

Ray's and Java's servers start daemons that leave the process tree; the mark, an environment variable with a random
value, stays with them. Memory is summed over the marked processes, and only they are ended.
"""

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MARK = "RESNET34_BENCH_MARK"
PROC = Path("/proc")


class NotStarted(Exception):
    """A server that ended or was not ready in time; the message has the end of its log."""


@dataclass(frozen=True)
class Memory:
    """Resident memory of all processes of a server, in MiB."""

    pss: float
    """Shared pages counted by share: what the server really takes."""
    rss: float
    """Shared pages counted in every process."""
    processes: int


@dataclass
class Server:
    """One running server."""

    command: Sequence[str]
    environment: Mapping[str, str]
    ready_url: str
    log: Path
    cwd: Path | None = None
    startup_s: float = 0.0
    """From the start of the process to the first 200 on `ready_url`."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[bytes] | None = None

    def start(self, limit_s: float) -> "Server":
        """Start and wait for the first 200. Raises: NotStarted, after which nothing runs."""
        environment = {**clean_environment(), **self.environment, MARK: self.mark}
        started_s = time.perf_counter()
        try:
            with self.log.open("wb") as out:
                self.process = subprocess.Popen(
                    self.command, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                    cwd=self.cwd, start_new_session=True,
                )  # fmt: skip
            self._wait(started_s + limit_s)
        except (NotStarted, OSError) as exc:
            self.stop()
            raise NotStarted(f"{exc}; {tail(self.log)}") from exc
        except BaseException:
            self.stop()
            raise
        self.startup_s = time.perf_counter() - started_s
        return self

    def _wait(self, until_s: float) -> None:
        assert self.process is not None
        while time.perf_counter() < until_s:
            if self.process.poll() is not None:
                raise NotStarted(f"ended with status {self.process.returncode}")
            try:
                with urllib.request.urlopen(self.ready_url, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.02)
        raise NotStarted("was not ready in time")

    def memory(self) -> Memory:
        """What its processes hold now."""
        pss = rss = 0
        pids = self.pids()
        for pid in pids:
            try:
                lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
            except OSError:  # ended in between
                continue
            values = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:] if line.endswith("kB")}
            pss, rss = pss + values.get("Pss", 0), rss + values.get("Rss", 0)
        return Memory(pss / 1024, rss / 1024, len(pids))

    def pids(self) -> list[int]:
        """All processes that carry the mark."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for folder in PROC.iterdir():
            if folder.name.isdecimal():
                try:
                    variables = (folder / "environ").read_bytes()
                except OSError:  # ended, or another user's
                    continue
                if wanted in variables.split(b"\0"):
                    found.append(int(folder.name))
        return found

    def stop(self, grace_s: float = 15.0) -> None:
        """SIGTERM to the first process, later SIGKILL to its group and to whatever else carries the mark."""
        if self.process is None:
            return
        self.process.terminate()
        ended, until_s = False, time.monotonic() + grace_s
        while not self._gone() and time.monotonic() < until_s:
            if not ended and self.process.poll() is not None:  # what it left behind gets less time
                ended, until_s = True, min(until_s, time.monotonic() + grace_s / 5)
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        until_s = time.monotonic() + 10
        while not self._gone() and time.monotonic() < until_s:  # the next subject starts on a free machine
            time.sleep(0.05)

    def _gone(self) -> bool:
        """No process with the mark, twice: one that just becomes another program shows no environment."""
        if self.pids():
            return False
        time.sleep(0.05)
        return not self.pids()


def clean_environment() -> dict[str, str]:
    """This process's environment without what would steer a server or its Python."""
    prefixes = ("CLASSIFIER_", "SAGEMAKER_", "SM_", "PYTHON", "VIRTUAL_ENV", "OMP_", "MKL_", "TS_", "MLFLOW_", "RAY_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def tail(log: Path, characters: int = 600) -> str:
    """The end of a log in one line."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return "its log ends: " + " ".join(text.split())[-characters:] if text.strip() else "its log is empty"
