"""Decoders: the pixels of `decode_resized`, wherever they are decoded, and bounds that hold whatever a process does."""

import asyncio
import io
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service import allowance, decoder_process, decoding
from service.decoding import Decoders
from service.errors import Overloaded
from service.model.errors import ImageTooCostly, ImageTooLarge, UnreadableImage
from service.model.images import MAX_PIXELS
from service.model.resize import decode_resized
from tests.hostile.bombs import behind_jfif, jpeg_of_size, segment

ROOT = Path(__file__).parent.parent.parent
SLOW_PX = 5000


def picture(width: int = 90, height: int = 60, mode: str = "RGB") -> Image.Image:
    return Image.merge(
        "RGB", [Image.linear_gradient("L").rotate(90 * k).resize((width, height)) for k in range(3)]
    ).convert(mode)


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


@cache
def slow() -> bytes:
    """25 million pixels: takes a second, and several times the time limit that the tests below set."""
    return encoded(Image.new("RGBA", (SLOW_PX, SLOW_PX), (9, 8, 7, 100)), "PNG", compress_level=1)


@cache
def slow_ordinary() -> bytes:
    """16 million pixels, which are decoded beside others: takes two thirds of that."""
    return encoded(Image.new("RGBA", (4000, 4000), (9, 8, 7, 100)), "PNG", compress_level=1)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@asynccontextmanager
async def opened(places: int = 1, limit_s: float = 60.0) -> AsyncIterator[Decoders]:
    decoders = Decoders(places, limit_s)
    decoders.open()
    try:
        yield decoders
    finally:
        await decoders.close()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


