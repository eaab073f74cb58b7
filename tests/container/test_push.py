"""`python -m container.push`: each failure one sentence, and a push to a real registry beside moto's ECR.

The registry is Debian's docker-registry, over TLS on port 443 of this machine under ECR's own name, with moto's token
as its password. Only the ECR, STS and IAM calls are answered by moto; docker, TLS, tags and manifests are real.
"""

import base64
import gzip
import hashlib
import http.server
import inspect
import json
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from container import engine as engine_module
from container.build import ROOT, version
from container.content import content_hash
from container.ecr import LIFECYCLE, PUSH_ACTIONS, Ecr, policy
from container.engine import ContainerError, docker
from container.push import _logged_in, _push_sentence, content_tag, note
from container.registry import OTHERS, SCHEMA_2, Pushed
from tests.conftest import answered_by, free_port
from tests.container.debian import unpack
from training.launch.images import Image, image_for

ACCOUNT, REGION = "123456789012", "eu-central-1"
HOST = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
PASSWORD = f"{ACCOUNT}-auth-token"
"""moto's, always."""
HASH = "$2y$05$bIzggdvQ9vBLyu//97LZAuqVn1e1VIALsPNEjJkcsUUc7XY3dlKjm"
"""Of PASSWORD: htpasswd -nbB AWS PASSWORD."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


@dataclass
class Aws:
    """moto's server, and the environment in which boto3 calls it."""

    url: str
    extra: dict[str, str] = field(default_factory=dict)

    def env(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return {**kept, "AWS_ENDPOINT_URL": self.url, "AWS_REGION": REGION, **CREDENTIALS, **self.extra, **more}


def start_moto(log: Path, **env: str) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "--port", str(port)],
            stdout=out,
            stderr=out,
            env={**os.environ, **env},
        )
    url = f"http://127.0.0.1:{port}"
    gives_up_s = time.monotonic() + 120  # it imports much, perhaps beside a build
    while time.monotonic() < gives_up_s and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
            return process, url
        except OSError:
            time.sleep(0.1)
    process.kill()
    process.wait()
    pytest.fail(f"moto's server does not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    pytest.importorskip("boto3", reason="boto3 is not installed (group sagemaker)")
    process, url = start_moto(tmp_path_factory.mktemp("moto") / "log")
    yield Aws(url)
    process.terminate()
    process.wait(30)


def push(*arguments: str, env: dict[str, str], under: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """With `under`, a command that runs it."""
    command = [*under, sys.executable, "-m", "container.push", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)


def sentence(result: subprocess.CompletedProcess[str]) -> str:
    """The one line a failed push says on stderr, after what it logged before."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout
    return result.stderr.splitlines()[-1]


def fake_docker(folder: Path, script: str) -> str:
    """A PATH on which `docker` is this script: what another machine's docker says cannot be had here otherwise."""
    folder.mkdir(exist_ok=True)
    (folder / "docker").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "docker").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_without_docker_it_says_so(aws: Aws, tmp_path: Path) -> None:
    assert "docker is not installed" in sentence(push(env=aws.env(PATH=str(tmp_path))))


def test_without_an_engine_it_says_so(aws: Aws, tmp_path: Path) -> None:
    if shutil.which("docker") is None:
        pytest.skip("no docker command")
    host = f"unix://{tmp_path}/none.sock"
    assert f"No docker engine answers at {host} (DOCKER_HOST); " in sentence(push(env=aws.env(DOCKER_HOST=host)))


IMAGE = json.dumps([{"Os": "linux", "Architecture": "amd64", "Id": "sha256:" + "1" * 64, "Config": {"Labels": None}}])
HAS_IMAGE = f"case $1 in image) echo '{IMAGE}';; esac"


def test_without_credentials_it_says_so(aws: Aws, tmp_path: Path) -> None:
    env = aws.env(PATH=fake_docker(tmp_path / "bin", HAS_IMAGE), HOME=str(tmp_path))
    for name in CREDENTIALS:
        if name != "AWS_EC2_METADATA_DISABLED":
            del env[name]
    assert "There are no AWS credentials" in sentence(push(env=env))


def test_without_a_region_it_says_so(aws: Aws, tmp_path: Path) -> None:
    env = aws.env(PATH=fake_docker(tmp_path / "bin", HAS_IMAGE), HOME=str(tmp_path))
    del env["AWS_REGION"]
    assert "No AWS region is set" in sentence(push(env=env))


def test_a_profile_that_is_not_there_is_named(aws: Aws, tmp_path: Path) -> None:
    env = aws.env(PATH=fake_docker(tmp_path / "bin", HAS_IMAGE), HOME=str(tmp_path))
    assert "nobody" in sentence(push("--profile", "nobody", env=env))


def test_without_aws_it_says_who_did_not_answer(aws: Aws, tmp_path: Path) -> None:
    env = aws.env(
        PATH=fake_docker(tmp_path / "bin", HAS_IMAGE), AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}",
        AWS_MAX_ATTEMPTS="1",
    )  # fmt: skip
    assert "AWS (sts:GetCallerIdentity, region eu-central-1) did not answer" in sentence(push(env=env))


