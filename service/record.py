"""What is known of one request: the log's line, and what metrics and traces are made of.

Apart from `telemetry`, which fills it in, because the supervisor, which begins with few imports, writes such lines too.
"""

import json
import os
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

_ids = random.Random()  # noqa: S311  # told apart they must be, guessed they may be
os.register_at_fork(after_in_child=_ids.seed)  # each worker has its own
_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
SHOWN_PATH = 200
"""So much of a path is logged, in characters: uvicorn lets 64 KiB through."""


@dataclass
class RequestRecord:
    """What is known of one request; the stages fill it in."""

    request_id: str
    method: str
    path: str
    status: int = 0
    code: str = "unanswered"
    bytes_in: int = 0
    images: int | None = None
    decode_ms: float | None = None
    queue_ms: float | None = None
    infer_ms: float | None = None
    total_ms: float = 0.0
    batch_size: int | None = None
    trace_id: str | None = None
    started_s: float = field(default_factory=time.perf_counter, repr=False)
    answered_s: float | None = field(default=None, repr=False)
    """When the answer began, on the clock of `started_s`."""

    def fields(self) -> dict[str, Any]:
        """What is known, by name; times in ms to the microsecond."""
        pairs = ((name, getattr(self, name)) for name in _SHOWN)
        known = {
            name: round(value, 3) if value.__class__ is float else value for name, value in pairs if value is not None
        }
        known["path"] = self.path[:SHOWN_PATH]
        return {"message": "request", **known}

    def __str__(self) -> str:
        """The record as `key=value` pairs; what is not known is left out."""
        pairs = ((name, getattr(self, name)) for name in _SHOWN)
        return " ".join([f"{name}={_text(value)}" for name, value in pairs if value is not None])

    def server_timing(self) -> bytes:
        """The stages up to now as a Server-Timing header (https://www.w3.org/TR/server-timing/), durations in ms."""
        text = f"total;dur={(time.perf_counter() - self.started_s) * 1000:.1f}"
        if self.infer_ms is not None:
            text = f"infer;dur={self.infer_ms:.1f}, {text}"
        if self.queue_ms is not None:
            text = f"queue;dur={self.queue_ms:.1f}, {text}"
        if self.decode_ms is not None:
            text = f"decode;dur={self.decode_ms:.1f}, {text}"
        return text.encode()


_SHOWN = tuple(item.name for item in fields(RequestRecord) if item.repr)


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own id where it is harmless, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _SAFE_ID.fullmatch(value):
            return str(value, "ascii")
    return new_request_id()


def new_request_id() -> str:
    """32 hexadecimal digits. The kernel is not asked for each: that is a tenth of a refusal by the head (py-spy, 1,633
    samples, 2 cores of a Xeon with AMX).
    """
    return f"{_ids.getrandbits(128):032x}"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    text = str(value)[:SHOWN_PATH]
    return text if text.isprintable() and " " not in text else json.dumps(text)
