"""Decide where an image is decoded, and bound what that may cost: payload -> uint8 `[S, S, 3]`.

    plain JPEG, few pixels     here: on the event loop if it is tiny, else in a thread
    anything else              in a decoder process (`service.decoder_process`), which may be killed; a plain JPEG of
                               four times the model's side too, for Pillow scales it while decoding

A plain JPEG (`service.model.jpeg.plain_size`) takes time in proportion to its bytes and pixels, whatever is in it.
Other files can be made that take minutes, gigabytes, or the process along: a decoder process has `limit_s` of processor
time for an image, 1.5 times that by the clock, and as much memory as its pixels may need. Past the time it is killed
and replaced; the client is told that the image costs too much, or, where it had but a part of its processor time, that
others were busy. The images of one request have the processor time of one together and four times that by the clock
(`Allowance`); those of all such requests leave a process to images that come alone.

Memory. For an image of at most ORDINARY_PIXELS a process may take 16 bytes a pixel (`images.BYTES_PER_PIXEL`), four
times the payload and 96 MiB (`decoder_process.memory_limit`): 452 MiB with the largest payload, 25 MiB. Larger images,
up to MAX_PIXELS, are decoded one at a time, in 1.5 GiB. So `places` processes (the worker's share of `decode_threads`,
two at least) never take more than (places - 1) * 452 MiB + 1.5 GiB, besides the 40 MiB that each takes idle. These are
limits on address space; a photo of 500 x 375 touches 2 MiB. Threads add IN_PROCESS_PIXELS * 9 bytes each, 36 MiB: three
for the decoded pixel, six for two copies of it on its way to be resized.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from service import decoder_process
from service.allowance import NO_PLACE, Allowance
from service.deaths import signal_name
from service.decoder_process import ANSWER, READY, REQUEST, Outcome
from service.errors import Overloaded
from service.model.errors import ImageError, ImageTooCostly, ImageTooLarge, UnreadableImage
from service.model.images import MAX_PIXELS, RgbImage, decode_plain_jpeg, is_scaled
from service.model.jpeg import Size, plain_size
from service.model.machine import give_way
from service.model.resize import crop_resize, enough_px

log = logging.getLogger(__name__)

TINY_SIDE_PX = 128
"""Plain JPEGs of at most this side squared, for a model of at most this side, are decoded on the event loop: CIFAR's
take 0.02 ms, less than handing them to a thread."""

IN_PROCESS_PIXELS, IN_PROCESS_BYTES = 4 * 2**20, 2**20
"""Plain JPEGs up to here are decoded in the service's own process, in at most 0.1 s (one core, EPYC). TurboJPEG keeps
pieces of a colour profile, 25 bytes for each that a hostile file has of them: a limit on bytes too."""

ORDINARY_PIXELS = 2**24
"""Larger images are decoded one at a time; phones make 12 to 16 million pixels unless asked for more."""

RECYCLE_AFTER = 10_000
"""Images after which a process is replaced by a new one, so that no leak or fragmentation of a decoder adds up."""

START_LIMIT_S, SLOW_START_S = 30.0, 1.0
"""How long a process may take to start, which takes 0.3 s where it need not wait for a core; and how long before
another is started beside it."""

FIRST_START_S = 5.0
"""How long the first may take before images no longer wait for it. Once it is over, they have their patience."""

ENDS_BY_ITSELF_S = 1.0
"""So long a process that closed its socket has to end, before it is killed: its exit status tells why."""

MAX_SENTENCE_BYTES = 4096

SEND_BUFFER_BYTES = 4 * 2**20
"""Asked for; what Linux gives by default, 416 KiB, takes most payloads at once, without a turn of the event loop."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

NO_PROCESS = "No process can be started to decode the image; try again in a moment."

REFUSALS: dict[Outcome, type[ImageError]] = {
    Outcome.UNREADABLE: UnreadableImage,
    Outcome.TOO_LARGE: ImageTooLarge,
    Outcome.TOO_COSTLY: ImageTooCostly,
}


