"""The images in use beyond the contract: health, other ports and users, no HOME, a training and what comes of it."""

import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from container.engine import ContainerError, docker
from container.running import LABEL, running
from service.model.artifact import open_artifact

pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

Image = Callable[[str], str]
START_S, START_PROCESSOR_S = 3, 20
"""Of serve-cpu: what is wanted by the clock, and what it may compute on any machine: 10 s were seen where two cores had
a load of 19 (one run)."""


def health(name: str) -> str:
    return docker("inspect", "--format", "{{.State.Health.Status}}", name).strip()


def top_label(container: object, model: Path) -> str:
    artifact = open_artifact(model)
    answer = container.ask(  # type: ignore[attr-defined]
        "POST", "/invocations", artifact.read("example"), Content_Type=artifact.manifest.example.media_type
    )
    assert answer.status == 200, answer.body
    return str(json.loads(answer.body)["predictions"][0]["label"])


@pytest.mark.parametrize("target", ["serve-cpu", "serve"])
def test_docker_sees_its_health_without_network_and_home(target: str, image: Image, model: Path) -> None:
    environment = {"HOME": "", "LOGNAME": ""}
    started_s = time.monotonic()
    name, options = image(target), ("--health-interval=1s",)
    with running(name, model=model, environment=environment, options=options, network="none") as container:
        while health(container.name) != "healthy":
            assert container.exit_code() is None, container.log()
            assert time.monotonic() - started_s < 120, container.log()
            time.sleep(0.2)
        log = container.log()
        assert "Traceback" not in log
        assert "engines: " in log.splitlines()[0]
        container.signal("SIGTERM")
        assert container.wait_for_exit(30) == 0


def processor_s(name: str) -> float:
    """What a container has computed so far, by its control group (the kernel's admin-guide, cgroup-v1, cgroup-v2)."""
    script = "cat /sys/fs/cgroup/cpuacct/cpuacct.usage 2> /dev/null || cat /sys/fs/cgroup/cpu.stat"
    words = docker("exec", name, "sh", "-c", script).split()
    return int(words[0]) / 1e9 if words[0].isdigit() else int(words[words.index("usage_usec") + 1]) / 1e6


@pytest.mark.parametrize("target", ["serve-cpu", "serve"])
def test_from_start_to_the_first_ping(
    target: str, image: Image, model: Path, tell: Callable[[str], None]
) -> None:  # fmt: skip
    """`docker run` returns when the container has been started. What serve-cpu computes until then is bounded; by the
    clock it is told, median of three against what is wanted, as machines differ.
    """
    taken, computed = list[float](), list[float]()
    name, cores = image(target), os.cpu_count() or 1
    gives_up_s = time.monotonic() + 60
    while target == "serve-cpu" and os.getloadavg()[0] > cores and time.monotonic() < gives_up_s:
        time.sleep(1)  # a build that has just ended
    for _ in range(3):
        started_s = time.monotonic()
        with running(name, model=model) as container:
            container.wait_until_ready(300)
            taken.append(time.monotonic() - started_s)
            computed.append(processor_s(container.name))
    load = os.getloadavg()[0]
    said = (
        f"{target}: /ping 200 after {', '.join(f'{each:.1f}' for each in taken)} s, docker run included, and "
        f"{', '.join(f'{each:.1f}' for each in computed)} s of processor time (load {load:.1f} on {cores} cores)"
    )
    if target != "serve-cpu":
        tell(said)
        return
    kept = "held" if statistics.median(taken) <= START_S else "missed"
    tell(f"{said}; wanted {START_S} s: {kept}")
    assert min(computed) <= START_PROCESSOR_S, said


@pytest.mark.parametrize(("target", "command"), [("serve-cpu", "serve"), ("train", "train")])
def test_a_stop_that_comes_while_it_starts_is_heard(
    target: str, command: str, image: Image, model: Path, sample_root: Path
) -> None:
    """The kernel keeps from a container's first process what it has no handler for: the word would be lost."""
    sample_root.chmod(0o755)
    options = ("--volume", f"{sample_root}:/data:ro")
    flags = () if command == "serve" else ("--data", "/data", "--output", "/tmp/model", "--weights", "none")
    for delay_s in (0, 0.3, 0.6, 1.0):
        with running(image(target), (command, *flags), model=model, options=options) as container:
            while not container.log():  # the entry point's own line
                time.sleep(0.02)
            time.sleep(delay_s)
            container.signal("SIGTERM")
            assert container.wait_for_exit(20) in (0, 143), (delay_s, container.log())


def test_with_a_gpu_it_answers_from_there(image: Image, model: Path, base_image: str) -> None:
    """Skipped where docker has none to give, as everywhere this was built."""
    try:
        docker("run", "--rm", "--label", LABEL, "--gpus=all", "--entrypoint=true", base_image or image("serve"))
    except ContainerError as exc:
        pytest.skip(f"no GPU for containers here: {exc}")
    with running(image("serve"), model=model, options=("--gpus=all",)) as container:
        container.wait_until_ready(300)
        first, *lines = container.log().splitlines()
        assert re.search(r"NVIDIA driver \S+ (fits CUDA|is too old .* bridges that)", first)
        assert any("torch-cuda" in line for line in lines), container.log()
        assert top_label(container, model) in open_artifact(model).manifest.classes


