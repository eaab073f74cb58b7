"""What containers print, as CloudWatch keeps it: batches of lines into a stream of moto's logs."""

import contextlib
import threading
import time
from typing import Any

from botocore.exceptions import ClientError

FLUSH_S = 0.3


class Stream:
    """A log stream. Lines are sent in batches from a thread, as CloudWatch's agent does."""

    def __init__(self, client: Any, group: str, name: str) -> None:
        self._client, self._group, self._name = client, group, name
        self._waiting: list[dict[str, Any]] = []
        self._lock, self._over = threading.Lock(), threading.Event()
        self.lines: list[str] = []
        for call, arguments in (
            (client.create_log_group, {"logGroupName": group}),
            (client.create_log_stream, {"logGroupName": group, "logStreamName": name}),
        ):
            try:
                call(**arguments)
            except ClientError as exc:  # by its code: two threads that come first may be given two classes of it
                if exc.response["Error"]["Code"] != "ResourceAlreadyExistsException":
                    raise
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def add(self, line: str) -> None:
        with self._lock:
            self.lines.append(line)
            if line.strip():
                self._waiting.append({"timestamp": int(time.time() * 1000), "message": line})

    def close(self) -> None:
        self._over.set()
        self._thread.join(10)

    def _send(self) -> None:
        while True:
            over = self._over.wait(FLUSH_S)
            with self._lock:
                batch, self._waiting = self._waiting, []
            if batch:
                with contextlib.suppress(Exception):  # the group may have been deleted meanwhile
                    self._client.put_log_events(
                        logGroupName=self._group, logStreamName=self._name, logEvents=batch
                    )  # fmt: skip
            if over:
                return
