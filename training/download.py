"""What every download of ours has: a limit to silence, and a sentence when it fails."""

import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from training.errors import TrainingError

TIMEOUT_S = 20.0
"""How long a connection may be silent before a download gives up."""


@contextmanager
def downloading(what: str, by_hand: str, error: type[TrainingError]) -> Iterator[None]:
    """Run a download that uses urllib, as torch's and torchvision's do: they open connections without a timeout.

    Raises: `error`, saying why, and `by_hand`, what to do without network.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    except (OSError, RuntimeError, http.client.HTTPException) as exc:
        reason = str(exc).strip() or type(exc).__name__
        raise error(f"{what} cannot be downloaded ({reason}). {by_hand}") from exc
    finally:
        socket.setdefaulttimeout(before)
