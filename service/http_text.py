"""HTTP/1.1 messages as bytes (RFC 9112): the head of an answer, and a request as if it had offered no upgrade."""

import re
from collections.abc import Iterable

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from service.tracing import Headers

NO_BODY = (204, 304)
"""Answers that have none, whatever their headers say (RFC 9110, 6.4.1)."""

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""What may stand in no header (RFC 9110, 5.5); a line break would end one early."""


def answer_head(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Status line, headers and the empty line. Raises: ValueError where a header has a control character."""
    lines = [b"%s: %s" % header for header in headers]
    if _CONTROL.search(b"".join(lines)):
        raise ValueError("a header has a control character")
    return b"%s%s\r\n\r\n" % (STATUS_LINE[status], b"\r\n".join(lines))


def is_whole(status: int, headers: Headers, body: bytes) -> bool:
    """Whether the headers announce this very body, and the answer may have one."""
    lengths = [value for name, value in headers if name == b"content-length"]
    return status not in NO_BODY and lengths == [b"%d" % len(body)]


def without_upgrade(method: bytes, url: bytes, version: bytes, headers: Headers, keep_alive: bool) -> bytes:
    """The head of a request without the upgrade it offered (RFC 9110, 7.8: a server may ignore it)."""
    lines = [b"%s %s HTTP/%s" % (method, url, version)]
    lines += [b"%s: %s" % header for header in headers if header[0] not in (b"upgrade", b"connection")]
    if not keep_alive:
        lines.append(b"connection: close")
    return b"\r\n".join([*lines, b"", b""])