@contextmanager
def refuses(code: str) -> Iterator[str]:
    """In the place of AWS: an address at which everything is refused, as STS writes it."""

    class Refusal(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = f"<ErrorResponse><Error><Code>{code}</Code><Message>No.</Message></Error></ErrorResponse>".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with answered_by(Refusal) as url:
        yield url


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("ExpiredToken", "The AWS credentials have expired: renew them"),
        ("InvalidClientTokenId", "AWS does not accept these credentials (InvalidClientTokenId): 'aws sts"),
        ("AccessDenied", "These credentials may not do sts:GetCallerIdentity: allow it in IAM"),
        ("RegionDisabledException", "AWS refused sts:GetCallerIdentity: No (RegionDisabledException)."),
    ],
)
def test_what_aws_refuses_is_one_sentence(code: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("boto3", reason="boto3 is not installed (group sagemaker)")
    with refuses(code) as url:
        assert said in sentence(push(env=Aws(url).env(PATH=fake_docker(tmp_path / "bin", HAS_IMAGE))))


CALLED = (
    "ecr:DescribeRepositories", "ecr:CreateRepository", "ecr:GetLifecyclePolicy", "ecr:PutLifecyclePolicy",
    "ecr:GetAuthorizationToken",
)  # fmt: skip
"""Actions of AWS's API that a push takes; docker's own are the registry's to refuse."""


@pytest.fixture(scope="module")
def pushers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Aws, dict[str, dict[str, str]]]]:
    """moto enforcing IAM, and a user's keys for each action, with all the others allowed."""
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed (group sagemaker)")
    calls = 3
    log = tmp_path_factory.mktemp("moto-iam") / "log"
    process, url = start_moto(log, INITIAL_NO_AUTH_ACTION_COUNT=str(calls * len(CALLED)))
    try:
        iam = boto3.client("iam", endpoint_url=url, region_name=REGION, **{
            "aws_access_key_id": "testing", "aws_secret_access_key": "testing"})  # fmt: skip
        keys = {}
        for missing in CALLED:
            user = f"pusher-{missing.partition(':')[2]}"
            iam.create_user(UserName=user)
            key = iam.create_access_key(UserName=user)["AccessKey"]
            keys[missing] = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
            allowed = json.loads(policy(ACCOUNT, REGION, "resnet34-sagemaker"))
            for statement in allowed["Statement"]:
                statement["Resource"] = "*"  # moto knows no resources here
                statement["Action"] = [action for action in statement["Action"] if action != missing]
            allowed["Statement"] = [statement for statement in allowed["Statement"] if statement["Action"]]
            iam.put_user_policy(UserName=user, PolicyName="push", PolicyDocument=json.dumps(allowed))
        yield Aws(url), keys
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("missing", CALLED)
def test_a_missing_permission_is_named(
    missing: str, pushers: tuple[Aws, dict[str, dict[str, str]]], tmp_path: Path
) -> None:
    there, keys = pushers
    env = there.env(PATH=fake_docker(tmp_path / "bin", HAS_IMAGE), **keys[missing])
    repository = missing.lower().replace(":", "-")  # each makes its own
    said = sentence(push("--repository", repository, env=env))
    assert f"user/pusher-{missing.partition(':')[2]} may not do {missing}: allow it in IAM" in said