def pids() -> set[int]:
    """The decoder processes of this one that live."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
            if int(stat.rsplit(")", 1)[1].split()[1]) != os.getpid():
                continue
            command = (entry / "cmdline").read_bytes()
            while not command and _state(entry) != "Z":  # vfork is over before the kernel has written the new one
                command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if decoder_process.__file__.encode() in command:
            found.add(int(entry.name))
    return found


def _state(entry: Path) -> str:
    return (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the condition did not come true in 30 s")


FILES = {
    "jpeg": encoded(picture(), "JPEG"),
    "photo": encoded(picture(500, 375), "JPEG"),
    "progressive jpeg": encoded(picture(), "JPEG", progressive=True),
    "turned jpeg": encoded(picture(), "JPEG", exif=turned()),
    "cmyk jpeg": encoded(picture(mode="CMYK"), "JPEG"),
    "large jpeg": encoded(picture(2400, 1800), "JPEG"),
    "damaged plain jpeg": encoded(picture(), "JPEG")[:-40] + bytes(38) + b"\xff\xd9",
    "png": encoded(picture(), "PNG"),
    "rgba png": encoded(picture(1500, 1200, "RGBA").rotate(30), "PNG", compress_level=1),
    "webp": encoded(picture(), "WEBP"),
    "gif": encoded(picture(), "GIF"),
    "bmp": encoded(picture(), "BMP"),
}


@pytest.mark.parametrize("side_px", [32, 224])
def test_the_pixels_are_those_of_the_training(side_px: int) -> None:
    async def main() -> None:
        async with opened() as decoders:
            for name, file in FILES.items():
                try:
                    expected = decode_resized(file, side_px)
                except UnreadableImage as exc:
                    with pytest.raises(UnreadableImage, match=exc.args[0][:20]):
                        await decoders.decode(file, side_px)
                else:
                    np.testing.assert_array_equal(await decoders.decode(file, side_px), expected, name)

    run(main)


def test_plain_jpegs_need_no_process_and_everything_else_does() -> None:
    async def main() -> None:
        decoders = Decoders(1, 60)
        for name in ("jpeg", "photo"):
            assert (await decoders.decode(FILES[name], 224)).shape == (224, 224, 3)
        assert not pids()
        for name in FILES.keys() - {"jpeg", "photo", "damaged plain jpeg"}:
            answered = decoders._idle[0].answered if decoders._idle else 0
            await decoders.decode(FILES[name], 224)
            assert decoders._idle[0].answered == answered + 1, name
        await decoders.close()

    run(main)


def test_errors_come_with_their_sentences() -> None:
    async def main() -> None:
        async with opened() as decoders:
            with pytest.raises(UnreadableImage, match=r"The 5 bytes given \(starting .*\) are not a JPEG, PNG"):
                await decoders.decode(b"hello", 32)
            with pytest.raises(UnreadableImage, match="empty"):
                await decoders.decode(b"", 32)
            with pytest.raises(UnreadableImage, match="damaged or incomplete"):
                await decoders.decode(FILES["png"][:200], 32)
            huge = bytearray(FILES["bmp"])
            huge[18:26] = (20_000).to_bytes(4, "little") * 2
            with pytest.raises(ImageTooLarge, match=r"20000 x 20000|more than that"):
                await decoders.decode(bytes(huge), 32)

    run(main)


def test_an_image_above_the_ordinary_size_is_decoded_too() -> None:
    async def main() -> None:
        async with opened(2) as decoders:
            file = encoded(Image.new("L", (4200, 4200), 77), "PNG", compress_level=1)
            assert decoding.ORDINARY_PIXELS < 4200**2
            images = await asyncio.gather(*[decoders.decode(file, 32) for _ in range(3)])
            assert all((image == 77).all() for image in images)

    run(main)


def test_an_image_that_takes_too_long_is_refused_and_the_next_one_is_decoded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowance, "SLOWER_BY_THE_CLOCK", 1000)  # processor time alone counts

    async def main() -> None:
        async with opened(limit_s=0.1) as decoders:
            await decoders.decode(FILES["png"], 32)
            (before,) = pids()
            with pytest.raises(ImageTooCostly, match=r"more than 0\.1 s to decode; save it anew"):
                await decoders.decode(slow(), 32)
            assert before not in pids()
            assert (await decoders.decode(FILES["png"], 32)).shape == (32, 32, 3)

    run(main)
    assert [record.message.split(": ")[1][:11] for record in caplog.records if "too long" in record.message] == [
        "an image of"
    ]


def test_a_process_that_stands_still_is_killed_by_the_clock() -> None:
    async def main() -> None:
        async with opened(limit_s=1) as decoders:
            await decoders.decode(FILES["png"], 32)
            (pid,) = pids()
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(Overloaded, match="busy with others"):  # it took no processor time
                await decoders.decode(FILES["png"], 32)
            await decoders.decode(FILES["png"], 32)
            assert pid not in pids()

    run(main)


def test_an_image_that_takes_too_much_memory_is_refused() -> None:
    async def main() -> None:
        async with opened() as decoders:
            await decoders.decode(FILES["png"], 32)
            (pid,) = pids()
            mapped = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            limit = mapped + 20 * 2**20
            resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))  # as if a codec took far more than it should
            with pytest.raises(ImageTooCostly, match="more memory"):
                await decoders.decode(encoded(Image.new("RGB", (4000, 4000)), "PNG", compress_level=1), 32)
            await decoders.decode(FILES["png"], 32)
            assert pids() == {pid}

    run(main)


def test_a_process_may_take_what_the_pixels_need_and_no_more() -> None:
    """The limits that the kernel holds the process to, for sizes that are decoded together and the one that is not."""
    large = encoded(Image.new("L", (4200, 4200), 77), "PNG", compress_level=1)
    assert decoding.ORDINARY_PIXELS < 4200**2

    async def main() -> None:
        async with opened() as decoders:
            (process,) = decoders._idle
            await process.ready()
            mapped = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
            for file, pixels in ((FILES["png"], decoding.ORDINARY_PIXELS), (large, MAX_PIXELS)):
                await decoders.decode(file, 32)
                limit = resource.prlimit(process.pid, resource.RLIMIT_AS)[0]
                expected = mapped + decoder_process.memory_limit(pixels, len(file))
                assert abs(limit - expected) < 2**20  # it looked a moment before us

    run(main)
    ordinary, largest = (
        decoder_process.memory_limit(pixels, 25 * 2**20) for pixels in (decoding.ORDINARY_PIXELS, MAX_PIXELS)
    )
    assert (ordinary / 2**20, round(largest / 2**30, 1)) == (452, 1.5)  # as README and `service.decoding` say


def test_of_large_images_one_is_decoded_at_a_time_whosever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    file = encoded(Image.new("L", (4200, 4200), 77), "PNG", compress_level=1)
    ask, looked_at, together, most = decoding._Process.ask, 0, 0, 0

    async def noted(process: decoding._Process, request: bytes, *what: Any) -> Any:
        nonlocal looked_at, together, most
        if decoder_process.REQUEST.unpack(request)[1] == decoding.ORDINARY_PIXELS:
            looked_at += 1
            return await ask(process, request, *what)
        together += 1
        most = max(most, together)
        try:
            await until(lambda: looked_at == 4)  # every process is there by then, and the others could be decoded too
            await asyncio.sleep(0.1)
            return await ask(process, request, *what)
        finally:
            together -= 1

    async def main() -> None:
        async with opened(places=4) as decoders:
            monkeypatch.setattr(decoding._Process, "ask", noted)
            several = decoders.allowance(several=True)
            images = await asyncio.gather(
                *[decoders.decode(file, 32) for _ in range(2)],
                *[decoders.decode(file, 32, None, several) for _ in range(2)],
            )
            assert all((image == 77).all() for image in images)

    run(main)
    assert most == 1


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGSEGV, UnreadableImage), (signal.SIGABRT, UnreadableImage), (signal.SIGKILL, ImageTooCostly)],
)
def test_a_decoder_that_dies_over_an_image_costs_that_image_alone(
    number: signal.Signals, error: type[Exception], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = 2 if number == signal.SIGKILL else 1  # it may have been killed before it saw the image: tried once more
    asked: list[int] = []
    ask = decoding._Process.ask

    async def noted(process: decoding._Process, *what: Any) -> Any:
        if process.pid not in asked:  # asked twice: to begin with it is told to decode ordinary sizes alone
            asked.append(process.pid)
        return await ask(process, *what)

    async def main() -> None:
        async with opened() as decoders:
            await decoders.decode(FILES["png"], 32)
            monkeypatch.setattr(decoding._Process, "ask", noted)
            under_way = asyncio.create_task(decoders.decode(slow(), 32))
            for kill in range(kills):
                await until(lambda kill=kill: len(asked) > kill)
                await asyncio.sleep(0.3)
                os.kill(asked[kill], number)
            with pytest.raises(error, match="The image"):
                await under_way
            assert (await decoders.decode(FILES["png"], 32)).shape == (32, 32, 3)

    run(main)
    lines = [record.message for record in caplog.records]
    assert len(lines) == kills
    assert all(number.name in line for line in lines)
    assert "Traceback" not in caplog.text


def test_a_decoder_that_died_while_idle_costs_nobody_anything() -> None:
    async def main() -> None:
        async with opened() as decoders:
            await decoders.decode(FILES["png"], 32)
            (pid,) = pids()
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not pids() or Path(f"/proc/{pid}/cmdline").read_bytes() == b"")
            assert (await decoders.decode(FILES["png"], 32)).shape == (32, 32, 3)

    run(main)


def test_an_image_that_waits_too_long_for_a_process_is_refused() -> None:
    async def main() -> None:
        async with opened() as decoders:
            await decoders.decode(FILES["png"], 32)
            file = slow_ordinary()
            busy = [asyncio.create_task(decoders.decode(file, 32)) for _ in range(2)]  # however few places, two
            await until(lambda: len(decoders._jobs) == 2)
            with pytest.raises(Overloaded, match="busy with others"):
                await decoders.decode(FILES["png"], 32, patience_s=0.05)
            assert [image.shape for image in await asyncio.gather(*busy)] == [(32, 32, 3)] * 2
            assert (await decoders.decode(FILES["png"], 32, patience_s=60)).shape == (32, 32, 3)

    run(main)


def test_images_of_one_request_leave_a_process_to_those_that_come_alone() -> None:
    async def main() -> None:
        async with opened() as decoders:
            allowance = decoders.allowance(several=True)
            busy = [asyncio.create_task(decoders.decode(slow(), 32, None, allowance)) for _ in range(3)]
            await until(lambda: decoders._jobs)
            assert (await decoders.decode(FILES["png"], 32, patience_s=60)).shape == (32, 32, 3)
            assert not any(task.done() for task in busy)
            assert [image.shape for image in await asyncio.gather(*busy)] == [(32, 32, 3)] * 3

    run(main)


def test_images_of_one_request_have_the_time_of_one_image_together() -> None:
    async def main() -> None:
        async with opened(limit_s=0.8) as decoders:
            allowance = decoders.allowance(several=True)
            together = "The images of this request take more than 0.8 s to decode; send fewer"
            assert (await decoders.decode(FILES["png"], 32, None, allowance)).shape == (32, 32, 3)
            outcomes = await asyncio.gather(
                *[decoders.decode(slow(), 32, None, allowance) for _ in range(6)], return_exceptions=True
            )
            assert all(isinstance(outcome, ImageTooCostly) for outcome in outcomes[3:])  # on a fast machine
            assert str(outcomes[-1]).startswith(together)
            with pytest.raises(ImageTooCostly, match=together):
                await decoders.decode(FILES["png"], 32, None, allowance)
            assert (await decoders.decode(FILES["jpeg"], 32, None, allowance)).shape == (32, 32, 3)  # needs no process
            assert len(pids()) <= 2
            assert (await decoders.decode(FILES["png"], 32)).shape == (32, 32, 3)

    run(main)


def test_an_image_that_is_looked_at_twice_has_its_time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    ask = decoding._Process.ask
    # Too large for the first look, and its header alone takes a third of a second.
    bomb = behind_jfif(jpeg_of_size(SLOW_PX, SLOW_PX), b"\0" + segment(0xE1, b"") * 200_000)

    async def noted(process: decoding._Process, request: bytes, *what: Any) -> Any:
        limits.append(decoder_process.REQUEST.unpack(request)[2])
        return await ask(process, request, *what)

    async def main() -> None:
        async with opened(limit_s=30) as decoders:
            monkeypatch.setattr(decoding._Process, "ask", noted)
            await decoders.decode(bomb, 32)

    run(main)
    assert limits[0] == 30
    assert limits[1] < 29.9


def test_a_process_that_hangs_as_it_starts_holds_up_images_for_a_moment_at_most(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "SLOW_START_S", 0.2)

    async def main() -> None:
        async with opened() as decoders:
            (hangs,) = pids()
            os.kill(hangs, signal.SIGSTOP)
            await asyncio.sleep(0.3)
            for _ in range(2):
                assert (await decoders.decode(FILES["png"], 32, patience_s=60)).shape == (32, 32, 3)
            assert len(pids()) == 2
            monkeypatch.setattr(decoding, "START_LIMIT_S", 0.3)
            assert (await decoders.decode(FILES["png"], 32, patience_s=60)).shape == (32, 32, 3)
            assert hangs not in pids()
            assert f"decoder process {hangs} did not start within 0.3 s and is killed" in caplog.text

    run(main)


def test_images_wait_for_the_first_process_to_start_before_their_patience_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "FIRST_START_S", 60)

    async def main() -> None:
        async with opened() as decoders:
            (first,) = pids()
            os.kill(first, signal.SIGSTOP)
            waiting = [asyncio.create_task(decoders.decode(FILES["png"], 32, patience_s=30)) for _ in range(4)]
            await asyncio.sleep(0.5)
            assert pids() == {first}
            os.kill(first, signal.SIGCONT)
            assert [image.shape for image in await asyncio.gather(*waiting)] == [(32, 32, 3)] * 4

    run(main)


def test_a_first_process_that_hangs_holds_up_images_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FIRST_START_S", 0.5)

    async def main() -> None:
        async with opened() as decoders:
            (first,) = pids()
            os.kill(first, signal.SIGSTOP)
            with pytest.raises(Overloaded, match="busy with others"):
                await decoders.decode(FILES["png"], 32, patience_s=0.05)
            os.kill(first, signal.SIGKILL)
            await until(lambda: first not in pids())
            assert (await decoders.decode(FILES["png"], 32, patience_s=60)).shape == (32, 32, 3)

    run(main)


def test_where_no_process_can_be_started_the_client_is_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        decoders = Decoders(1, 60)
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(Overloaded, match="try again"):
            await decoders.decode(FILES["png"], 32)
        monkeypatch.setattr(sys, "executable", "/bin/false")  # starts, and says nothing
        with pytest.raises(Overloaded, match="try again"):
            await decoders.decode(FILES["png"], 32)
        monkeypatch.undo()
        assert (await decoders.decode(FILES["png"], 32)).shape == (32, 32, 3)
        await decoders.close()

    run(main)


def test_who_stops_waiting_frees_the_queue_and_there_are_never_more_processes_than_places() -> None:
    async def main() -> None:
        async with opened(2) as decoders:
            file = slow()
            waiting = [asyncio.create_task(decoders.decode(file, 32)) for _ in range(6)]
            await until(lambda: len(decoders._jobs) == 2)
            for task in waiting:
                task.cancel()
            assert all(
                isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*waiting, return_exceptions=True)
            )
            assert len(pids()) <= 2
            await until(lambda: not decoders._jobs)
            assert (await decoders.decode(FILES["png"], 32)).shape == (32, 32, 3)
            assert len(pids()) <= 2

    run(main)


def test_many_at_once_each_get_their_own_pixels() -> None:
    async def main() -> None:
        async with opened(2) as decoders:
            greys = [k * 5 for k in range(50)]
            files = [encoded(Image.new("L", (40, 30), grey), "PNG") for grey in greys]
            images = await asyncio.gather(*[decoders.decode(file, 32) for file in files])
            assert [int(image[0, 0, 0]) for image in images] == greys
            assert [image.min() == image.max() for image in images] == [True] * 50

    run(main)


def test_processes_are_recycled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "RECYCLE_AFTER", 3)

    async def main() -> None:
        async with opened() as decoders:
            await decoders.decode(FILES["png"], 32)
            first = pids()
            for _ in range(4):
                await decoders.decode(FILES["png"], 32)
            assert len(pids()) == 1
            assert pids() != first

    run(main)


def test_an_image_that_comes_before_the_first_process_starts_it() -> None:
    """As between a worker's readiness and that of the others, before which none is started."""

    async def main() -> None:
        decoders = Decoders(2, 60.0)
        await decoders.decode(FILES["png"], 32, patience_s=0.05)  # but for the start, which is waited for
        before = pids()
        decoders.open()
        assert pids() == before and len(before) == 1
        await decoders.close()

    run(main)


