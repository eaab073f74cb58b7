"""The client: the same for an address and an endpoint, tried again where the service says later."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Server, answered_by
from tests.launch.telling import told
from training import progress
from training.errors import ConfigError
from training.launch import batch, results, smoke
from training.launch.__main__ import main
from training.launch.client import (
    Outcome,
    Reply,
    UrlTarget,
    classify,
    classify_one,
    images_in,
    retry_after_s,
    understood,
)
from training.launch.errors import LaunchError

ROOT = Path(__file__).parents[2]
GOOD = {"model": {"name": "m", "version": "1"}, "predictions": [{"label": "a", "index": 0, "probability": 0.9}]}


@contextmanager
def answering(*answers: tuple[int, dict[str, str], object]) -> Iterator[tuple[str, list[float]]]:
    """A server that gives these answers one after the other, the last again and again; its address and the times."""
    times: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, body = answers[min(len(times), len(answers) - 1)]
            times.append(time.monotonic())
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    with answered_by(Handler) as url:
        yield url, times


def problem(code: str, **more: object) -> dict[str, object]:
    return {"error": {"code": code, "message": "a sentence", "request_id": "r", **more}}


def one(url: str, path: Path, **more: int) -> Outcome:
    with closing(UrlTarget(url)) as target:
        return classify_one(target, path, **more)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "one.png"
    path.write_bytes(b"any bytes")
    return path


def test_later_is_tried_again_after_what_retry_after_says(picture: Path) -> None:
    with answering((503, {"Retry-After": "1"}, problem("overloaded")), (200, {}, GOOD)) as (url, times):
        outcome = one(url, picture)
    assert outcome.problem is None and outcome.tries == 2
    assert times[1] - times[0] >= 1


class Waits(threading.Event):
    """Never set; the waits that it was asked for, none of which is waited."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_s: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.asked_s.append(timeout)
        return False


def test_what_the_body_asks_to_wait_is_waited(picture: Path) -> None:
    """Where a platform drops the header."""
    stop = Waits()
    busy = (503, {}, problem("overloaded", retry_after_s=7.5))
    with answering(busy, (200, {}, GOOD)) as (url, times), closing(UrlTarget(url)) as target:
        outcome = classify_one(target, picture, stop=stop)
    assert (outcome.problem, outcome.tries, len(times)) == (None, 2, 2)
    assert stop.asked_s == [7.5]


def test_as_many_requests_are_under_way_as_are_allowed(tmp_path: Path) -> None:
    under_way, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3)

    class Counting:
        name = "counting"

        def ask(self, body: bytes, *_: Any, **__: Any) -> Reply:
            nonlocal under_way, most
            with lock:
                under_way += 1
                most = max(most, under_way)
            together.wait(10)  # each waits for two others: with fewer at once this is an error
            with lock:
                under_way -= 1
            return Reply(200, {}, json.dumps(GOOD).encode())

        def close(self) -> None: ...

    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for path in paths:
        path.write_bytes(b"image")
    outcomes = list(classify(Counting(), paths, concurrency=3))
    assert [outcome.path for outcome in outcomes if outcome.problem is None] == paths
    assert most == 3


def test_a_platform_that_drops_headers_leaves_the_body() -> None:
    assert retry_after_s(Reply(503, {}, json.dumps(problem("overloaded", retry_after_s=2)).encode())) == 2
    assert retry_after_s(Reply(503, {"retry-after": "3"}, b"")) == 3
    assert retry_after_s(Reply(503, {}, b"no json")) is None


def test_what_is_the_callers_fault_is_not_tried_again(picture: Path) -> None:
    with answering((400, {}, problem("unreadable_image"))) as (url, times):
        outcome = one(url, picture)
    assert outcome.problem == "unreadable_image: a sentence"
    assert len(times) == 1


def test_giving_up_says_how_often_it_was_tried(picture: Path) -> None:
    with answering((503, {"Retry-After": "0"}, problem("overloaded"))) as (url, times):
        outcome = one(url, picture, tries=2)
    assert outcome.problem == "overloaded: a sentence (tried 2 times)"
    assert len(times) == 2


def test_where_nobody_listens_it_ends_at_once_and_is_not_tried_for_each_image(picture: Path) -> None:
    with pytest.raises(LaunchError, match=r"http://127\.0\.0\.1:9: nobody listens there; start the service"):
        one("http://127.0.0.1:9", picture)


def test_a_service_that_goes_away_is_that_images_problem(picture: Path) -> None:
    with answering((200, {}, GOOD)) as (url, _), closing(UrlTarget(url)) as target:
        assert classify_one(target, picture).problem is None
    outcome = classify_one(target, picture, tries=1)
    assert outcome.problem and "did not answer" in outcome.problem and "is the service running?" in outcome.problem


