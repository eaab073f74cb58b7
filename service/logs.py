"""Log lines: one handler on stdout, as text for people or one JSON object a line for programs; times in UTC.

Everything the process says goes through here: our lines, the libraries', warnings, and exceptions nobody caught.
Of query strings and headers, only the request's id is ever logged; of settings, none whose name tells of a secret.
"""

import io
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, TextIO

Format = Literal["text", "json"]

_SECRET = re.compile(r"token|secret|password|passwd|credential|auth|(?:^|_)key", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s]+(?=@)")
MASK = "***"

PATIENCE_MS = 100
"""How long a line waits, once, for the reader of the log."""

_encode = json.JSONEncoder(default=str).encode  # json.dumps would make an encoder for each line


def configure_logging(level: str, format: Format = "text") -> None:
    """One handler on stdout, flushed line by line, for our lines, uvicorn's, warnings and uncaught exceptions."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # whatever a library or a client's path has in it can be written
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    handler = UnblockedHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    # A disk that is full or a reader that is gone costs lines, not a trace on stderr for each of them.
    logging.raiseExceptions = False
    # What no line of ours shows is not looked up for it (logging HOWTO, Optimization).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    # Lines of the libraries that repeat ours or say nothing to the user.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))
    for name in ("PIL", "urllib3", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a form that is none is the client's to mend


def shown(settings: Mapping[str, Any]) -> str:
    """Settings as `name=value` pairs; the values of names that tell of a secret, and names in URLs, are masked."""
    pairs = ((name, MASK if _SECRET.search(name) else value) for name, value in settings.items())
    return " ".join(f"{name}={masked(str(value))}" for name, value in pairs)


def masked(text: str) -> str:
    """The text without the name and password of any URL in it."""
    return _USERINFO.sub(MASK, text)


def counted(count: int, noun: str) -> str:
    """The number with the noun, in the plural where it is not one."""
    return f"{count} {noun}{'s' * (count != 1)}"


class UnblockedHandler(logging.StreamHandler[TextIO]):
    """Drops lines where nobody reads them any more, and tells how many once somebody does.

    A pipe that is full would otherwise hold up whoever logs, and with it every request.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._dropped = 0
        self._torn = False
        self._poll: select.poll | None = None
        with suppress(OSError, ValueError, AttributeError):  # no file at all, or a system without poll
            poll = select.poll()
            self._fd = stream.fileno()
            poll.register(self._fd, select.POLLOUT)
            self._poll = poll

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or count it."""
        if self._poll is None:
            super().emit(record)
            return
        try:
            line = self.format(record)
            if self._dropped:
                said = f"{self._dropped} lines before this were not read"
                warning = logging.makeLogRecord({"levelname": "WARNING", "name": __name__, "msg": said})
                line = "\n" * self._torn + f"{self.format(warning)}\n{line}"
            if self._write(f"{line}\n".encode("utf-8", "backslashreplace")):
                self._dropped, self._torn = 0, False
            else:
                self._dropped += 1
        except Exception:  # noqa: BLE001  # as logging's own handlers do
            self.handleError(record)

    def _write(self, line: bytes) -> bool:
        """In pieces that a pipe takes whole where it takes any (PIPE_BUF, pipe(7)); False when it takes no more."""
        assert self._poll is not None
        for start in range(0, len(line), select.PIPE_BUF):
            if not self._poll.poll(0 if self._dropped else PATIENCE_MS):
                self._torn |= start > 0
                return False
            os.write(self._fd, line[start : start + select.PIPE_BUF])  # no buffer: a full disk would leave lines in it
        return True


class _UtcFormatter(logging.Formatter):
    """Times as RFC 3339 writes them, in UTC, to the millisecond; the text of a second is made once."""

    def __init__(self) -> None:
        super().__init__()
        self._second = (0, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  # logging's name
        """When the line was made, such as 2026-11-22T17:16:03.123Z."""
        second, text = self._second
        if second != int(record.created):
            second = int(record.created)
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = (second, text)
        return f"{text}.{int((record.created - second) * 1000):03d}Z"

    def trace(self, record: logging.LogRecord) -> str:
        """The exception that came with the line, and what led to it; "" without one."""
        parts = [self.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
        return "\n".join(parts + ([self.formatStack(record.stack_info)] if record.stack_info else []))


class TextFormatter(_UtcFormatter):
    """`TIME LEVEL LOGGER MESSAGE`, and the trace of an exception in the lines below."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = f"{self.formatTime(record)} {record.levelname} {record.name} {record.getMessage()}"
        trace = self.trace(record)
        return f"{line}\n{trace}" if trace else line


class JsonFormatter(_UtcFormatter):
    """One object a line: `time`, `level`, `logger`, `pid`, `message`, and `exception` with its trace.

    A message with a method `fields` (`service.record.RequestRecord`) gives these, typed, and `message` among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()  # which of the workers says it

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        line["pid"] = self._pid
        fields = getattr(record.msg, "fields", None)
        line |= fields() if callable(fields) else {"message": record.getMessage()}
        if trace := self.trace(record):
            line["exception"] = trace
        return _encode(line)


def _log_uncaught(kind: type[BaseException], exc: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, exc, trace)
    else:
        logging.getLogger("service").critical("The process ends on an error of its own.", exc_info=(kind, exc, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread is not None else "unknown"
    if args.exc_value is not None:
        log = logging.getLogger("service")
        log.error("The thread %s ended on an error.", name, exc_info=args.exc_value)