def test_every_action_that_is_called_is_one_whose_lack_was_tried() -> None:
    """And the others of the policy are the registry's."""
    called = re.findall(r'"(ecr:\w+)"', inspect.getsource(Ecr))
    assert set(called) == set(CALLED)
    assert {*CALLED, *PUSH_ACTIONS} == set(re.findall(r'"(ecr:\w+)"', policy(ACCOUNT, REGION, "x")))


def test_no_image_with_a_tag_expires() -> None:
    """An endpoint that scales out pulls the image it was made with, however old."""
    assert {rule["selection"]["tagStatus"] for rule in LIFECYCLE["rules"]} == {"untagged"}


def test_the_policy_names_every_action_and_one_repository() -> None:
    result = push("--policy", "--repository", "mine", "--region", REGION, env=dict(os.environ))
    statements = json.loads(result.stdout)["Statement"]
    assert statements[0]["Action"] == ["ecr:GetAuthorizationToken"]
    assert statements[1]["Resource"] == f"arn:aws:ecr:{REGION}:ACCOUNT:repository/mine"
    assert {"ecr:InitiateLayerUpload", "ecr:PutImage", "ecr:CreateRepository"} <= set(statements[1]["Action"])


def test_an_image_that_is_not_there_is_named(aws: Aws, tmp_path: Path) -> None:
    script = 'case $1 in image) echo "Error: No such image: $3" >&2; exit 1;; esac'
    said = sentence(push("--target", "train", env=aws.env(PATH=fake_docker(tmp_path / "bin", script))))
    assert said == "There is no image resnet34-sagemaker:train here: build it with 'make image TARGET=train'."


def test_an_image_of_ours_without_its_version_is_refused(aws: Aws, tmp_path: Path) -> None:
    """As docker build alone makes it: its tag would name no version."""
    labelled = IMAGE.replace('"Labels": null', '"Labels": {"org.opencontainers.image.version": ""}')
    script = f"case $1 in image) echo '{labelled}';; esac"
    said = sentence(push("--target", "train", env=aws.env(PATH=fake_docker(tmp_path / "bin", script))))
    assert said == "resnet34-sagemaker:train does not say its version: build it with 'make image TARGET=train'."


def test_the_image_of_another_target_is_refused(aws: Aws, tmp_path: Path) -> None:
    """The repository's tags are immutable, and `train` in artifacts/image.json is what jobs run."""
    labelled = IMAGE.replace('"Labels": null', '"Labels": {"resnet34.target": "serve-cpu"}')
    script = f"case $1 in image) echo '{labelled}';; esac"
    said = sentence(push("--target", "train", "--image", "x", env=aws.env(PATH=fake_docker(tmp_path / "bin", script))))
    assert said == (
        "x is the image serve-cpu, not train: push it with 'make push TARGET=serve-cpu IMAGE=x', or leave IMAGE out."
    )


