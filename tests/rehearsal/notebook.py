"""`python -m tests.rehearsal.notebook OUT`: executes training/train_and_deploy.ipynb in the rehearsal, top to bottom.

It runs where Jupyter starts it, in the folder training/ of a checkout (a copy of this one).
Only some of its parameters are others: small data, few epochs. What comes out is a notebook with its outputs.
"""

import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

from tests.rehearsal import pictures
from tests.rehearsal.control_plane import REGION
from tests.rehearsal.journey import RUN
from tests.rehearsal.start import IMAGE, ROOT, rehearsal

NOTEBOOK = ROOT / "training" / "train_and_deploy.ipynb"
LIMIT_S = 600
"""For one cell."""


def checkout(folder: Path) -> Path:
    """A copy of the packages in `folder`; returns where the notebook lies."""
    for name in ("container", "service", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return folder / "training"


def parameters() -> str:
    """Those that are others, small; places relative to the checkout, as in the notebook."""
    values = {
        "PROJECT": "tour", "REGION": REGION, "IMAGES": {"train": IMAGE, "serve": IMAGE},
        "TUNE": ["--trials", 2, "--parallel", 2, "--learning-rate-range", "0.005:0.05", "--epochs-range", "2:4",
                 "--batch-sizes", "8,16", "--poll-seconds", 0.5, *RUN],
        "TRAIN": ["--spot", "--epochs", 8, "--poll-seconds", 0.5],
        "DEPLOY": ["--max", 3, "--poll-seconds", 0.5],
    }  # fmt: skip
    return "\n".join(f"{name} = {value!r}" for name, value in values.items())


def execute(output: Path) -> None:
    """Write the executed notebook to `output`. Raises: CellExecutionError."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with TemporaryDirectory(prefix="tour-") as scratch, rehearsal() as cloud:
        cloud.push_image()
        folder = checkout(Path(scratch))
        pictures.write(Path(scratch))
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", ()):
                cell.source += f"\n{parameters()}"
        os.environ |= cloud.variables
        os.environ.pop("PYTHONPATH", None)
        client = NotebookClient(
            notebook, timeout=LIMIT_S, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )  # fmt: skip
        try:
            client.execute()
        finally:
            nbformat.write(notebook, output)
        left = {kind: names for kind, names in cloud.ask("/rehearsal/leftovers").items() if names}
        if left:
            raise RuntimeError(f"the notebook left behind: {left}")


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