def test_flags_go_to_the_service_and_the_healthcheck_follows(image: Image, model: Path) -> None:
    options = ("--health-interval=1s",)
    command = ("serve", "--port", "9000")
    with running(image("serve-cpu"), command, model=model, port=9000, options=options) as container:
        container.wait_until_ready(120)
        top_label(container, model)
        for _ in range(100):
            if health(container.name) == "healthy":
                break
            time.sleep(0.2)
        assert health(container.name) == "healthy"


def test_another_user_and_no_capability_will_do(image: Image, model: Path) -> None:
    options = ("--user=1000:1000", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--pids-limit=256")
    with running(image("serve-cpu"), model=model, options=options) as container:
        container.wait_until_ready(120)
        top_label(container, model)


def test_cores_and_memory_of_the_container_are_those_that_count(image: Image, model: Path) -> None:
    with running(image("serve-cpu"), model=model, options=("--cpus=1", "--memory=2g")) as container:
        container.wait_until_ready(120)
        assert "on 1 core\n" in container.log()
    with running(image("serve-cpu"), model=model, options=("--cpus=2", "--memory=1g")) as container:
        container.wait_until_ready(120)
        assert "layout: 1 worker, " in container.log()  # by its cores they would be two, of 32 px


@pytest.mark.parametrize(
    ("target", "command", "said"),
    [
        ("serve-cpu", "train", "This image cannot train; it understands: serve."),
        ("serve", "train", "This image cannot train; it understands: serve."),
        ("train", "sevre", "it understands: serve, train."),
    ],
)
def test_a_command_the_image_does_not_have_is_refused(target: str, command: str, said: str, image: Image) -> None:
    with running(image(target), (command,)) as container:
        assert container.wait_for_exit(30) == 2
        assert said in container.log()
        assert container.log().count("\n") == 1


def test_serve_and_train_are_programs_on_the_path(image: Image) -> None:
    for target, program in (("serve-cpu", "serve"), ("serve", "serve"), ("train", "train"), ("train", "serve")):
        docker("run", "--rm", "--label", LABEL, "--entrypoint", program, image(target), "--help")


def test_what_a_container_wrote_can_be_tidied_up_as_awss_sdk_does(image: Image, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir(mode=0o700)
    docker(
        "run", "--rm", "--label", LABEL, "-v", f"{tmp_path}:/delete", image("train"), "chmod", "-R", "777", "/delete"
    )
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o777


def write_job(root: Path, sample_root: Path, **hyperparameters: str) -> Path:
    """What SageMaker mounts at /opt/ml of a training job (its plain files, no toolkit)."""
    config = root / "input" / "config"
    config.mkdir(parents=True)
    (config / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    (config / "resourceconfig.json").write_text(json.dumps({"current_host": "algo-1", "hosts": ["algo-1"]}))
    (config / "inputdataconfig.json").write_text(json.dumps({"training": {"TrainingInputMode": "File"}}))
    shutil.copytree(sample_root, root / "input" / "data" / "training")
    for folder in ("model", "output/data", "checkpoints"):
        (root / folder).mkdir(parents=True)
    return root


def train(image: str, root: Path, *options: str) -> str:
    """Run the job to its end. Returns: its log. Raises: ContainerError when it failed."""
    flags = ["--rm", "--label", LABEL, "--network", "none", "--volume", f"{root}:/opt/ml", *options]
    return docker("run", *flags, image, "train", show=True)  # both streams


def test_what_train_makes_of_a_channel_serve_serves(image: Image, sample_root: Path, tmp_path: Path) -> None:
    """Read-only root, without network, settings quoted as the SDK quotes them, with smdebug and int8."""
    tmp_path.chmod(0o755)
    root = write_job(
        tmp_path / "ml", sample_root, epochs='"1"', batch_size="50", weights="none", freeze="none", model_name="job",
        quantize="on", debugger="on",
    )  # fmt: skip
    log = train(image("train"), root, "--read-only", "--tmpfs", "/tmp")
    assert "smdebug: tensors go to /opt/ml/output/data/tensors" in log
    assert (root / "output" / "data" / "report.html").is_file()
    assert not (root / "output" / "failure").exists()
    model = root / "model"
    assert open_artifact(model).manifest.quantization is not None
    for target in ("serve-cpu", "serve"):
        with running(image(target), model=model) as container:
            container.wait_until_ready(120)
            assert top_label(container, model) in open_artifact(model).manifest.classes
            assert "model job version" in container.log()


def test_frozen_blocks_are_cached_where_the_root_is_read_only(image: Image, sample_root: Path, tmp_path: Path) -> None:
    root = write_job(
        tmp_path / "ml", sample_root, epochs="1", batch_size="50", weights="none", freeze="stem,layer1,layer2,layer3",
        quantize="off", report="false",
    )  # fmt: skip
    log = train(image("train"), root, "--read-only", "--tmpfs", "/tmp")
    assert "artifacts/features" in log
    assert "Traceback" not in log


def test_a_failed_training_leaves_the_reason_where_sagemaker_looks(
    image: Image, sample_root: Path, tmp_path: Path
) -> None:
    root = write_job(tmp_path / "ml", sample_root, epochs="many")
    with pytest.raises(ContainerError):
        train(image("train"), root)
    assert "epochs" in (root / "output" / "failure").read_text()