class Decoders:
    """Threads for what is cheap for certain, processes for the rest; used by one event loop.

    Processes are started as they are needed, the first by `open`; they end with `close`, or with this process, however
    that ends.
    """

    def __init__(self, places: int, limit_s: float) -> None:
        """At most `places` threads and as many processes, of these two at least, so that one is left to images that
        come alone; `limit_s`: processor time for one image in a process.
        """
        self._limit_s = limit_s
        self._threads = ThreadPoolExecutor(places, thread_name_prefix="decode", initializer=give_way)
        self._places = asyncio.Semaphore(max(2, places))
        self._of_several = asyncio.Semaphore(max(2, places) - 1)
        self._large = asyncio.Semaphore(1)
        self._idle: list[_Process] = []
        self._jobs: set[asyncio.Task[RgbImage]] = set()
        self._first: _Process | None = None  # while it may be starting
        self._opened = False
        self._closed = False

    def open(self) -> None:
        """Begin to start the first process, for which only images wait. Starting takes a core for 0.25 s.

        The first image that needs one does so too.
        """
        if not self._opened:
            self._opened = True
            self._replace()
            self._first = next(iter(self._idle), None)

    async def close(self) -> None:
        """End the processes; images under way get CancelledError, later ones Overloaded."""
        self._closed = True
        idle, self._idle = self._idle, []
        self._threads.shutdown(wait=False, cancel_futures=True)
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await asyncio.gather(*[process.end() for process in idle])

    def allowance(self, several: bool) -> Allowance:
        """What one image, or the `several` of a request, may take of decoder processes."""
        return Allowance(self._limit_s, several)

    async def decode(
        self, payload: bytes, side_px: int, patience_s: float | None = None, allowance: Allowance | None = None
    ) -> RgbImage:
        """Decode, crop and resize as `service.model.resize.decode_resized` does.

        Cancelled while it waits for a process, it costs no more; later, its process still finishes. `allowance` is that
        of all images of its request.
        Returns: uint8 `[side_px, side_px, 3]`.
        Raises: ImageError; Overloaded when no process is free within `patience_s` altogether, from when the first has
        started, or can be started.
        """
        if self._closed:
            raise Overloaded(NO_PROCESS)
        size = plain_size(payload) if len(payload) <= IN_PROCESS_BYTES else None
        few = size is not None and size.height * size.width <= IN_PROCESS_PIXELS
        if size is not None and few and not is_scaled(size, enough_px(side_px)):
            decode = partial(_decode_plain, payload, size, side_px)
            tiny = size.height * size.width <= TINY_SIDE_PX**2 and side_px <= TINY_SIDE_PX
            image = decode() if tiny else await asyncio.get_running_loop().run_in_executor(self._threads, decode)
            if image is not None:
                return image
        await self._first_start()
        until_s = None if patience_s is None else asyncio.get_running_loop().time() + patience_s
        allowance = allowance or self.allowance(several=False)
        try:
            return await self._in_process(payload, side_px, ORDINARY_PIXELS, until_s, allowance)
        except ImageTooLarge:
            return await self._in_process(payload, side_px, MAX_PIXELS, until_s, allowance)

    async def _first_start(self) -> None:
        """Wait a while for the first process, as nobody is busy with others while there is none."""
        self.open()
        while self._first is not None:
            if self._first.poll() is None and 0 < self._first.starting_s() < FIRST_START_S:
                await asyncio.sleep(0.01)
            else:
                self._first = None

    async def _in_process(
        self, payload: bytes, side_px: int, max_pixels: int, until_s: float | None, allowance: Allowance
    ) -> RgbImage:
        large = max_pixels > ORDINARY_PIXELS
        places = [self._of_several] * allowance.several + [self._large] * large + [self._places]
        held: list[asyncio.Semaphore] = []

        def release(job: asyncio.Task[RgbImage] | None = None) -> None:
            for place in held:
                place.release()
            if job is not None:
                self._jobs.discard(job)
                _ = job.cancelled() or job.exception()  # seen, also where nobody waits for it any more

        allowance.require_some()
        try:
            async with asyncio.timeout_at(until_s):
                for place in places:
                    await place.acquire()
                    held.append(place)
            allowance.require_some()
        except TimeoutError as exc:
            release()
            raise Overloaded(NO_PLACE) from exc
        except BaseException:
            release()
            raise
        job = asyncio.get_running_loop().create_task(self._ask(payload, side_px, max_pixels, until_s, allowance))
        self._jobs.add(job)
        job.add_done_callback(release)
        return await asyncio.shield(job)

    async def _ask(
        self, payload: bytes, side_px: int, max_pixels: int, until_s: float | None, allowance: Allowance,
        again: bool = False,
    ) -> RgbImage:  # fmt: skip
        """Have an idle process, or a new one, decode the image; a process that is lost over it is replaced.

        One that was killed from outside may have been so before it saw the image, which is tried once more then.
        """
        process = await self._taken(until_s)
        if allowance.is_spent():
            self._idle.append(process)
            raise allowance.exhausted()
        try:
            request = REQUEST.pack(side_px, max_pixels, allowance.processor_s, len(payload))
            with allowance.spent(process.processor_s):
                async with asyncio.timeout(allowance.clock_s):
                    outcome, content = await process.ask(request, payload, side_px)
        except (OSError, EOFError, ValueError) as exc:  # TimeoutError is an OSError
            slow, odd = isinstance(exc, TimeoutError), isinstance(exc, ValueError)
            error = await self._lost(process, len(payload), slow, odd, allowance)
            if slow or odd or again or process.poll() != -signal.SIGKILL:
                raise error from None
            allowance.require_some()
            return await self._ask(payload, side_px, max_pixels, until_s, allowance, again=True)
        except BaseException:  # we are closing, or at fault
            await process.end()
            raise
        if process.answered < RECYCLE_AFTER:
            self._idle.append(process)
        else:
            await process.end()
            self._replace()
        if outcome is Outcome.DECODED:
            return np.frombuffer(content, np.uint8).reshape(side_px, side_px, 3)
        raise REFUSALS[outcome](content.decode(errors="replace"))

    async def _taken(self, until_s: float | None) -> "_Process":
        """A process that can decode. Raises: Overloaded where there is none by the loop's time `until_s`."""
        if self._closed:
            raise Overloaded(NO_PROCESS)
        process = await self._idle_one() or self._start()
        try:
            async with asyncio.timeout_at(until_s) as patience:
                await process.ready()
        except (OSError, EOFError) as exc:
            if patience.expired():
                self._idle.insert(0, process)  # for who comes later
                raise Overloaded(NO_PLACE) from exc
            log.error("decoder process %d did not start (%s)", process.pid, _how(await process.end()))
            raise Overloaded(NO_PROCESS) from exc
        except BaseException:
            await process.end()
            raise
        return process

    async def _idle_one(self) -> "_Process | None":
        """An idle process that is ready, else one that may soon be; None where another is to be started."""
        for process in self._idle.copy():
            if process.poll() is not None:
                said = f"had ended while it was idle ({_how(process.poll() or 0)})"
            elif process.starting_s() > START_LIMIT_S:
                said = f"did not start within {START_LIMIT_S:g} s and is killed"
            else:
                continue
            self._idle.remove(process)
            log.warning("decoder process %d %s", process.pid, said)
            await process.end()
        if not self._idle:
            return None
        best = min(reversed(self._idle), key=_Process.starting_s)
        if best.starting_s() > SLOW_START_S and len(self._idle) == 1:
            return None  # it may never be
        self._idle.remove(best)
        return best

    async def _lost(
        self, process: "_Process", payload_bytes: int, slow: bool, odd: bool, allowance: Allowance
    ) -> ImageError | Overloaded:
        """Tell what became of the process, and what the client is to know. `odd`: its answer was none."""
        status = await process.end(0.0 if slow or odd else ENDS_BY_ITSELF_S)
        self._replace()
        if slow or status == -signal.SIGPROF:
            log.warning("decoder process %d: an image of %d bytes took too long", process.pid, payload_bytes)
            return allowance.exhausted()
        if odd:
            log.error(
                "decoder process %d said what is no answer, over an image of %d bytes", process.pid, payload_bytes
            )
            return UnreadableImage("The image makes its decoder fail; save it anew, as JPEG or PNG.")
        log.warning("decoder process %d ended over an image of %d bytes (%s)", process.pid, payload_bytes, _how(status))
        if status == -signal.SIGKILL:  # not by us: by the kernel, when memory ran out
            return ImageTooCostly("The image takes more memory to decode than there is; save it anew, or smaller.")
        return UnreadableImage(f"The image makes its decoder fail ({_how(status)}); save it anew, as JPEG or PNG.")

    def _start(self) -> "_Process":
        if self._closed:
            raise Overloaded(NO_PROCESS)
        try:
            return _Process()
        except OSError as exc:
            log.error("No decoder process can be started: %s.", exc)
            raise Overloaded(NO_PROCESS) from exc

    def _replace(self) -> None:
        """Start a process in place of one that ended: the last to be taken, for it is not ready yet."""
        with contextlib.suppress(Overloaded):  # told in the log; tried again when there is an image
            self._idle.insert(0, self._start())