@pytest.mark.parametrize("media_type", OTHERS)
def test_an_image_in_another_form_is_refused_before_it_is_sent(media_type: str, aws: Aws, tmp_path: Path) -> None:
    """As an engine with containerd's store tells of what `docker compose build` made; the tag would be taken."""
    described = IMAGE.replace('"Os"', f'"Descriptor": {{"mediaType": "{media_type}"}}, "Os"')
    script = f"echo $1 >> {tmp_path}/called; case $1 in image) echo '{described}';; esac"
    said = sentence(push("--target", "serve-cpu", env=aws.env(PATH=fake_docker(tmp_path / "bin", script))))
    assert said == (
        f"resnet34-sagemaker:serve-cpu is {media_type} in docker's store and would be pushed so, and SageMaker takes "
        f"{SCHEMA_2} alone: 'make image TARGET=serve-cpu' builds that, 'docker compose build' need not."
    )
    assert (tmp_path / "called").read_text().split() == ["version", "image"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("write /var/lib/docker/tmp/x: no space left on device", "disk that docker keeps images on is full"),
        (
            "Got permission denied while trying to connect to the Docker daemon socket",
            "You may not use the docker engine",
        ),
        ("unknown flag: --bogus\nSee 'docker push --help'.", "docker push failed: unknown flag: --bogus."),
        ("error during connect: Get http://far:2375/version: dial tcp: no such host", "No docker engine answers"),
        ("Failed to connect to the docker API at unix:///run/docker.sock; check the path", "No docker engine answers"),
        ("#9 Failed to connect to deb.debian.org port 80\nexit code: 100", "docker push failed: exit code: 100."),
        ("#9 permission denied: cannot connect to /tmp/x\nexit code: 1", "docker push failed: exit code: 1."),
        ("#9 uv: error: unknown flag --locked\nexit code: 2", "docker push failed: exit code: 2."),
        ("\n".join(["#9 No space left on device (ignored)", *map(str, range(30))]), "docker push failed: 29."),
        ("\n".join(["#9 No space left on device", *map(str, range(20))]), "disk that docker keeps images on is full"),
        ("something else\nwent wrong.", "docker push failed: went wrong."),
        ("", "docker push failed: it said nothing."),
    ],
)
def test_what_docker_says_becomes_a_sentence(words: str, said: str) -> None:
    assert said in engine_module.explain(words, "push")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("unknown flag: --platform", "it takes BuildKit"),
        (
            "#2 ERROR: dial tcp: lookup docker.io: no such host\nfailed to create LLB definition: no such host",
            "The base image cannot be fetched: failed to create LLB definition: no such host. Without network, BASE_IM",
        ),
    ],
)
def test_what_docker_says_of_a_build_becomes_a_sentence(words: str, said: str) -> None:
    assert said in engine_module.explain(words, "build")


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No byte can be written to any file of this process, as on a full disk; docker's own process is another."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(tempfile, "tempdir", None)  # where it has been able to write before
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.json"
    path.write_text('{"train": {}}')
    monkeypatch.setenv("DOCKER_HOST", "unix:///none.sock")
    with full_disk(monkeypatch):
        with pytest.raises(ContainerError, match=r"There is no place for the folder .* TMPDIR names another place\."):
            _logged_in(HOST, PASSWORD).__enter__()
        with pytest.raises(ContainerError, match=r"The image is pushed as a, and .*image\.json cannot be written"):
            note(path, "serve", {"uri": "a"})
    assert json.loads(path.read_text()) == {"train": {}}
    assert [each.name for each in tmp_path.iterdir()] == ["image.json"]


def test_the_token_comes_by_stdin_and_into_a_folder_that_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No argument, as any process may read those; what docker is given says that it needs no helper from PATH."""
    written = 'env > env; echo "$@" > arguments; cat > stdin; cat "$DOCKER_CONFIG/config.json" > config'
    script = f'cd {tmp_path}; {written}; ls "$TMPDIR" > ls'
    monkeypatch.setenv("PATH", fake_docker(tmp_path / "bin", script))
    monkeypatch.setenv("DOCKER_HOST", "unix:///none.sock")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with _logged_in(HOST, PASSWORD) as env:
        assert Path(env["DOCKER_CONFIG"]).parent == tmp_path / "tmp"
    assert (tmp_path / "arguments").read_text() == f"login --username AWS --password-stdin {HOST}\n"
    assert (tmp_path / "stdin").read_text() == PASSWORD
    assert PASSWORD not in (tmp_path / "env").read_text()
    assert json.loads((tmp_path / "config").read_text()) == {"auths": {HOST: {}}}
    assert (tmp_path / "ls").read_text().startswith("docker-config-")
    assert not list((tmp_path / "tmp").iterdir())


def test_what_the_machine_refuses_is_one_sentence(tmp_path: Path) -> None:
    """A docker that cannot be run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_bytes(b"\x7fELF")
    (folder / "docker").chmod(0o755)
    env = {**os.environ, "PATH": str(folder)}
    said = sentence(push(env=env))
    assert said == f"This machine cannot go on ({folder}/docker): Exec format error."
    for words in (["container.build"], ["container.contract", "image", "--model", str(tmp_path)]):
        command = [sys.executable, "-m", *words]
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert (result.returncode, (result.stdout + result.stderr).strip()) == (1, said)


