"""What an image consists of, as one hash: every file's path, kind, mode, owner and bytes, and how a container starts.

The image's own ID also says when each layer was made and from which commit, so two builds of one content differ in it
(docs.docker.com/build/ci/github-actions/reproducible-builds; BuildKit before 0.13 cannot rewrite times). Here neither
counts. The Dockerfile does its part: no caches, bytecode by hash and not by time.
"""

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from container.engine import ContainerError, docker, explain

REVISION_LABEL = "org.opencontainers.image.revision"
OF_THE_ENGINE = (".dockerenv", "dev", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf")
"""What the engine puts into every container that it makes."""
OF_THE_START = (
    "Cmd", "Entrypoint", "Env", "ExposedPorts", "Healthcheck", "StopSignal", "User", "Volumes", "WorkingDir"
)  # fmt: skip
"""What of an image's configuration says how a container starts."""
_CHUNK_BYTES = 1 << 20


def content_hash(image: str) -> str:
    """SHA-256 of a local image's content, in hex; 15 s for 4 GB. Raises: ContainerError."""
    inspected: dict[str, Any] = json.loads(docker("image", "inspect", image))[0]
    config = inspected["Config"]
    labels = {name: value for name, value in (config.get("Labels") or {}).items() if name != REVISION_LABEL}
    start = {name: config.get(name) for name in OF_THE_START}
    facts = {"os": inspected["Os"], "architecture": inspected["Architecture"], "labels": labels, "start": start}
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for line in sorted(files(image)):
        total.update(line.encode(errors="surrogateescape"))
    return total.hexdigest()


def files(image: str) -> Iterator[str]:
    """A line for each file, folder and link of the image, in the engine's order. Raises: ContainerError."""
    container = docker("create", image, "serve").strip()
    try:
        with subprocess.Popen(  # noqa: S603
            ["docker", "export", container],  # noqa: S607
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdout is not None and process.stderr is not None
            try:
                yield from _lines(process.stdout)
                broken = ""
            except (tarfile.TarError, OSError) as exc:
                broken = str(exc)
            said = process.stderr.read().decode(errors="replace")
        if process.returncode or broken:
            raise ContainerError(explain(said or broken, "export"))
    finally:
        docker("rm", container)


def _lines(stream: IO[bytes]) -> Iterator[str]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = member.name.removeprefix("./").rstrip("/")
            if any(name == each or name.startswith(f"{each}/") for each in OF_THE_ENGINE):
                continue
            digest = hashlib.sha256()
            content = archive.extractfile(member) if member.isreg() else None
            while content is not None and (chunk := content.read(_CHUNK_BYTES)):
                digest.update(chunk)
            marks = sorted((key, value) for key, value in member.pax_headers.items() if key.startswith("SCHILY.xattr."))
            what = [name, member.type.decode(), f"{member.mode:o}", member.uid, member.gid, member.linkname, marks]
            yield json.dumps([*what, digest.hexdigest() if content is not None else None]) + "\n"
    while stream.read(_CHUNK_BYTES):  # what pads the archive, so that docker can write it and end
        pass