class _Process:
    """A decoder process and our end of its socket. Its methods raise OSError or EOFError when it is gone."""

    def __init__(self) -> None:
        """Raises: OSError when the system has no process, memory or descriptor left."""
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100  # "" is the folder we are in
        program = [sys.executable, "-IS", "-W", "ignore", decoder_process.__file__, str(os.getpid()), path]
        try:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603  # our own
                program, stdin=theirs.fileno(), stdout=subprocess.DEVNULL
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._socket = ours
        self._ready = False
        self._born_s = time.monotonic()
        self.answered = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def processor_s(self) -> float | None:
        """Processor time it has taken, in steps of 0.01 s (proc(5), stat); None where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()
            return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        except (OSError, IndexError, ValueError):
            return None

    def starting_s(self) -> float:
        """How long it has been starting; 0 once it can decode."""
        if not self._ready:
            with contextlib.suppress(OSError):
                self._ready = self._socket.recv(len(READY)) == READY
        return 0.0 if self._ready else time.monotonic() - self._born_s

    async def ready(self) -> None:
        """Wait until it can decode. Raises: TimeoutError too."""
        if self.starting_s() > 0:
            async with asyncio.timeout(max(0.0, START_LIMIT_S - self.starting_s())):
                await self._receive(len(READY))
            self._ready = True

    async def ask(self, request: bytes, payload: bytes, side_px: int) -> tuple[Outcome, bytes]:
        """One image. Raises: ValueError when the answer is none: code of the image's may run in there."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, request)
        await loop.sock_sendall(self._socket, payload)
        number, length = ANSWER.unpack(await self._receive(ANSWER.size))
        outcome = Outcome(number)
        if length != side_px**2 * 3 if outcome is Outcome.DECODED else length > MAX_SENTENCE_BYTES:
            raise ValueError("not an answer")
        self.answered += 1
        return outcome, bytes(await self._receive(length))

    async def end(self, grace_s: float = 0.0) -> int:
        """Kill it if it lives on for `grace_s`, and take its exit status."""
        self._socket.close()
        if grace_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, grace_s)
        self._process.kill()
        return await asyncio.to_thread(self._process.wait)

    async def _receive(self, size: int) -> bytearray:
        loop, content, at = asyncio.get_running_loop(), bytearray(size), 0
        while at < size:
            received = await loop.sock_recv_into(self._socket, memoryview(content)[at:])
            if not received:
                raise EOFError
            at += received
        return content


def _decode_plain(payload: bytes, size: Size, side_px: int) -> RgbImage | None:
    """The image, or None where it is not so plain after all, but damaged or to be scaled."""
    image = decode_plain_jpeg(payload, size, enough_px(side_px), IN_PROCESS_PIXELS)
    return None if image is None else crop_resize(image, side_px)


def _how(status: int) -> str:
    return signal_name(-status) if status < 0 else f"exit status {status}"
