"""The app over real sockets, with a fake engine where the model does not matter: what tests of HTTP share."""

import asyncio
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from service.app import create_app
from service.classifier import Classifier, ModelCard
from service.engines.fake import FakeEngine
from service.schemas import ErrorResponse
from service.server import Server
from service.settings import Settings


def png(grey: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(grey: int = 7) -> bytes:
    """Plain and tiny: decoded on the event loop, without a process that must start first."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (grey, grey, grey)).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


def form(*files: bytes, boundary: str = "xYz") -> tuple[bytes, str]:
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="f"; filename="{i}.png"\r\n\r\n'.encode()
        + file
        + b"\r\n"
        for i, file in enumerate(files)
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    def __init__(self, port: int, app: Any, server: Server) -> None:
        self.port = port
        self.app = app
        self._server = server

    def connections(self) -> list[Any]:
        """The protocols of those that are open."""
        return list(self._server.server_state.connections)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(3000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("the condition did not come true in 30 s")


@contextmanager
def serve(
    engine: FakeEngine, ready: bool = True, on_failure: Callable[[], None] | None = None, **settings: Any
) -> Iterator[Served]:
    card = ModelCard("fake", "1", tuple(f"grey {k}" for k in range(engine.num_classes)))
    app = create_app(Settings(**settings), Classifier(card, 32, engine), on_failure)
    server = Server(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:  # uvloop, as in the service
                runner.run(server.serve(sockets=[listener]))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            served = Served(listener.getsockname()[1], app, server)
            served.until(lambda: server.started)
            if ready:
                served.until(lambda: app.state.runtime.state == "ready")
            yield served
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def assert_error(reply: Reply, status: int, code: str) -> str:
    """Every error has the one shape, carries the id of the header, and shows no trace."""
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json")
    error = ErrorResponse.model_validate_json(reply.body).error
    assert error.code == code
    assert error.request_id == reply.headers["x-request-id"]
    assert error.message.endswith(".")
    assert "Traceback" not in error.message
    return error.message
