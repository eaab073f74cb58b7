"""What is in the images and what is not: sizes, layers, labels, packages, leftovers, secrets; how fast a rebuild is."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from container.build import ROOT, TARGETS, build, media_types, version
from container.content import REVISION_LABEL, content_hash
from container.engine import docker
from container.running import LABEL
from container.slim import KEPT
from tests.container.conftest import run

pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

Image = Callable[[str], str]
Inside = Callable[..., str]
Layers = Callable[[str], list[tuple[str, int]]]
Tell = Callable[[str], None]

REBUILD_LIMIT_S = 15
BUILD_TOOL = re.compile(r"^(gcc|g\+\+|cpp|clang|binutils|make|git|curl|wget|build-essential|.*-dev)\b|-(venv|pip)$")
GROUPS = {"serve-cpu": ["tracing"], "serve": ["torch", "tracing"], "train": ["training", "debugger", "mlflow"]}
LEFT_OUT = {"triton", "openvino-telemetry"}
PINNED_BASE = {"serve": "CUDA_BASE_IMAGE", "serve-cpu": "CPU_BASE_IMAGE", "train": "CUDA_BASE_IMAGE"}
SECRET = (
    r"\b(AKIA|ASIA)[0-9A-Z]{12}([0-9A-LN-Z][0-9A-Z]{3}|M[0-9A-OQ-Z][0-9A-Z]{2})\b"  # AWS's documents have ...EXAMPLE
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----$|aws_secret_access_key *= *[A-Za-z0-9/+]{40}|xox[bp]-[0-9]|ghp_\w{36}"
)
EXAMPLE = "AKIA" + "Z7Q2" * 4
SEARCHED = ("/opt", "/root", "/etc", "/usr", "/var", "/tmp", "/home", "/srv", "/run")
"""All that a build could write to; /opt with what is installed."""


def config_of(image: str) -> dict[str, object]:
    inspected = json.loads(docker("image", "inspect", image))[0]
    return {
        **inspected["Config"],
        "Id": inspected["Id"],
        "Size": inspected["Size"],
        "Layers": inspected["RootFS"]["Layers"],
    }


def base_of(target: str, base_image: str) -> str:
    found = re.search(rf"^ARG {PINNED_BASE[target]}=(\S+)", (ROOT / "container" / "Dockerfile").read_text(), re.M)
    assert found
    return base_image or found[1]


@pytest.mark.parametrize("target", TARGETS)
def test_the_sizes(target: str, image: Image, layers: Layers, base_image: str, tell: Tell) -> None:
    name = image(target)
    total, base = (int(str(config_of(each)["Size"])) for each in (name, base_of(target, base_image)))
    tell(f"{target}: {total / 1e6:.0f} MB, {(total - base) / 1e6:.0f} MB above {base_of(target, base_image)}")
    for made_by, size in layers(name):
        if size > 1e5:
            tell(f"    {size / 1e6:8.1f} MB  {made_by[:90]}")
    limit = {"serve-cpu": 450e6, "serve": 4.3e9, "train": 5.2e9}[target]
    assert total - base <= limit


@pytest.mark.parametrize("target", TARGETS)
def test_the_table_of_what_fills_an_image_is_true(target: str, image: Image, layers: Layers) -> None:
    """Within 5 % or 0.2 MB; the distribution's upgrades are those of a day, and so not compared."""
    lines = (ROOT / "ARCHITECTURE.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    column = ("serve-cpu", "serve", "train").index(target) + 1
    for row_of, folder in (("`/opt/cuda`", "/opt/cuda"), ("`/opt/venv`", "/opt/venv"), ("our code", "/opt/program")):
        (row,) = (row for row in rows if row[0].startswith(row_of))
        mb = sum(size for made_by, size in layers(image(target)) if f"COPY {folder} {folder}" in made_by) / 1e6
        assert mb == pytest.approx(float(row[column].replace(",", "") or 0), rel=0.05, abs=0.2), row[0]


def test_serve_and_train_share_the_layer_of_cuda(image: Image, layers: Layers) -> None:
    serve, train = (config_of(image(target))["Layers"] for target in ("serve", "train"))
    assert isinstance(serve, list)
    assert isinstance(train, list)
    shared = sum(1 for one, other in zip(serve, train, strict=False) if one == other)
    large = next(size for made_by, size in layers(image("serve")) if "/opt/cuda" in made_by)
    assert large > 3e9
    others = sum(size for made_by, size in layers(image("train")) if "/opt/cuda" not in made_by)
    assert shared >= 2, "the base and the layer of CUDA come first in both"
    assert others < large


@pytest.mark.parametrize("target", TARGETS)
def test_the_labels_and_the_start(target: str, image: Image) -> None:
    config = config_of(image(target))
    labels = config["Labels"]
    assert isinstance(labels, dict)
    assert labels["org.opencontainers.image.version"] == version()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", labels["org.opencontainers.image.revision"])
    assert labels["org.opencontainers.image.source"]
    assert "@" not in labels["org.opencontainers.image.source"]
    binds = labels.get("com.amazonaws.sagemaker.capabilities.accept-bind-to-port")
    assert binds == (None if target == "train" else "true")
    cuda = labels.get("com.amazonaws.sagemaker.inference.cuda.verified_versions")
    assert cuda == (None if target == "serve-cpu" else "13.0")
    assert labels["resnet34.target"] == target
    assert config["Entrypoint"] == ["/opt/venv/bin/python", "-m", "container.entry"]
    assert config["User"] in ("", "root")


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_the_build_is_left(target: str, image: Image, inside: Inside, base_image: str) -> None:
    name = image(target)
    assert inside(name, "ls /build /opt/uv /root/.cache /root/.config 2>/dev/null; true") == ""
    assert inside(name, "find / -xdev -name .git -o -xdev -name '.env' -o -xdev -name uv.lock") == ""
    assert (
        inside(name, "find /opt/program -name 'test*' -o -name '*.md' -o -name '*.ipynb' -o -name data -type f") == ""
    )
    assert inside(name, "ls -A /tmp /var/lib/apt/lists /var/cache/apt") .replace("/tmp:", "").strip().splitlines() in (
        [], ["/var/cache/apt:", "", "/var/lib/apt/lists:"], ["/var/cache/apt:", "", "/var/lib/apt/lists:", ""],
    )  # fmt: skip
    programs = "uv gcc cc c++ g++ cpp ld as make git curl wget"
    assert inside(name, f"for program in {programs}; do command -v $program; done; true") == ""
    packages, of_base = (
        set(inside(each, "dpkg-query --show --showformat '${Package}\\n'").split())
        for each in (name, base_of(target, base_image))
    )
    assert not [each for each in packages - of_base if BUILD_TOOL.search(each)]
    in_venv = inside(name, "ls /opt/venv/lib/python3*/site-packages")
    assert "pip" not in in_venv.split()
    assert inside(name, "find /opt/venv/lib/python3*/site-packages/service 2>/dev/null; true") == ""
    named = ["-path '*/test/*'", "-path '*/tests/*'"]
    for module in ("test_*", "*_test", "conftest"):
        named += [f"-name '{module}.py'", f"-name '{module}.cpython-*.pyc'"]
    found = inside(name, f"find /opt/venv/lib /opt/cuda -type f '(' {' -o '.join(named)} ')' 2>/dev/null; true")
    # Bytecode as its module; licences of what was built in lie in such folders.
    modules = {re.sub(r"__pycache__/([^/.]+)[^/]*pyc$", r"\1.py", each) for each in found.split()}
    tests = {re.sub(r".*/site-packages/|/opt/cuda/", "", each) for each in modules if ".dist-info/" not in each}
    assert tests == {each for each in KEPT if each.partition("/")[0] in in_venv.split()}


@pytest.mark.parametrize("target", TARGETS)
def test_the_driver_is_the_hosts(target: str, image: Image, inside: Inside) -> None:
    """The container toolkit mounts it, where these variables ask for it (docs.nvidia.com, container toolkit)."""
    variables = config_of(image(target))["Env"]
    assert isinstance(variables, list)
    asked = dict(each.partition("=")[::2] for each in variables if each.startswith("NVIDIA_"))
    if target == "serve-cpu":
        assert asked["NVIDIA_VISIBLE_DEVICES"] == "void"
    else:
        assert asked["NVIDIA_VISIBLE_DEVICES"] == "all"
        assert asked["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    found = inside(
        image(target), "find / -xdev \\( -name 'libcuda.so*' -o -name 'libnvidia-ml.so*' \\) 2>/dev/null; true"
    )
    assert [each for each in found.split() if "/compat/" not in each and "/stubs/" not in each] == []


def test_serving_images_hold_what_serves_and_no_more(image: Image, inside: Inside) -> None:
    for target in ("serve", "serve-cpu"):
        assert inside(image(target), "ls /opt/program").split() == ["container", "service"]
    packages = inside(image("serve-cpu"), "ls /opt/venv/lib/python3*/site-packages").split()
    assert not {"torch", "torchvision", "nvidia", "triton", "matplotlib", "optuna", "boto3"} & set(packages)
    packages = inside(image("serve"), "ls /opt/venv/lib/python3*/site-packages").split()
    assert {"torch", "nvidia", "openvino"} <= set(packages)
    assert not {"triton", "smdebug", "matplotlib", "optuna"} & set(packages)
    assert {"smdebug", "torch", "nncf"} <= set(
        inside(image("train"), "ls /opt/venv/lib/python3*/site-packages").split()
    )


BYTECODE = """
import ast, importlib.util, pathlib, sys
count = 0
for path in (path for root in sys.argv[1:] for path in pathlib.Path(root).rglob("*.py")):
    compiled = pathlib.Path(importlib.util.cache_from_source(path))
    if not compiled.is_file():
        try:
            ast.parse(path.read_bytes())
        except SyntaxError:  # of a later Python
            continue
        print("without bytecode:", path)
    elif compiled.read_bytes()[4:8] != bytes([1, 0, 0, 0]):  # PEP 552
        print("not by an unchecked hash:", compiled)
    count += 1
for compiled in (path for root in sys.argv[1:] for path in pathlib.Path(root).rglob("*.pyc")):
    if not (compiled.parent.parent / (compiled.name.partition(".cpython-")[0] + ".py")).is_file():
        print("without its source:", compiled)
print(count)
"""


@pytest.mark.parametrize("target", TARGETS)
def test_all_code_is_compiled_since_nothing_can_be_written_later(target: str, image: Image, inside: Inside) -> None:
    folders = "/opt/program /opt/venv/lib/python3* " + ("" if target == "serve-cpu" else "/opt/cuda")
    *wrong, count = inside(image(target), f"/opt/venv/bin/python -c '{BYTECODE}' {folders}").splitlines()
    assert not wrong
    assert int(count) > {"serve-cpu": 800, "serve": 2000, "train": 4000}[target]


@pytest.mark.parametrize("target", TARGETS)
def test_no_secret_is_inside(target: str, image: Image, inside: Inside) -> None:
    """Nor would one be missed: what is put into a container of the image is found where it is looked for."""
    name = image(target)
    search = f"grep -rIlE '{SECRET}' {' '.join(SEARCHED)} 2>/dev/null"
    planted = [f"{folder.split()[0]}/planted" for folder in SEARCHED]
    script = f"{search}; echo then; for file in {' '.join(planted)}; do echo {EXAMPLE} > $file; done; {search}"
    there, _, found = inside(name, script).partition("then\n")
    assert there == ""
    assert sorted(found.split()) == sorted(planted)
    variables = config_of(name)["Env"]
    assert isinstance(variables, list)
    assert not [each for each in variables if re.search(r"token|secret|passw|credential", each, re.IGNORECASE)]


@pytest.mark.parametrize("target", TARGETS)
def test_the_history_is_clean(target: str, image: Image, layers: Layers) -> None:
    for made_by, _ in layers(image(target)):
        assert not re.search(r"token|secret|passw|://[^/ ]*@|\bADD http", made_by, re.IGNORECASE), made_by


def locked(target: str, python: str) -> set[str]:
    """What uv.lock has of the target's groups for that Python on Linux, without what the Dockerfile leaves out."""
    command = [uv(), "export", "--frozen", "--no-default-groups", "--no-hashes", "--no-annotate", "--no-header"]
    groups = [word for group in GROUPS[target] for word in ("--group", group)]
    exported = run(*command, *groups, cwd=ROOT)
    assert exported.returncode == 0, exported.stderr
    machine = {"python_version": ".".join(python.split(".")[:2]), "python_full_version": python}
    wanted = [Requirement(line) for line in exported.stdout.splitlines()]
    return {
        normal(f"{each.name}{each.specifier}") for each in wanted
        if each.name not in LEFT_OUT and (each.marker is None or each.marker.evaluate(machine))
    }  # fmt: skip


def normal(package: str) -> str:
    """`name==version` with the name as PEP 503 has it."""
    name, _, number = package.partition("==")
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={number}"


def uv() -> str:
    return os.environ.get("UV") or shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")


@pytest.mark.parametrize("target", TARGETS)
def test_the_packages_inside_are_the_locked_ones_and_none_has_a_known_vulnerability(
    target: str, image: Image, inside: Inside, tell: Tell, tmp_path: Path
) -> None:
    code = "import importlib.metadata as m; [print(f'{d.name}=={d.version}') for d in m.distributions()]"
    there = inside(image(target), f'/opt/venv/bin/python -c "{code}"').split()
    python = inside(
        image(target), "/opt/venv/bin/python -c 'import platform; print(platform.python_version())'"
    ).strip()
    assert {normal(each) for each in there} == locked(target, python)
    audit = ROOT / ".ci" / "audit.py"
    if not audit.is_file():
        pytest.skip("all packages are the locked ones; this tree has no .ci/audit.py to ask about vulnerabilities")
    (tmp_path / "requirements.txt").write_text("\n".join(there))
    result = run(sys.executable, str(audit), "--requirements", str(tmp_path / "requirements.txt"), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    tell(f"{target}: {result.stdout.strip()}")


@pytest.mark.parametrize("target", TARGETS)
def test_no_package_of_the_distribution_waits_for_a_security_upgrade(target: str, image: Image) -> None:
    script = "apt-get update --quiet >/dev/null 2>&1 || exit 9; apt-get --simulate upgrade"
    result = run("docker", "run", "--rm", "--label", LABEL, "--entrypoint", "sh", image(target), "-c", script)
    if result.returncode == 9:
        pytest.skip("the distribution's mirror cannot be reached from a container")
    assert result.returncode == 0, result.stderr
    waiting = [line for line in result.stdout.splitlines() if line.startswith("Inst ") and "security" in line.lower()]
    assert not waiting, f"build again with `make image TARGET={target} FRESH=1`: {waiting}"


@pytest.mark.slow  # builds all of it anew
def test_the_same_content_has_the_same_tag_and_other_content_another(
    image: Image, base_image: str, tmp_path: Path
) -> None:
    """Everything built anew, from the mirrors on: other times, other layers, another image, the same tag."""
    packages = "dpkg-query --show"

    def of(name: str) -> tuple[str, str, str]:
        listed = docker("run", "--rm", "--label", LABEL, "--entrypoint", "sh", name, "-c", packages)
        return str(config_of(name)["Id"]), listed, content_hash(name)

    names = ["contract-again", "contract-third", "contract-changed"]
    try:
        first = of(image("serve-cpu"))
        second = of(build("serve-cpu", names[0], base_image, fresh=True))
        if second[1] != first[1]:  # the distribution has upgraded something since the first was built
            first, second = second, of(build("serve-cpu", names[1], base_image, fresh=True))
        assert second[0] != first[0]
        assert second[2] == first[2]
        (tmp_path / "Dockerfile").write_text(f"FROM {names[0]}\nRUN chmod 700 /opt/program/service/classifier.py\n")
        docker("build", "--tag", names[2], str(tmp_path))
        assert content_hash(names[2]) != second[2]
        (tmp_path / "Dockerfile").write_text(f"FROM {names[0]}\nENV CLASSIFIER_PAGE=false\n")
        docker("build", "--tag", names[2], str(tmp_path))
        assert content_hash(names[2]) != second[2]
        (tmp_path / "Dockerfile").write_text(
            f"FROM {names[0]}\nLABEL {REVISION_LABEL}=another\nRUN touch /opt/program\n"
        )
        docker("build", "--tag", names[2], str(tmp_path))
        assert content_hash(names[2]) == second[2]
    finally:
        for name in names:
            run("docker", "rmi", "--force", name)


def test_what_serving_needs_of_cuda_is_there(image: Image, inside: Inside) -> None:
    """Without a GPU: torch and the CUDA engine load, and nothing a kept library is linked against was taken away."""
    code = "import torch, torchvision, service.engines.cuda; print(torch.version.cuda)"
    assert inside(image("serve"), f'python -c "{code}"') == "13.0\n"
    script = "find -L /opt/cuda -name '*.so*' -type f | xargs ldd 2>/dev/null | grep 'not found' | cut -d= -f1"
    missing = set(inside(image("serve"), script).split())
    taken = {"libcusolverMg.so.12", "libnvblas.so.13", "libcufftw.so.12", "libnvrtc.alt.so.13"}
    assert not missing & taken
    assert not {name for name in missing if re.match(r"libcu(dnn|blas|fft|rand|solver|sparse|pti)|libnv|libnccl", name)}


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_code_rebuilds_no_dependencies(
    target: str, image: Image, base_image: str, tmp_path: Path, tell: Tell
) -> None:
    """Within 15 s, the better of two: this machine may be busy."""
    image(target)
    for name in ("service", "training", "container"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "uv.lock", ".dockerignore"):
        shutil.copy(ROOT / name, tmp_path)
    tag = f"resnet34-sagemaker:changed-{target}"
    command = ["build", "--file", str(tmp_path / "container" / "Dockerfile"), "--target", target, "--tag", tag]
    command += ["--build-arg", f"BASE_IMAGE={base_image}", str(tmp_path)]
    docker(*command)  # of the layers that are kept now: another test builds all anew
    before = config_of(tag)["Layers"]
    changed = tmp_path / "service" / "classifier.py"
    taken: list[float] = []
    while len(taken) < 2 and min(taken, default=math.inf) > REBUILD_LIMIT_S:
        changed.write_text(changed.read_text() + f"\nCHANGED_AT = {time.time()}\n")
        started_s = time.monotonic()
        docker(*command)
        taken.append(time.monotonic() - started_s)
    tell(f"{target}: rebuilt after a change of code in {', '.join(f'{each:.1f}' for each in taken)} s")
    after = config_of(tag)["Layers"]
    docker("rmi", tag)
    assert isinstance(before, list)
    assert isinstance(after, list)
    same = sum(1 for one, other in zip(before, after, strict=True) if one == other)
    assert same >= len(before) - 3  # scripts, code, model folder
    assert before != after
    assert min(taken) <= REBUILD_LIMIT_S


def test_buildx_makes_the_same_layers_of_it(
    base_image: str, plugins: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder of Docker 23 and later, with the flags it is given there."""
    tags = ["resnet34-sagemaker:by-docker", "resnet34-sagemaker:by-buildx"]
    build("serve-cpu", tags[0], base_image)  # of the layers that are kept now: another test builds all anew
    for name, value in plugins.items():
        monkeypatch.setenv(name, value)
    assert media_types(tags[1])[:2] == ["--provenance=false", "--sbom=false"]
    build("serve-cpu", tags[1], base_image)
    built, made = (config_of(tag) for tag in tags)
    for tag in tags:
        docker("rmi", "--no-prune", tag)
    for fact in ("Layers", "Labels", "Env", "Entrypoint", "Cmd", "Healthcheck"):
        assert made[fact] == built[fact]


def test_the_build_says_what_is_wrong_in_a_sentence(base_image: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "container.build", "--target", "serve-cpu", "--tag", "Not A Tag"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 1
    assert "invalid" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