def test_what_ecr_refuses_names_the_action() -> None:
    """The words of ECR (aws/amazon-sagemaker-examples#1257)."""
    said = engine_module.explain(
        "denied: User: arn:aws:sts::123456789012:assumed-role/R/S is not authorized to perform: "
        "ecr:InitiateLayerUpload on resource: arn:aws:ecr:eu-central-1:123456789012:repository/x because no "
        "identity-based policy allows the ecr:InitiateLayerUpload action",
        "push",
    )
    assert _push_sentence(said).startswith("The push lacks ecr:InitiateLayerUpload: allow it in IAM")
    assert "ecr:PutImage" in _push_sentence("docker push failed: no basic auth credentials.")


def test_the_tag_follows_from_the_content() -> None:
    assert content_tag("0.1.0", "serve", "0123456789ab" * 5) == "0.1.0-serve-0123456789ab"


def test_the_file_keeps_the_other_images_and_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "artifacts" / "image.json"
    note(path, "serve", {"uri": "a"})
    note(path, "train", {"uri": "b"})
    note(path, "serve", {"uri": "c"})
    assert json.loads(path.read_text()) == {"serve": {"uri": "c"}, "train": {"uri": "b"}}
    assert [each.name for each in path.parent.iterdir()] == ["image.json"]
    path.write_text("no json")
    with pytest.raises(ContainerError, match="is pushed as d, and"):
        note(path, "serve", {"uri": "d"})


@pytest.mark.parametrize(
    ("media_type", "platform", "said"),
    [
        (SCHEMA_2, "linux/amd64", None),
        (SCHEMA_2, "linux/arm64", "for linux/arm64"),
        ("application/vnd.oci.image.index.v1+json", None, "attestations"),
        ("application/vnd.oci.image.manifest.v1+json", "linux/amd64", "OCI media types"),
    ],
)
def test_what_sagemaker_would_refuse_is_a_sentence(media_type: str, platform: str | None, said: str | None) -> None:
    problem = Pushed("sha256:1", media_type, platform, 0).problem()
    assert problem is None if said is None else said in str(problem)


@dataclass
class Registry:
    """A registry under ECR's name."""

    ca: Path
    passwords: Path
    """In htpasswd's format, read again whenever it changes."""

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[bytes, dict[str, str]]:
        secret = base64.b64encode(f"AWS:{PASSWORD}".encode()).decode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(
            f"https://{HOST}/v2/{path}", body, {"Authorization": f"Basic {secret}", **given}, method=method
        )
        context = ssl.create_default_context(cafile=str(self.ca))
        with urllib.request.urlopen(request, timeout=60, context=context) as response:
            return response.read(), dict(response.headers)


