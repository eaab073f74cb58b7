"""uvicorn's server, which stops in the order that load balancers need: first /ping turns red, then what is under way is
answered, and only then is the port closed.
"""

import asyncio
import ctypes
import resource
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

import uvicorn

from service.lifeline import Lifeline
from service.protocol import Protocol, sweep_all
from service.runtime import Runtime

DRAIN_S = 22.0
"""How long requests under way may take after SIGTERM; SageMaker kills 30 s after it."""

CLOSE_S = 3.0
"""How long connections may take to close then."""

SETTLE_S = 0.2
"""How long a connection that was made just before the end may take to send its request."""

KEEP_ALIVE_S = 75.0
"""How long an idle connection is kept: longer than load balancers do (60 s on AWS), so that they close first and never
send a request into a closed one."""

SO_ATTACH_FILTER = 26
"""asm-generic/socket.h; Python has no name for it."""

FILES_BESIDES = 256
"""File descriptors that are no connections, at most."""


class Server(uvicorn.Server):
    """Serves `app` on `listener` until `should_exit`."""

    def __init__(self, app: Any, lifeline: Lifeline | None = None) -> None:
        """`lifeline`: where connections are reported, if this process is a worker."""
        super().__init__(
            uvicorn.Config(
                app, http=Protocol, ws="none", log_config=None, access_log=False, server_header=False,
                proxy_headers=False, timeout_graceful_shutdown=int(CLOSE_S), timeout_keep_alive=int(KEEP_ALIVE_S),
            )
        )  # fmt: skip
        self._app = app
        self._lifeline = Protocol.lifeline = lifeline
        Protocol.metrics = app.state.metrics
        Protocol.max_connections = min(Protocol.max_connections, allow_files() - FILES_BESIDES)

    async def main_loop(self) -> None:
        """See `uvicorn.Server`."""
        sweeping = asyncio.create_task(sweep_all(self.server_state.connections, self._lifeline))
        try:
            await super().main_loop()
        finally:
            sweeping.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close; see `uvicorn.Server`."""
        runtime: Runtime = self._app.state.runtime
        await runtime.drain(DRAIN_S)
        for listener in sockets or []:
            take_no_more(listener)
        await asyncio.sleep(SETTLE_S)  # what is connected by now is accepted, and sends its request
        await runtime.admission.all_done()
        for listener in sockets or []:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # the supervisor's duplicate too: from now on, refused
        await super().shutdown(sockets)


def take_no_more(listener: socket.socket) -> None:
    """Let no further connection be made: one that waited to be accepted when the socket is closed would be reset.

    By a filter that drops every packet to the listening socket (SO_ATTACH_FILTER, socket(7)): who connects now tries
    again after a second, and is refused then. Elsewhere than on Linux the last ones may be reset.
    """
    if sys.platform != "linux":
        return
    drop_all = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0 bytes
    with suppress(OSError):
        program = struct.pack("@HP", 1, ctypes.addressof(drop_all))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def allow_files() -> int:
    """Let this process open as many files as it may. Returns: how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft if soft != resource.RLIM_INFINITY else wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