def test_a_folder_against_the_real_service_in_order_with_its_bad_file(
    server: Server, asked: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in asked.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(b"no picture")
    paths = images_in([folder])
    with closing(UrlTarget(f"http://127.0.0.1:{server.port}")) as target:
        outcomes = list(classify(target, paths, concurrency=3))
    assert [outcome.path for outcome in outcomes] == paths
    bad = [outcome for outcome in outcomes if outcome.problem]
    assert [outcome.path.name for outcome in bad] == ["broken.png"]
    assert bad[0].problem and bad[0].problem.startswith("unreadable_image: ")


def test_the_command_writes_csv_and_json_lines_and_tells_of_problems(
    server: Server, asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = ["--url", f"http://127.0.0.1:{server.port}"]
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "in_terminal", lambda: False)
    said = told(caplog, "invoke", *url, asked, "--output", tmp_path / "a.csv")
    for number in range(1, 6):
        assert f"asking http://127.0.0.1:{server.port}: {number} of 5" in said
    assert f"5 images, 0 with a problem; in {tmp_path / 'a.csv'}" in said
    assert main(["invoke", *url, str(asked), "--output", str(tmp_path / "a.jsonl")]) == 0
    rows = (tmp_path / "a.csv").read_text().splitlines()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + len(lines) == 1 + len(list(asked.iterdir()))
    assert rows[1].split(",")[1] == lines[0]["predictions"][0]["label"]
    assert main(["invoke", *url, str(asked), "--output", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == lines  # one document
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert main(["invoke", *url, str(tmp_path / "bad.png"), "--output", str(tmp_path / "b.csv")]) == 1
    assert "unreadable_image" in (tmp_path / "b.csv").read_text()


def test_settings_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="give the address of the service"):
        UrlTarget("ftp://somewhere")
    with pytest.raises(ConfigError, match="no such file or folder"):
        images_in([tmp_path / "none"])
    with pytest.raises(ConfigError, match="No images"):
        images_in([tmp_path])
    assert main(["invoke", "--url", "http://x", str(tmp_path)]) == 2
    assert main(["status", "--epochs", "3"]) == 2
    assert main(["no-command"]) == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    "answer",
    [
        {"predictions": [[0.1, 0.9]]},  # TensorFlow Serving's
        {"predictions": "cat"},
        {"predictions": [{"label": "cat", "probability": "high"}]},
        {"predictions": [{"class": "cat"}]},
        {**GOOD, "model": "resnet"},
        [1],
    ],
)
def test_what_another_service_answers_is_each_images_problem(answer: object, picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.csv"
    with answering((200, {}, answer)) as (url, _):
        assert main(["invoke", "--url", url, str(picture), "--output", str(output)]) == 1
    assert "the answer is none of this service" in output.read_text()


@pytest.mark.parametrize(
    "url",
    [
        "http://a..b", f"http://{'a' * 64}.com", "http://127.0.0.1:8080/ä", "http://127.0.0.1:8080/a b", "http://a b",
        "http://127.0.0.1:99999", "http://[::1", "127.0.0.1:8080", "http://", "http://ann:secret@127.0.0.1:8080",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_a_sentence(url: str) -> None:
    with pytest.raises(ConfigError, match="--url") as told:
        UrlTarget(url)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("url", ["http://no-such-host.invalid", "https://127.0.0.1:{port}"])
def test_a_wrong_name_or_scheme_ends_at_once_and_is_not_tried_for_each_image(url: str, picture: Path) -> None:
    with answering((200, {}, GOOD)) as (real, _):
        start_s = time.monotonic()
        with pytest.raises(LaunchError, match=r"or give another --url"):
            one(url.format(port=real.rpartition(":")[2]), picture)
    assert time.monotonic() - start_s < 10


def command(*arguments: object, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training.launch", *map(str, arguments)], cwd=ROOT, text=True, stderr=subprocess.PIPE,
        **more,
    )  # fmt: skip


def test_who_reads_no_further_ends_it_with_a_sentence(picture: Path) -> None:
    with answering((200, {}, GOOD)) as (url, _):
        reads, writes = os.pipe()
        os.close(reads)
        with command("invoke", "--url", url, picture, stdout=writes) as process:
            os.close(writes)
            _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Nobody reads the results any more" in stderr and "Traceback" not in stderr and "Exception" not in stderr


def test_results_stay_until_others_are_there_and_what_came_before_an_interruption_stays_too(
    picture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output, part = tmp_path / "a.csv", tmp_path / "a.csv.part"
    output.write_text("of before")
    assert main(["invoke", "--url", "http://127.0.0.1:9", str(picture), "--output", str(output)]) == 1
    assert output.read_text() == "of before" and not part.exists()

    def outcomes() -> Iterator[Outcome]:
        yield Outcome(picture, problem="a sentence")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.write(outcomes(), output, "csv")
    assert output.read_text() == "of before" and "a sentence" in part.read_text()
    assert f"the results until then are in {part}" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        results.write(outcomes(), tmp_path / "a.json", "json")
    assert [each["problem"] for each in json.loads((tmp_path / "a.json.part").read_text())] == ["a sentence"]
    link = tmp_path / "link.csv"
    link.symlink_to(output)
    results.write([Outcome(picture, problem="another")], link, "csv")
    assert "another" in output.read_text() and link.is_symlink() and not part.exists()


def test_a_disk_that_is_full_is_a_sentence(picture: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is Linux's")
    with answering((200, {}, GOOD)) as (url, _):
        assert main(["invoke", "--url", url, str(picture), "--output", "/dev/full", "--format", "csv"]) == 1
    assert "/dev/full cannot be written further: No space left on device" in caplog.text


def test_a_file_whose_name_is_no_utf_8_is_written_readably(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.png")
    path.write_bytes(b"any bytes")
    with answering((200, {}, GOOD)) as (url, _):
        for kind in ("csv", "jsonl"):
            output = tmp_path / f"a.{kind}"
            assert main(["invoke", "--url", url, str(path), "--output", str(output)]) == 0
            assert "xff.png" in output.read_text()


def test_an_address_may_be_that_of_invocations_as_the_services_log_names_it(server: Server, asked: Path) -> None:
    for path in ("", "/", "/invocations", "/invocations/"):
        with closing(UrlTarget(f"http://127.0.0.1:{server.port}{path}")) as target:
            assert classify_one(target, next(asked.iterdir())).problem is None, path


def test_the_number_of_problems_is_told_once(
    tmp_path: Path, asked: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    with answering((400, {}, {"error": {"code": "no", "message": "no"}})) as (url, _):
        said = told(caplog, "invoke", "--url", url, asked, "--output", tmp_path / "a.csv", status=1)
    assert said.count("had a problem") == 1 and "with a problem" not in said
    assert f"5 of 5 images had a problem; `problem` in {tmp_path / 'a.csv'} says which." in said


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A file that is said to be larger than any memory, and takes none of the disk."""
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(2**39)
    return path


def test_a_file_of_no_images_size_is_its_own_problem(picture: Path, huge: Path) -> None:
    with answering((200, {}, GOOD)) as (url, _), closing(UrlTarget(url)) as target:
        good, bad = classify(target, [picture, huge])
    assert good.problem is None and bad.problem and "at most 536,870,912 are read" in bad.problem
    (left_out,) = batch.readable([huge])[1]
    assert left_out.problem and "are read" in left_out.problem
    with pytest.raises(ConfigError, match=r"--smoke \S+huge\.jpg: it has 549,755,813,888 bytes, at most"):
        smoke.require_images([huge])


NESTED = b"[" * 100_000
FULL = {"label": "a", "index": 0}


@pytest.mark.parametrize(
    "body",
    [
        NESTED, b'{"predictions": []}', json.dumps({"predictions": [{**FULL, "probability": 10**400}]}).encode(),
        b'{"predictions": [{"label": "a", "index": 0, "probability": NaN}]}',
    ],
)  # fmt: skip
def test_garbage_is_that_images_problem(body: bytes, picture: Path) -> None:
    outcome = understood(picture, Reply(200, {}, body))
    assert outcome.problem and "the answer is none of this service" in outcome.problem
    assert Reply(503, {}, NESTED).problem.startswith("[[[") and retry_after_s(Reply(503, {}, NESTED)) is None


def test_a_label_that_is_no_text_is_written_readably(picture: Path, tmp_path: Path) -> None:
    with answering((200, {}, {"predictions": [{"label": "\ud800", "index": 0, "probability": 0.9}]})) as (url, _):
        for kind in ("csv", "jsonl"):
            output = tmp_path / f"a.{kind}"
            assert main(["invoke", "--url", url, str(picture), "--output", str(output)]) == 0
            assert r"\ud800" in output.read_text()


def test_a_stdout_of_another_encoding_takes_every_label(picture: Path) -> None:
    with answering((200, {}, {"predictions": [{"label": "\u732b", "index": 0, "probability": 0.9}]})) as (url, _):
        variables = {**os.environ, "PYTHONIOENCODING": "ascii"}
        with command("invoke", "--url", url, picture, stdout=subprocess.PIPE, env=variables) as process:
            stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and r"\u732b" in stdout and "Traceback" not in stderr


def test_ctrl_c_gives_up_requests_that_hang(picture: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun, end = threading.Event(), threading.Event()

    class Hangs(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            begun.set()
            end.wait()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hangs)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def press() -> None:
        begun.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # which wakes it from its wait

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=press, daemon=True).start()
        with (
            caplog.at_level("INFO", "training"),
            closing(UrlTarget(f"http://127.0.0.1:{server.server_port}")) as target,
            pytest.raises(KeyboardInterrupt),
        ):
            list(classify(target, [picture]))
        assert not end.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
        end.set()
        server.shutdown()
        server.server_close()
    assert "it stops when the requests under way are given up" in caplog.text
