"""The service's port: one listening socket for each worker, and nobody else's.

`python -m service.listeners HOST PORT` says whether it can be had, for `make serve` before it trains a starter.
"""

import argparse
import errno
import socket
import sys
from collections.abc import Sequence

BACKLOG = 2048
"""Connections that wait to be accepted; uvicorn's default."""


def open_port(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` sockets that listen on the port, among which Linux spreads connections (SO_REUSEPORT, socket(7)).

    Where the port is another's, it stays so: the first socket takes it for itself alone and shares it only once it
    listens, so that of two services started in the same moment one gets it, never both.
    Raises: OSError when the port is in use, or the address not this machine's; OverflowError for no port's number.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listeners: list[socket.socket] = []
    try:
        for index in range(count):
            listeners.append(listener := socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if index:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
            if not index and count > 1:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except (OSError, OverflowError):
        for listener in listeners:
            listener.close()
        raise
    return listeners


def refusal(host: str, port: int, exc: Exception) -> str:
    """Why the port cannot be had, and what to do, in a sentence."""
    if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
        other = port + 1 if port < 65535 else 8080
        remedy = (
            f"stop what uses it or choose another port (make serve PORT={other}; --port or CLASSIFIER_PORT={other})"
        )
    else:
        remedy = "choose an address of this machine, or another port"
    why = getattr(exc, "strerror", None) or exc
    return f"Cannot listen on {ascii(host)[1:-1][:200]} port {port}: {why}; {remedy}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Open the port and close it again; returns the exit status, 1 with a sentence when it cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m service.listeners", description="Can the port be had?")
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    given = parser.parse_args(arguments)
    try:
        (listener,) = open_port(given.host, given.port, 1)
    except OverflowError as exc:
        parser.error(f"port {given.port}: {exc}")
    except OSError as exc:
        sys.stderr.write(f"{refusal(given.host, given.port, exc)}\n")
        return 1
    listener.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
