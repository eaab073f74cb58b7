"""Debian's programs that a test needs and the machine has not: unpacked from their packages, nothing is installed."""

import subprocess
from pathlib import Path

import pytest

SOURCES = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian {suite} main\n"


def unpack(folder: Path, *packages: str, suite: str | None = None) -> Path:
    """Unpack the packages below `folder`: those of `suite`, else of apt's own release. Returns: what holds their usr/.

    Skips the test where there is no apt, or the mirror cannot be reached.
    """
    apt = ["apt-get", "--quiet"]
    try:
        if suite is not None:
            for name in ("lists/partial", "archives/partial"):
                (folder / name).mkdir(parents=True)
            (folder / "sources.list").write_text(SOURCES.format(suite=suite))
            for option in (
                f"Dir::Etc::SourceList={folder}/sources.list", "Dir::Etc::SourceParts=-",
                f"Dir::State::Lists={folder}/lists", f"Dir::Cache={folder}", "APT::Sandbox::User=root",
                "Acquire::Languages=none",
            ):  # fmt: skip
                apt += ["--option", option]
            subprocess.run([*apt, "update"], check=True, capture_output=True, timeout=240)
        subprocess.run([*apt, "download", *packages], cwd=folder, check=True, capture_output=True, timeout=240)
        for package in packages:
            (archive,) = folder.glob(f"{package}_*.deb")
            subprocess.run(["dpkg", "-x", str(archive), str(folder / "unpacked")], check=True, capture_output=True)
    except (OSError, ValueError, subprocess.SubprocessError) as exc:
        said = (getattr(exc, "stderr", None) or b"").decode().strip()
        pytest.skip(f"{', '.join(packages)}: not installed, and Debian's packages cannot be had: {said or exc}")
    return folder / "unpacked"
