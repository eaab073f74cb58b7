"""The program of a decoder process: image bytes in, resized pixels or a sentence out, one image at a time.

    request  header (side, pixel limit, seconds of processor time, payload length), payload
    answer   header (outcome, length), then uint8 `[S, S, 3]` or the sentence

Started by `service.decoding` with one end of a socket pair as its standard input; says READY first, ends when the other
end is closed. The kernel bounds what a hostile image can do in here: processor time (a timer whose signal ends the
process whatever C code runs), address space, no file written, no core dump. This process is the first to go when the
machine runs out of memory, and it goes with the service, however that ends.

Run as a script, by path: it imports numpy, Pillow, simplejpeg, cykooz_resizer and what of `service.model` decodes,
nothing else of the service (tests/service/test_decoding.py).
"""

import contextlib
import ctypes
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

REQUEST = struct.Struct("<IIdI")
"""Side in pixels, most pixels, seconds of processor time, bytes of the payload."""

ANSWER = struct.Struct("<BI")
"""Outcome, bytes that follow."""

READY = b"+"
"""What a process says that can decode."""

SLACK_BYTES = 96 * 2**20
"""Address space besides that of pixels and payload: the resized image, tables of the codecs, what malloc keeps."""

PAYLOAD_COPIES = 4
"""In memory at once, at most: what is read, joined, handed to Pillow, and of which a plugin takes a piece."""


TRIM_BYTES, TRIM_PIXELS = 2**20, 2**24
"""After a payload of more bytes, or an image that may have more pixels, freed memory is given back at once: a file can
make a codec allocate millions of small pieces."""


class Outcome(IntEnum):
    """How decoding ended; all but DECODED come with a sentence for the client."""

    DECODED = 0
    UNREADABLE = 1
    TOO_LARGE = 2
    TOO_COSTLY = 3


def memory_limit(max_pixels: int, payload_bytes: int) -> int:
    """Address space that decoding one image may take besides what the process has when it starts."""
    from service.model.images import BYTES_PER_PIXEL

    return BYTES_PER_PIXEL * max_pixels + PAYLOAD_COPIES * payload_bytes + SLACK_BYTES


def main(service_pid: int) -> None:
    """Serve the socket at standard input until the other end, that of process `service_pid`, is closed."""
    trim = _confine(service_pid)
    base_bytes = _address_space()
    channel = socket.socket(fileno=0)
    channel.sendall(READY)
    with channel.makefile("rb") as incoming:
        while len(head := incoming.read(REQUEST.size)) == REQUEST.size:
            side_px, max_pixels, limit_s, length = REQUEST.unpack(head)
            _limit_memory(base_bytes + memory_limit(max_pixels, length))
            signal.setitimer(signal.ITIMER_PROF, limit_s)  # SIGPROF ends the process
            outcome, content = _decoded(incoming, length, side_px, max_pixels)
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.sendall(ANSWER.pack(outcome, len(content)))
            channel.sendall(content)
            if length > TRIM_BYTES or max_pixels > TRIM_PIXELS:
                trim(0)


def _decoded(incoming: BinaryIO, length: int, side_px: int, max_pixels: int) -> tuple[Outcome, bytes]:
    from service.model.errors import ImageTooCostly, ImageTooLarge, UnreadableImage
    from service.model.resize import decode_resized

    try:
        return Outcome.DECODED, decode_resized(incoming.read(length), side_px, max_pixels).tobytes()
    except UnreadableImage as exc:
        return Outcome.UNREADABLE, str(exc).encode(errors="replace")
    except ImageTooLarge as exc:
        return Outcome.TOO_LARGE, str(exc).encode()
    except ImageTooCostly as exc:
        return Outcome.TOO_COSTLY, str(exc).encode()
    except MemoryError:
        sentence = "The image takes more memory to decode than its size allows; save it anew, or smaller."
        return Outcome.TOO_COSTLY, sentence.encode()


def _confine(service_pid: int) -> Callable[[int], object]:
    """Set the limits that do not change, and those that libraries read when they are imported.

    Returns: what gives freed memory back to the system (malloc_trim(3)), where there is such a thing.
    """
    trim: Callable[[int], object] = abs
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they come to the whole group: the service drains
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # numpy's: threads that would never have work
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != service_pid:  # it was quicker
            sys.exit()
        if hasattr(libc, "mallopt"):  # glibc: large blocks, once freed, are the system's again
            trim = libc.malloc_trim
            libc.mallopt(_M_ARENA_MAX, 1)
            libc.mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)
            libc.mallopt(_M_TRIM_THRESHOLD, 16 * 2**20)
        with contextlib.suppress(OSError):  # where /proc is not writable
            Path("/proc/self/oom_score_adj").write_text("1000", "ascii")
    import service.model.resize  # noqa: F401  # now, not with the first image

    return trim


_PR_SET_PDEATHSIG = 1  # prctl(2), linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3), malloc.h


def _address_space() -> int:
    """Bytes mapped now; 0 where the system does not tell, and RLIMIT_AS does not bind (macOS)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0


def _limit_memory(limit: int) -> None:
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


if __name__ == "__main__":
    sys.path[:] = sys.argv[2].split(os.pathsep)  # the service's own
    with contextlib.suppress(ConnectionError, KeyboardInterrupt):  # the service has just ended
        main(int(sys.argv[1]))
