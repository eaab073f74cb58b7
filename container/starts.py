"""SageMaker's rules for hosting that take a start of their own: confined, on another port, or one that must fail.

Each looks and says what it saw, as those of a running service in `container.rules` do.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from container.engine import ContainerError
from container.rules import BIND_LABEL, STARTUP_LIMIT_S, Result, Subject, labels_of, start, works_at_once
from container.running import isolated_network, running, telling_line

OTHER_PORT = 9217
SERVERLESS_MIB, SERVERLESS_START_S = 6144, 180


def _confined(subject: Subject, _: str) -> Result:
    """Ours: as compose runs it, and as an endpoint with network isolation does; /tmp is docker's own, without exec."""
    with (
        isolated_network() as network,
        running(
            subject.image, model=subject.model, network=network, environment=subject.environment,
            options=subject.options,
        ) as service,
    ):  # fmt: skip
        ready_s = service.wait_until_ready(STARTUP_LIMIT_S)[0]
        ok, said = works_at_once(service, subject)
    without = "" if network else ", with network, as this machine reaches containers over a port alone"
    return ok, f"/ping 200 after {ready_s:.1f} s, /invocations {said}{without}"


def _fits_serverless(subject: Subject, _: str) -> Result:
    """Serverless inference: memory of 1 to 6 GB, 3 minutes to start, a payload of 4 MB, a minute for a request.

    https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints.html
    """
    memory = f"{SERVERLESS_MIB}m"
    limits = (*subject.options, "--memory", memory, "--memory-swap", memory)  # without swap
    with start(replace(subject, options=limits)) as service:
        ready_s = service.wait_until_ready(SERVERLESS_START_S)[0]
        ok, said = works_at_once(service, subject)
    return ok, f"/ping 200 after {ready_s:.1f} s with {SERVERLESS_MIB} MiB, /invocations {said}"


def _binds_to_port(subject: Subject, _: str) -> Result:
    label = labels_of(subject.image).get(BIND_LABEL) == "true"
    with start(subject, port=OTHER_PORT, SAGEMAKER_BIND_TO_PORT=str(OTHER_PORT)) as service:
        ready_s = service.wait_until_ready(STARTUP_LIMIT_S if label else subject.patience_s)[0]
    told = "the label says so" if label else f"the label {BIND_LABEL} is not set"
    return label, f"/ping 200 on port {OTHER_PORT} after {ready_s:.1f} s, {told}"


def _missing_model(subject: Subject, usual: str) -> Result:
    with tempfile.TemporaryDirectory() as empty:
        Path(empty).chmod(0o755)
        return _refused(subject, Path(empty), ("serve",), usual)


def _corrupt_model(subject: Subject, usual: str) -> Result:
    """The largest file with one byte turned."""
    with tempfile.TemporaryDirectory() as folder:
        broken = shutil.copytree(subject.model, Path(folder) / "model")
        Path(folder).chmod(0o755)
        largest = max((path for path in broken.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 0xFF
        largest.write_bytes(content)
        return _refused(subject, broken, ("serve",), usual)


def _unknown_command(subject: Subject, usual: str) -> Result:
    try:
        return _refused(subject, subject.model, ("sevre",), usual)
    except ContainerError as exc:
        if "executable file not found" not in str(exc):
            raise
        return True, str(exc)  # docker refuses where there is no ENTRYPOINT


def _refused(subject: Subject, model: Path, command: Sequence[str], usual: str) -> Result:
    """A start that must end by itself, with a code other than 0 and words that a good start, `usual`, does not say."""
    with start(subject, command, model) as container:
        code = container.wait_for_exit(subject.patience_s)
        if code is None:
            return False, f"it still runs after {subject.patience_s:.0f} s"
        said = container.log()
    why = unusual(said, usual)
    if not why:
        return False, f"exit code {code}, and nothing that a good start does not say too: {telling_line(said)}"
    return code != 0, f"exit code {code}: {telling_line(why)}"


def unusual(said: str, usual: str) -> str:
    """The lines of a log that another does not have; words with a digit (times, ports, names) make no difference."""
    known = {_words(line) for line in usual.splitlines()}
    return "\n".join(line for line in said.splitlines() if _words(line) not in known | {()})


def _words(line: str) -> tuple[str, ...]:
    return tuple(re.sub(r"[\w.:+-]*\d[\w.:+-]*", "0", line).split())


OF_OTHER_STARTS: dict[str, Callable[[Subject, str], Result]] = {
    "it also runs with a read-only root and without network (recommended)": _confined,
    "it starts within what serverless inference gives, 3 minutes and 6144 MB (recommended)": _fits_serverless,
    "it listens on SAGEMAKER_BIND_TO_PORT, and has the label (recommended)": _binds_to_port,
    "a missing model ends the start, and it says why (recommended)": _missing_model,
    "a damaged model ends the start, and it says why (recommended)": _corrupt_model,
    "a command it does not know is refused, and it says so (recommended)": _unknown_command,
}  # fmt: skip
"""Each with what the good start logged."""
