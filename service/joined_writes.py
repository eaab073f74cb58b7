"""An answer's head waits for the first of its body.

uvicorn writes them one after the other and uvloop sends each at once: two calls of the kernel, two packets, and a
client that wakes up twice.
"""

import asyncio
from typing import Any


class JoinedWrites:
    """The transport as one request's answer is written to it. See the module."""

    def __init__(self, cycle: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._loop = loop
        self._head: bytes | None = None
        self._head_is_written = False

    def write(self, data: bytes) -> None:
        """See `asyncio.WriteTransport`. A head that nothing follows leaves in the next turn of the event loop."""
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.writelines([head, data])
        elif self._head_is_written or not self._cycle.response_started:  # before the answer there is 100 Continue
            self._transport.write(data)
        else:
            self._head_is_written, self._head = True, data
            self._loop.call_soon(self.flush)

    def close(self) -> None:
        """See `asyncio.BaseTransport`."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """See `asyncio.BaseTransport`."""
        return bool(self._transport.is_closing())

    def flush(self) -> None:
        """Send a head that still waits."""
        head, self._head = self._head, None
        if head is not None and not self._transport.is_closing():
            self._transport.write(head)
