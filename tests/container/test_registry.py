"""What a registry may answer besides a manifest: each a sentence. A real one is asked in test_push.py."""

import http.server
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from container.engine import ContainerError
from container.registry import SCHEMA_2, Pushed, look

CONFIG = {"os": "linux", "architecture": "amd64"}
MANIFEST = {"mediaType": SCHEMA_2, "config": {"digest": "sha256:2"}, "layers": [{"size": 3}, {"size": 4}]}
Answers = dict[str, bytes]
Asked = Callable[[Answers], Pushed | None]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Ask a server over TLS, which has these bodies by the end of their path, cut short where they end with "..."."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    command = "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out crt -subj /CN=test -addext"
    subprocess.run(
        ["openssl", *command.split(), "subjectAltName=IP:127.0.0.1"], cwd=tmp_path, check=True, capture_output=True
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "crt"))
    bodies: Answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = bodies.get(self.path.rpartition("/")[2])
            self.send_response(404 if body is None else 200)
            whole = body or b""
            self.send_header("Content-Length", str(len(whole)))
            self.send_header("Docker-Content-Digest", "sha256:1")
            self.end_headers()
            self.wfile.write(whole.removesuffix(b"..."))

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    def ask(answers: Answers) -> Pushed | None:
        bodies.clear()
        bodies.update(answers)
        return look(f"127.0.0.1:{server.server_port}", "pets", "tag", "AWS", "secret")

    yield ask
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_manifest_and_what_it_names(asked: Asked) -> None:
    there = asked({"tag": json.dumps(MANIFEST).encode(), "sha256:2": json.dumps(CONFIG).encode()})
    assert there == Pushed("sha256:1", SCHEMA_2, "linux/amd64", 7)
    assert there.problem() is None
    assert asked({}) is None


@pytest.mark.parametrize(
    ("manifest", "config", "said"),
    [
        (b"<html>Sign in", None, "cannot be read as an image's manifest (JSONDecodeError"),
        (b"\xffp\x00r", None, "cannot be read as an image's manifest (UnicodeDecodeError"),
        (b"[]", None, "cannot be read as an image's manifest (AttributeError"),
        (b'{"config": {}}', None, "cannot be read as an image's manifest (KeyError: 'digest')"),
        (b'{"config": {"digest": "sha256:2"}}', CONFIG, "cannot be read as an image's manifest (KeyError: 'layers')"),
        (b'{"config": {"digest": "sha256:2"}, "layers": [7]}', CONFIG, "as an image's manifest (TypeError"),
        (json.dumps(MANIFEST).encode(), None, "has the manifest of pets:tag and not what it names"),
        (json.dumps(MANIFEST).encode(), [], "cannot be read as an image's manifest (AttributeError"),
        (json.dumps(MANIFEST).encode() + b"...", None, "broke off (IncompleteRead"),
    ],
)
def test_what_is_no_manifest_is_one_sentence(manifest: bytes, config: object, said: str, asked: Asked) -> None:
    answers = {"tag": manifest}
    if config is not None:
        answers["sha256:2"] = json.dumps(config).encode()
    with pytest.raises(ContainerError) as raised:
        asked(answers)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)
