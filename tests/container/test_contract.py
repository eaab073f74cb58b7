"""The contract checker: our images keep every rule, a bad one breaks those it should, one line each."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from container import starts
from container.build import ROOT
from container.contract import STARTS, judged
from container.engine import docker
from container.rules import OF_THE_IMAGE, OF_THE_SERVICE, Subject
from container.running import LABEL, picture
from container.starts import OF_OTHER_STARTS
from tests.container.conftest import run

pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

RULES = 1 + len(OF_THE_IMAGE) + len(OF_THE_SERVICE) + len(OF_OTHER_STARTS)
BAD_SERVER = """
import http.server, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(2.5 if self.path == "/ping" and self.server.asked else 0)
        self.server.asked = True
        self.answer(200 if self.path == "/ping" else 500)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/ping":
            return self.answer(405)
        if "X-Unheard-Of" in self.headers:
            return self.answer(400)
        self.answer(500 if b"rubbish" in body else 413 if len(body) > 6e6 else 200 if self.server.served else 503)
        self.server.served = True
    def answer(self, status):
        self.send_response(status)
        if "X-Amzn-SageMaker-Custom-Attributes" in self.headers:
            self.send_header("X-Amzn-SageMaker-Custom-Attributes", "mine" * 300)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer.request_queue_size = 128
