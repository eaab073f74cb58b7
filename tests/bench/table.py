"""Tables of measurements: Markdown beside JSON, with the machine they were made on."""

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The machine in a line: processor, cores, GPU, versions."""
    import torch

    from service.model.machine import cores

    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    flags = torch.cpu.get_capabilities()
    known = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if flags.get(name)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "openvino"))
    return f"{cores()} cores of {processor} ({', '.join(known)}), {gpu}, Python {platform.python_version()}, {packages}"


def commit() -> str:
    """The commit that is measured, with a word where files other than results differ; "" without git."""

    def asked(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = asked("status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS.name}")
        return asked("rev-parse", "--short=7", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def save(
    name: str,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    notes: Sequence[str],
    folder: Path | None = None,
) -> None:
    """Write NAME.md and NAME.json into `folder`, results/ if none is given."""
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True)
    measured = f"{date.today()}, commit {commit() or 'unknown'}, {machine()}"
    lines = [f"# {title}", "", measured, "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    lines += ["", *[f"- {note}" for note in notes], ""]
    (folder / f"{name}.md").write_text("\n".join(lines))
    facts: dict[str, Any] = {"title": title, "date": str(date.today()), "commit": commit(), "machine": machine()}
    content = {**facts, "header": list(header), "rows": [list(row) for row in rows], "notes": list(notes)}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