def test_memory_comes_back_after_a_large_image() -> None:
    async def main() -> None:
        async with opened() as decoders:
            await decoders.decode(FILES["png"], 32)
            (pid,) = pids()

            def resident_mib() -> int:
                return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() // 2**20

            before = resident_mib()
            await decoders.decode(slow(), 32)
            await until(lambda: resident_mib() < before + 30)

    run(main)


def test_closing_ends_every_process_also_one_that_works() -> None:
    async def main() -> None:
        async with opened(2) as decoders:
            under_way = asyncio.create_task(decoders.decode(slow(), 32))
            await until(lambda: decoders._jobs and pids())
        with pytest.raises((asyncio.CancelledError, Overloaded)):  # the latter between its first look and its second
            await under_way
        with pytest.raises(Overloaded):
            await decoders.decode(slow(), 32)
        assert not pids()

    run(main)


ORPHAN = """
import asyncio, os, sys
from service.decoding import Decoders

async def main():
    decoders = Decoders(1, 60)
    await decoders.decode(open(sys.argv[1], "rb").read(), 32)
    print(decoders._idle[0].pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_service(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(FILES["png"])
    command = [sys.executable, "-c", ORPHAN, str(tmp_path / "file")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        pid = int(service.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        service.send_signal(number)
    deadline_s = time.monotonic() + 30
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_decoder_process_imports_what_it_needs_and_nothing_else() -> None:
    code = "import sys; from service.model import resize; from service import decoder_process; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(result.stdout.split())
    assert {"numpy", "PIL", "simplejpeg"} <= names
    assert not names & {"openvino", "torch", "fastapi", "starlette", "pydantic", "asyncio", "uvicorn"}
    ours = {name for name in names if name.startswith("service.")}
    assert ours == {"service.decoder_process", "service.model"} | {
        f"service.model.{name}" for name in ("errors", "images", "interrupts", "jpeg", "resize")
    }


def test_warnings_of_a_hostile_file_reach_no_log(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with opened() as decoders:
            exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"\xff" * 24
            await decoders.decode(encoded(picture(), "JPEG", exif=exif), 32)

    logging.getLogger("service").setLevel(logging.INFO)
    run(main)
    assert capfd.readouterr().err == ""
