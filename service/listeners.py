"""The service's port: one listening socket for each worker, and nobody else's."""

import socket

BACKLOG = 2048
"""Connections that wait to be accepted; uvicorn's default."""


def open_port(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` sockets that listen on the port, among which Linux spreads connections (SO_REUSEPORT, socket(7)).

    Where the port is another's, it stays so: the first socket takes it for itself alone and shares it only once it
    listens, so that of two services started in the same moment one gets it, never both.
    Raises: OSError when the port is in use, or the address not this machine's.
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
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners
