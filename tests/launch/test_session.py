"""What goes wrong outside of AWS's answers: credentials, region, an answer that breaks off."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import answered_by
from training.errors import ConfigError
from training.launch import session
from training.launch.client import EndpointTarget, Unanswered
from training.launch.data import fetch
from training.launch.errors import AwsError
from training.launch.session import Aws, connect

ROOT = Path(__file__).parents[2]
KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials, no settings of whoever runs the tests."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", *KEYS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@contextmanager
def aws_answered_by(handler: type[BaseHTTPRequestHandler], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of AWS is a server of ours meanwhile."""
    with answered_by(handler) as url:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    """An account whose every answer breaks off after ten of a hundred bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.send_header("ETag", '"of-the-whole"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(b"0123456789")

        def do_GET(self) -> None:
            self.do_POST()

        def do_HEAD(self) -> None:
            self.do_POST()

        def log_message(self, *_: Any) -> None: ...

    with aws_answered_by(Handler, monkeypatch):
        yield connect("eu-central-1")


def test_half_of_the_credentials_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    with pytest.raises(AwsError, match=r"not whole .*missing: AWS_SECRET_ACCESS_KEY"):
        connect("eu-central-1").client("sts")


def test_a_region_that_can_be_none_and_a_broken_configuration_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Region eu central: regions look like eu-central-1"):
        connect("eu central")
    with pytest.raises(ConfigError, match=r"--profile nobody: .*list-profiles"):
        connect("eu-central-1", "nobody")
    (tmp_path / "config").write_text("[broken\n")
    with pytest.raises(ConfigError, match=r"settings in ~/\.aws cannot be used"):
        connect("eu-central-1")


@pytest.mark.parametrize("region", ["eu-centrall-1", "eu-cenrtal-1", "eu-central-1a"])
def test_a_region_that_is_mistyped_is_refused_with_the_one_that_is_meant(region: str) -> None:
    with pytest.raises(ConfigError, match=rf"Region {region}: .* Did you mean eu-central-1\?"):
        connect(region)


def test_a_region_that_may_be_newer_than_boto3_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for region in ("eu-central-1", "us-gov-west-1", "cn-north-1", "ap-southeast-4"):
        assert connect(region).region == region
    assert caplog.text == ""
    assert connect("eu-west-9").region == "eu-west-9"
    assert "lists no SageMaker in region eu-west-9" in caplog.text


def test_an_endpoint_url_that_is_none_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AwsError, match="Invalid endpoint: nowhere"):
        connect("eu-central-1").client("sts")


def test_a_download_that_breaks_off_is_a_sentence_and_leaves_nothing(breaking: Aws, tmp_path: Path) -> None:
    with pytest.raises(AwsError, match="s3 cannot be reached"):
        fetch(breaking, "s3://bucket/key", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_an_answer_of_the_endpoint_that_breaks_off_may_be_asked_for_again(breaking: Aws) -> None:
    with pytest.raises(Unanswered, match="cannot be reached"):
        EndpointTarget(breaking, "mine").ask(b"image", "image/png")


def test_without_boto3_the_commands_say_what_to_install() -> None:
    code = "import runpy, sys; sys.modules['boto3'] = None; runpy.run_module('training.launch', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("boto3 is not installed: `make setup-sagemaker` installs it, or `uv sync --inexact ")
    assert len(done.stderr.splitlines()) == 1


def test_a_token_that_cannot_be_sent_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the end of a line, as secrets of CI systems have."""
    for name, value in {**KEYS, "AWS_SESSION_TOKEN": "VERY-SECRET\n"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(AwsError, match="credentials hold what cannot be sent, such as the end of a line") as told:
        connect("eu-central-1").identity  # noqa: B018
    assert "VERY-SECRET" not in str(told.value)


def test_a_profile_of_the_environment_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match=r"^AWS_PROFILE: .*nobody"):
        connect("eu-central-1")


@pytest.mark.parametrize("status", [200, 403])
def test_a_proxys_page_in_place_of_awss_answer_is_a_sentence(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b"<html><body>Please log in<br></body></html>"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with (
        aws_answered_by(Handler, monkeypatch),
        pytest.raises(AwsError, match=r"sts was answered by something that is not AWS: a proxy, or a login page"),
    ):
        connect("eu-central-1").identity  # noqa: B018


LOGIN = b'<?xml version="1.0"?><html><body>Please log in</body></html>'
CALLS = [
    ("sts", "get_caller_identity", {}), ("sagemaker", "describe_endpoint", {"EndpointName": "a"}),
    ("s3", "put_object", {"Bucket": "abc", "Key": "k", "Body": b"x"}),
    ("s3", "head_object", {"Bucket": "abc", "Key": "k"}),
    ("s3", "create_multipart_upload", {"Bucket": "abc", "Key": "k"}), ("s3", "list_objects_v2", {"Bucket": "abc"}),
    ("cloudwatch", "describe_alarms", {}),
]  # fmt: skip


@pytest.mark.parametrize("body", [LOGIN, b"{}", b"null", b"[]", b""])
def test_an_answer_that_is_well_formed_and_not_awss_is_a_sentence(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815  # http.server's names

        def log_message(self, *_: Any) -> None: ...

    monkeypatch.setattr(session, "TRIES", 1)
    with aws_answered_by(Handler, monkeypatch):
        account = connect("eu-central-1")
        for service, call, given in CALLS:
            with pytest.raises(AwsError, match=f"{service} was answered by something that is not AWS") as told:
                answer = getattr(account.client(service), call)(**given)
                answer["MetricAlarms"]
            assert told.value.code == "Unreachable"


def test_a_program_that_gives_no_credentials_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\ncredential_process = echo []\n")
    with pytest.raises(AwsError, match=r"credential_process in ~/.aws, say.* gives none that can be read"):
        connect("eu-central-1").identity  # noqa: B018


def test_credentials_that_are_no_text_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in KEYS:
        for other in KEYS:
            monkeypatch.setenv(other, "abc\udcff" if other == name else "abc")
        with pytest.raises(AwsError, match="credentials hold what is no text; set them anew"):
            connect("eu-central-1").identity  # noqa: B018


def test_a_code_that_nobody_can_type_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(
        "[profile codes]\nrole_arn = arn:aws:iam::123456789012:role/r\nsource_profile = keys\n"
        "mfa_serial = arn:aws:iam::123456789012:mfa/ann\n[profile keys]\naws_access_key_id = a\n"
        "aws_secret_access_key = b\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "training.launch", "status", "--profile", "codes", "--region", "eu-central-1"],
        cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 1 and "asks for a code (mfa_serial)" in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_address_that_hangs_is_told_when_it_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            time.sleep(0.5)

        def log_message(self, *_: Any) -> None: ...

    monkeypatch.setattr(session, "READ_TIMEOUT_S", 0.1)
    monkeypatch.setattr(session, "TRIES", 2)
    with aws_answered_by(Handler, monkeypatch), pytest.raises(AwsError, match="sts cannot be reached"):
        connect("eu-central-1").identity  # noqa: B018
    assert caplog.text.count("sts has not answered GetCallerIdentity in time") == 1
    assert "it is asked again, 2 times in all" in caplog.text


def test_a_mistake_of_our_own_is_not_blamed_on_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)

    def mistaken(**_: object) -> None:
        raise KeyError("ours")

    client = connect("eu-central-1").client("sts")
    client.meta.events.register("before-call", mistaken)
    with pytest.raises(KeyError, match="ours"):
        client.get_caller_identity()
