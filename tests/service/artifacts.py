"""Artifacts that say something else than what was trained."""

import shutil
from pathlib import Path
from typing import Any

from service.model.artifact import open_artifact
from service.model.manifest import sealed


def changed(artifact: Path, to: Path, **facts: Any) -> Path:
    """A copy of the artifact whose manifest says something else."""
    shutil.copytree(artifact, to)
    manifest = open_artifact(to).manifest
    (to / "manifest.json").write_bytes(sealed(type(manifest).model_validate({**dict(manifest), **facts})))
    return to