@pytest.fixture(scope="module")
def registry(engine: None, aws: Aws, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Needs root: port 443, a line in /etc/hosts and a certificate for the engine, all undone at the end."""
    if os.geteuid() != 0 or shutil.which("openssl") is None:
        pytest.skip("a registry under ECR's name takes root and openssl")
    folder = tmp_path_factory.mktemp("registry")
    program = shutil.which("docker-registry") or str(unpack(folder, "docker-registry") / "usr/bin/docker-registry")
    ca = folder / "ca.crt"
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout ca.key -out ca.crt -subj /CN=test",
        f"req -newkey rsa:2048 -nodes -keyout host.key -out host.csr -subj /CN={HOST}",
        "x509 -req -in host.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out host.crt -extfile san",
    ):
        (folder / "san").write_text(f"subjectAltName=DNS:{HOST}")
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    (folder / "htpasswd").write_text(f"AWS:{HASH}\n")
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}, "delete": {"enabled": True}},
        "http": {
            "addr": "127.0.0.1:443",
            "tls": {"certificate": str(folder / "host.crt"), "key": str(folder / "host.key")},
        },
        "auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}},
        "log": {"level": "warn"},
    }  # fmt: skip
    (folder / "config.yml").write_text(json.dumps(settings))
    certificates = Path("/etc/docker/certs.d") / HOST
    hosts = Path("/etc/hosts")
    before = hosts.read_text()
    with (folder / "log").open("w") as out:
        process = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=out, stderr=out)
    try:
        certificates.mkdir(parents=True, exist_ok=True)
        shutil.copy(ca, certificates / "ca.crt")
        hosts.write_text(f"{before.rstrip()}\n127.0.0.1 {HOST}\n")
        bundle = folder / "bundle.crt"
        others = Path(os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile or ca)
        bundle.write_text(ca.read_text() + others.read_text())  # what make has fetched comes from the package registry
        aws.extra["SSL_CERT_FILE"] = str(bundle)
        ours = Registry(ca, folder / "htpasswd")
        for _ in range(100):
            try:
                ours.request("GET", "")
                break
            except OSError:
                if process.poll() is not None:
                    pytest.skip(f"the registry does not start: {(folder / 'log').read_text()[-300:]}")
                time.sleep(0.1)
        yield ours
    finally:
        hosts.write_text(before)
        shutil.rmtree(certificates)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        aws.extra.pop("SSL_CERT_FILE", None)


@pytest.mark.container
@pytest.mark.timeout(900)
def test_a_push_arrives_as_sagemaker_wants_it_and_can_be_pulled(
    registry: Registry, aws: Aws, image: Callable[[str], str], tmp_path: Path, tell: Callable[[str], None]
) -> None:
    boto3 = pytest.importorskip("boto3")
    built = image("serve-cpu")
    output, home = tmp_path / "image.json", tmp_path / "home"
    arguments = ["--target", "serve-cpu", "--output", str(output)]
    path, said_to_docker, helped = watched_docker(tmp_path / "bin")
    for folder in (home, tmp_path / "tmp"):
        folder.mkdir()
    env = aws.env(PATH=path, HOME=str(home), TMPDIR=str(tmp_path / "tmp"))
    first = push(*arguments, env=env)
    tell(f"push:\n{first.stderr}")
    assert first.returncode == 0, first.stderr
    assert f"login --username AWS --password-stdin {HOST}\n" in said_to_docker.read_text()
    assert PASSWORD not in said_to_docker.read_text()
    assert not helped.exists(), "a helper that happens to be there would keep the token"
    assert [*(tmp_path / "tmp").iterdir(), *home.rglob("config.json")] == []
    entry = json.loads(output.read_text())["serve-cpu"]
    assert first.stdout == f"{entry['uri']}\n"
    assert image_for("serve-cpu", None, output) == Image(entry["uri"], None), "what deployment reads"
    assert entry["uri"].startswith(f"{HOST}/resnet34-sagemaker:{version()}-serve-cpu-")
    assert (entry["media_type"], entry["platform"], entry["cuda"]) == (SCHEMA_2, "linux/amd64", None)
    assert PASSWORD not in first.stderr
    ecr = boto3.client(
        "ecr", endpoint_url=aws.url, region_name=REGION, aws_access_key_id="t", aws_secret_access_key="t"
    )
    (repository,) = ecr.describe_repositories()["repositories"]
    assert repository["imageTagMutability"] == "IMMUTABLE"
    assert repository["imageScanningConfiguration"]["scanOnPush"]
    rules = json.loads(ecr.get_lifecycle_policy(repositoryName="resnet34-sagemaker")["lifecyclePolicyText"])["rules"]
    assert [rule["selection"]["countType"] for rule in rules] == ["sinceImagePushed"]

    again = push(*arguments, env=aws.env())
    assert again.returncode == 0, again.stderr
    assert "is there already" in again.stderr
    assert json.loads(output.read_text())["serve-cpu"]["digest"] == entry["digest"]

    assert_arrived(registry, entry, json.loads(docker("image", "inspect", built))[0]["RootFS"]["Layers"])

    config = tmp_path / "docker"
    config.mkdir()
    env = {"DOCKER_CONFIG": str(config)}
    docker("login", "--username", "AWS", "--password-stdin", HOST, stdin=PASSWORD, env=env)
    docker("pull", entry["uri"], env=env)
    pulled, local = (docker("image", "inspect", "--format", "{{.Id}}", name) for name in (entry["uri"], built))
    docker("rmi", "--no-prune", entry["uri"])
    assert pulled == local


@pytest.mark.container
@pytest.mark.timeout(900)
def test_make_push_brings_the_target_and_notes_it_where_the_other_commands_look(
    registry: Registry, aws: Aws, image: Callable[[str], str], tmp_path: Path
) -> None:
    """From a clone, so that this checkout's artifacts/image.json stays as it is."""
    image("serve-cpu")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    uv = os.environ.get("UV")
    command = ["make", "--no-print-directory", "push", "TARGET=serve-cpu", *([f"UV={uv}"] if uv else [])]
    env = {name: value for name, value in aws.env().items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    entry = json.loads((clone / "artifacts" / "image.json").read_text())["serve-cpu"]
    assert done.stdout.splitlines()[-1] == entry["uri"]
    assert entry["uri"].startswith(f"{HOST}/resnet34-sagemaker:{version()}-serve-cpu-")
    assert image_for("serve-cpu", None, clone / "artifacts" / "image.json").uri == entry["uri"]
    body, _ = registry.request("GET", f"resnet34-sagemaker/manifests/{entry['digest']}", Accept=SCHEMA_2)
    assert f"sha256:{hashlib.sha256(body).hexdigest()}" == entry["digest"]


def watched_docker(folder: Path) -> tuple[str, Path, Path]:
    """A PATH with the real docker, what it is called with, and a file that a credential helper makes when asked."""
    said, helped = folder / "said", folder / "helped"
    real = shutil.which("docker")
    fake_docker(folder, f'echo "$@" >> {said}\nexec {real} "$@"')
    for name in ("pass", "docker-credential-pass", "docker-credential-secretservice"):
        (folder / name).write_text(f"#!/bin/sh\ntouch {helped}\nexit 1\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}", said, helped


def assert_arrived(registry: Registry, entry: dict[str, str], layers: list[str]) -> None:
    """What the registry gives, read without docker, which has all of it already: each byte of each layer."""
    repository = entry["uri"].partition("/")[2].partition(":")[0]
    body, _ = registry.request("GET", f"{repository}/manifests/{entry['digest']}", Accept=SCHEMA_2)
    assert f"sha256:{hashlib.sha256(body).hexdigest()}" == entry["digest"]
    manifest = json.loads(body)
    unpacked = []
    for blob in (manifest["config"], *manifest["layers"]):
        content, _ = registry.request("GET", f"{repository}/blobs/{blob['digest']}")
        assert len(content) == blob["size"]
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == blob["digest"]
        if blob is manifest["config"]:
            assert json.loads(content)["rootfs"]["diff_ids"] == layers
        else:
            unpacked.append(f"sha256:{hashlib.sha256(gzip.decompress(content)).hexdigest()}")
    assert unpacked == layers
    assert sum(blob["size"] for blob in manifest["layers"]) == entry["compressed_bytes"]


@pytest.mark.container
def test_a_push_from_a_full_disk_is_one_sentence(registry: Registry, aws: Aws, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    docker("build", "--platform", "linux/amd64", "--tag", "contract-tiny", str(tmp_path))
    under = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh"]  # no byte can be written to any file
    try:
        said = sentence(push("--image", "contract-tiny", "--repository", "tiny", env=aws.env(), under=under))
    finally:
        docker("rmi", "contract-tiny")
    assert "There is no place for the folder that docker's login takes: No usable temporary directory" in said


@pytest.mark.container
@pytest.mark.timeout(600)
def test_an_index_under_the_tag_is_refused(
    registry: Registry, aws: Aws, image: Callable[[str], str], tmp_path: Path
) -> None:
    """As BuildKit pushes it with attestations: put there by the registry's own protocol, in a repository of its own."""
    tag = content_tag(version(), "serve-cpu", content_hash(image("serve-cpu")))
    output = str(tmp_path / "image.json")
    assert push("--target", "serve-cpu", "--repository", "indexed", "--output", output, env=aws.env()).returncode == 0
    body, headers = registry.request("GET", f"indexed/manifests/{tag}", Accept=SCHEMA_2)
    index_type = "application/vnd.oci.image.index.v1+json"
    manifest = {
        "mediaType": SCHEMA_2, "digest": headers["Docker-Content-Digest"], "size": len(body),
        "platform": {"os": "linux", "architecture": "amd64"},
    }  # fmt: skip
    index = {"schemaVersion": 2, "mediaType": index_type, "manifests": [manifest]}
    _, put = registry.request("PUT", f"indexed/manifests/{tag}", json.dumps(index).encode(), Content_Type=index_type)
    arguments = ["--target", "serve-cpu", "--repository", "indexed", "--output", output]
    said = sentence(push(*arguments, env=aws.env()))
    assert f"The pushed manifest is {index_type}" in said
    remove = f"aws ecr batch-delete-image --region {REGION} --repository-name indexed --image-ids imageTag={tag}"
    assert f"first remove what has it, '{remove}'." in said
    registry.request("DELETE", f"indexed/manifests/{put['Docker-Content-Digest']}")  # as told; moto has not this image
    after = push(*arguments, env=aws.env())
    assert after.returncode == 0, after.stderr
    assert "is there already" not in after.stderr


@pytest.mark.container
def test_an_image_for_other_processors_is_refused_before_it_is_sent(engine: None, aws: Aws, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    docker("build", "--platform", "linux/arm64", "--tag", "contract-arm", str(tmp_path))
    try:
        said = sentence(push("--image", "contract-arm", env=aws.env()))
    finally:
        docker("rmi", "contract-arm")
    assert "contract-arm is for linux/arm64, SageMaker's instances are linux/amd64" in said


@pytest.mark.container
def test_a_registry_whose_certificate_nobody_signed_is_one_sentence(
    registry: Registry, aws: Aws, image: Callable[[str], str], tmp_path: Path
) -> None:
    image("serve-cpu")
    said = sentence(push("--target", "serve-cpu", "--output", str(tmp_path / "x"), env=aws.env(
        SSL_CERT_FILE="/etc/ssl/certs/ca-certificates.crt")))  # fmt: skip
    assert "The registry does not answer" in said


@pytest.mark.container
def test_a_password_the_registry_does_not_take_is_one_sentence(
    registry: Registry, aws: Aws, image: Callable[[str], str], tmp_path: Path
) -> None:
    """As when a token is over: the registry now knows the user AWS by another password than moto's."""
    image("serve-cpu")
    before = registry.passwords.read_text()
    registry.passwords.write_text(f"AWS:{HASH[:-1]}n\n")
    try:
        said = sentence(push("--target", "serve-cpu", "--output", str(tmp_path / "x"), env=aws.env()))
    finally:
        registry.passwords.write_text(before)
        registry.request("GET", "")  # it has read them again
    assert re.search(r"The registry refused https://\S+ \(401\)", said)
    assert PASSWORD not in said


@pytest.mark.parametrize(
    ("region", "partition"), [("eu-central-1", "aws"), ("cn-north-1", "aws-cn"), ("us-gov-west-1", "aws-us-gov")]
)
def test_the_policy_names_things_as_the_region_does(region: str, partition: str) -> None:
    statements = json.loads(policy("111122223333", region, "pets"))["Statement"]
    assert statements[1]["Resource"] == f"arn:{partition}:ecr:{region}:111122223333:repository/pets"
