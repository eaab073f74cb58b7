"""uvicorn's server, which stops in the order that load balancers need: first /ping turns red, then what is under way is
answered, and only then is the port closed.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn

from service.lifeline import FILES_BESIDES, MAX_CONNECTIONS, Lifeline, allow_files, take_no_more
from service.protocol import ROOM, Protocol, sweep_all
from service.runtime import Runtime
from service.settings import Settings

DRAIN_S = 22.0
"""How long requests under way may take after SIGTERM; SageMaker kills 30 s after it."""

CLOSE_S = 3.0
"""How long connections may take to close then."""

SETTLE_S, SETTLE_TURNS = 0.3, 15
"""How long a connection that was made just before the end may take to send its request, and in how many pieces that is
waited for: where the whole machine stands still, as virtual ones do, one of them passes and not all."""

ACCEPTED_AT_ONCE = 16
"""Connections that one turn of the event loop accepts. libuv accepts one on each descriptor of the port; in an overload
(2 cores with AMX, 224 px, int8, five times the capacity) a turn takes 10 to 50 ms: new clients waited in the kernel's
queue until it was over, or were turned away."""


class Server(uvicorn.Server):
    """Serves `app` on `listener` until `should_exit`."""

    def __init__(
        self, app: Any, lifeline: Lifeline | None = None, gives_way: Callable[[], bool] = lambda: False
    ) -> None:
        """Of a worker: `lifeline`, where connections are reported; `gives_way`, whether another takes its place when it
        ends, with the same socket, which must then stay as it is.
        """
        settings: Settings = app.state.settings
        most = min(MAX_CONNECTIONS, allow_files() - FILES_BESIDES) if lifeline is None else lifeline.capacity - ROOM
        protocol = partial(
            Protocol,
            telemetry=app.direct,
            overload=lambda: app.state.runtime.overload(),
            lifeline=lifeline,
            max_connections=most,
            overload_status=settings.overload_status,
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,  # type: ignore[arg-type]  # uvicorn does no more than call it
                ws="none", log_config=None, access_log=False, server_header=False,
                proxy_headers=False, timeout_graceful_shutdown=int(CLOSE_S),
            )
        )  # fmt: skip
        self._app = app
        self._sweeping: asyncio.Task[None] | None = None
        self._lifeline = lifeline
        self._duplicates: list[socket.socket] = []
        self._gives_way = gives_way

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        self._duplicates = [listener.dup() for listener in sockets or [] for _ in range(ACCEPTED_AT_ONCE - 1)]
        await super().startup(None if sockets is None else [*sockets, *self._duplicates])

    async def main_loop(self) -> None:
        """See `uvicorn.Server`."""
        self._sweeping = asyncio.create_task(sweep_all(self.server_state.connections, self._lifeline))
        await super().main_loop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close; see `uvicorn.Server`."""
        runtime: Runtime = self._app.state.runtime
        await runtime.drain(DRAIN_S)
        if not self._gives_way():
            await self._close_port(sockets or [], runtime)
        await super().shutdown([*(sockets or []), *self._duplicates])
        if self._sweeping is not None:
            self._sweeping.cancel()

    async def _close_port(self, listeners: Sequence[socket.socket], runtime: Runtime) -> None:
        """For good, for the supervisor and all that have a duplicate of the sockets."""
        for listener in listeners:
            take_no_more(listener)
        for _ in range(SETTLE_TURNS):  # what is connected by now is accepted, and sends its request
            await asyncio.sleep(SETTLE_S / SETTLE_TURNS)
        await runtime.admission.all_done()
        for listener in listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # from now on, refused