server = http.server.HTTPServer(("0.0.0.0", 8080), Handler)
server.asked = server.served = False
server.serve_forever()
"""
PLAIN_SERVER = """
import http.server, os, pathlib, signal
pathlib.Path("/var/log/started").write_text("at the start, as nginx does")
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
print("starting at", os.times().elapsed, flush=True)
if not os.listdir("/opt/ml/model"):
    raise SystemExit(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200 if self.path == "/ping" else 404)
    def do_POST(self):
        while (left := int(self.headers["Content-Length"] or 0)) > 6e6:
            return self.answer(413)
        self.rfile.read(left)
        self.answer(200 if self.path == "/invocations" else 405)
    def answer(self, status):
        self.send_response(status)
        self.send_header("X-Amzn-SageMaker-Custom-Attributes", "one of mine")
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer.request_queue_size = 128
http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
"""
"""What SageMaker hosts, without anything that is recommended."""


def verdicts(*arguments: str) -> tuple[int, dict[str, str], str]:
    """Exit status, PASS or FAIL by rule, and what was printed."""
    result = run(sys.executable, "-m", "container.contract", *arguments, cwd=ROOT)
    lines = re.findall(r"^(PASS|FAIL)  (.+?): ", result.stdout, re.MULTILINE)
    return result.returncode, {rule: verdict for verdict, rule in lines}, result.stdout + result.stderr


@pytest.mark.parametrize("target", ["serve-cpu", "serve"])
def test_our_image_keeps_every_rule(
    target: str, image: Callable[[str], str], model: Path, tell: Callable[[str], None]
) -> None:
    status, rules, said = verdicts(image(target), "--model", str(model))
    tell(f"{target} against the contract:\n{said}")
    assert status == 0, said
    assert set(rules.values()) == {"PASS"}
    assert len(rules) == RULES
    assert said.endswith(f"{RULES} of {RULES} rules hold, all that SageMaker demands do\n")
    # The service's own sentences, not the entry point's first line.
    assert re.search(r"PASS  a missing model .*: exit code 1: .*The folder /opt/ml/model is empty", said)
    assert re.search(r"PASS  a damaged model .*: exit code 1: .*safetensors is damaged: its sha256 is not", said)


def test_an_image_without_what_is_recommended_keeps_what_sagemaker_demands(
    base_image: str, model: Path, tmp_path: Path
) -> None:
    """It writes to its root, takes no POST of /ping, ends with 143; without a model it says what it always says."""
    if not base_image:
        pytest.skip("no local base image with Python to build an image on")
    (tmp_path / "server.py").write_text(PLAIN_SERVER)
    (tmp_path / "Dockerfile").write_text(f'FROM {base_image}\nCOPY server.py /\nENTRYPOINT ["python3", "/server.py"]\n')
    docker("build", "--tag", "contract-plain", str(tmp_path))
    status, rules, said = verdicts("contract-plain", "--model", str(model), "--patience", "5")
    docker("rmi", "contract-plain")
    assert (status, len(rules)) == (1, RULES), said
    assert {rule for rule, verdict in rules.items() if verdict == "FAIL"} == {
        "/ping answers POST as well (recommended)",
        "/invocations takes 25 MB, as much as SageMaker passes on (recommended)",
        "a payload it cannot read gets 4xx, and harms nothing (recommended)",
        "after SIGTERM what was accepted is answered, and the exit code is 0 (recommended)",
        "it also runs with a read-only root and without network (recommended)",
        "it listens on SAGEMAKER_BIND_TO_PORT, and has the label (recommended)",
        "a missing model ends the start, and it says why (recommended)",
        "a damaged model ends the start, and it says why (recommended)",
        "a command it does not know is refused, and it says so (recommended)",
    }, said
    assert "(recommended): exit code 1, and nothing that a good start does not say too: starting at" in said
    assert "Read-only file system" in said
    assert said.endswith(f"{RULES - 9} of {RULES} rules hold, all that SageMaker demands do\n")


def test_a_bad_image_fails_the_rules_it_breaks_and_those_alone(base_image: str, model: Path, tmp_path: Path) -> None:
    if not base_image:
        pytest.skip("no local base image with Python to build a bad image on")
    (tmp_path / "server.py").write_text(BAD_SERVER)
    (tmp_path / "Dockerfile").write_text(
        f"FROM {base_image}\nCOPY server.py /\nUSER nobody\nENV NVIDIA_VISIBLE_DEVICES=all\n"
        "LABEL com.amazonaws.sagemaker.capabilities.multi-models=true\nENTRYPOINT exec python3 /server.py\n"
    )
    docker("build", "--tag", "contract-bad", str(tmp_path))
    status, rules, said = verdicts("contract-bad", "--model", str(model), "--patience", "2")
    print(f"\n{said}")
    docker("rmi", "contract-bad")
    assert status == 1
    assert {rule for rule, verdict in rules.items() if verdict == "PASS"} == {
        "it is for linux/amd64",
        "its manifest is no OCI index",
        STARTS,
        "it accepts connections within 250 ms",
        "/invocations answers within 60 s under load",
        "what is labelled bidirectional-streaming takes a WebSocket",
    }
    assert len(rules) == RULES


def test_an_image_that_needs_more_memory_does_not_fit_serverless(
    image: Callable[[str], str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less of it than serverless gives, too little for ours."""
    (rule,) = [rule for name, rule in OF_OTHER_STARTS.items() if "serverless" in name]
    subject = Subject(image("serve-cpu"), model, picture(), "image/png", {}, 30)
    assert judged(rule, subject, "")[0]
    monkeypatch.setattr(starts, "SERVERLESS_MIB", 100)
    ok, seen = judged(rule, subject, "")
    assert not ok
    assert re.search(r"it ended with exit code (1|137): ", seen)  # by itself, or killed by the kernel


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "RUN printf '#!/bin/sh\\necho no library\\nexit 1\\n' > /bin/serve && chmod 755 /bin/serve",
            "it ended with exit code 1: no library",
        ),
        ('ENTRYPOINT ["python3", "-c", "raise SystemExit(\'no library\')"]', "exit code 1: no library"),
        ("CMD []", "executable file not found in $PATH"),
    ],
)  # fmt: skip
def test_an_image_that_ends_at_once_fails_by_its_last_words(
    line: str, said: str, base_image: str, model: Path, tmp_path: Path
) -> None:
    """What ends by itself then proves nothing. Without ENTRYPOINT `serve` is run where it is on PATH, and to refuse
    another word is docker's.
    """
    if not base_image:
        pytest.skip("no local base image to build on")
    (tmp_path / "Dockerfile").write_text(f"FROM {base_image}\n{line}\n")
    docker("build", "--tag", "contract-dead", str(tmp_path))
    status, rules, told = verdicts("contract-dead", "--model", str(model))
    subject = Subject("contract-dead", model, b"", "image/png", {}, 30)
    unknown = "a command it does not know is refused, and it says so (recommended)"
    assert OF_OTHER_STARTS[unknown](subject, "")[0]
    docker("rmi", "contract-dead")
    assert status == 1
    failed = [rule for rule, verdict in rules.items() if verdict == "FAIL"]
    demanded = [rule for rule in failed if not rule.endswith("(recommended)")]
    assert told.endswith(
        f"{RULES - len(failed)} of {RULES} rules hold, {len(demanded)} that SageMaker demands do not\n"
    )
    assert len(rules) == RULES
    assert said in told
    assert rules["ENTRYPOINT, if there is one, passes `serve` on (exec form), and is not tini"] == "PASS"
    assert rules["/invocations works as soon as /ping is 200"] == "FAIL"
    assert rules[unknown] == "FAIL" and f"{unknown}: not reached" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_it_finds_nothing_left(number: signal.Signals, image: Callable[[str], str], model: Path) -> None:
    def started() -> str:
        label = f"label={LABEL}"
        return docker("ps", "--all", "--quiet", "--filter", label) + docker(
            "network", "ls", "--quiet", "--filter", label
        )

    before = started()
    command = [sys.executable, "-m", "container.contract", image("serve-cpu"), "--model", str(model)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as checker:
        assert checker.stdout is not None
        next(line for line in checker.stdout if "serve` starts" in line)
        assert started() != before
        checker.send_signal(number)
        said = checker.communicate(timeout=60)[0]
    assert checker.returncode == 128 + number
    assert said.endswith(f"ended by {number.name}; what it had started is removed\n") and "Traceback" not in said
    assert started() == before


def test_a_word_that_docker_run_does_not_know_is_told(image: Callable[[str], str], model: Path) -> None:
    status, rules, said = verdicts(image("serve-cpu"), "--model", str(model), "--docker-options=--bogus")
    assert (status, rules["/invocations works as soon as /ping is 200"]) == (1, "FAIL")
    assert said.count("docker run failed: unknown flag: --bogus.") == 1


def test_an_image_that_is_not_there_is_one_sentence(engine: None, tmp_path: Path) -> None:
    status, rules, said = verdicts("no-such-image:none", "--model", str(tmp_path))
    assert status == 1
    assert not rules
    assert said == (
        "There is no image no-such-image:none here: fetch it with 'docker pull no-such-image:none', or 'make image' "
        "builds ours.\n"
    )
