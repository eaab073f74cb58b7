"""HEALTHCHECK of the image: exit status 0 when the service answers GET /ping with 200 within 2 s, as SageMaker asks.

Needs neither curl nor the service's settings: the port is that of the command line, the environment, or 8080.
"""

import http.client
import os
import sys
from itertools import pairwise
from pathlib import Path

TIMEOUT_S = 2


def port(command_line: bytes, environ: "os._Environ[str] | dict[str, str]") -> int:
    """Where the service listens; `command_line` as in /proc/1/cmdline, separated by NUL."""
    words = command_line.decode(errors="replace").split("\0")
    flags = [after for word, after in pairwise(words) if word == "--port"]
    flags += [word.partition("=")[2] for word in words if word.startswith("--port=")]
    text = flags[-1] if flags else environ.get("CLASSIFIER_PORT") or environ.get("SAGEMAKER_BIND_TO_PORT") or "8080"
    return int(text)


def main() -> int:
    """Ask once; returns the exit status, and says on stdout what docker inspect will show."""
    try:
        connection = http.client.HTTPConnection(
            "127.0.0.1", port(Path("/proc/1/cmdline").read_bytes(), os.environ), timeout=TIMEOUT_S
        )
        connection.request("GET", "/ping")
        response = connection.getresponse()
        print(response.status, response.read(200).decode(errors="replace"))  # noqa: T201
    except (OSError, ValueError, http.client.HTTPException) as exc:
        print(exc)  # noqa: T201
        return 1
    return 0 if response.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
