"""Reports to look at: figures and files of runs that never were."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from service.model.architecture import Architecture
from service.model.manifest import Manifest
from service.model.preprocess import Preprocessing
from training.data import sample
from training.data.dataset import ArrayImages
from training.figures import Figures, figures
from training.report.write import write_report


def manifest_of(classes: tuple[str, ...], n: int, history: list[dict[str, Any]] | None = None) -> Manifest:
    entry = {"path": "x.bin", "sha256": "0" * 64, "bytes": 1}
    return Manifest.model_validate(
        {
            "format_version": 1, "name": "pets", "version": "0123456789ab", "created_at": datetime.now(UTC),
            "architecture": Architecture(num_classes=len(classes), hidden_units=8, frozen=()), "classes": classes,
            "preprocessing": Preprocessing(side_px=32),
            "example": {"label": classes[0], "media_type": "image/png"},
            "hyperparameters": {"learning_rate": 0.1, "freeze": ["stem"], "validation": None},
            "dataset": {"name": "pictures", "validation_images": n, "split": "by seed"},
            "metrics": {"history": history or [], "stopped": "No gain in 5 epochs."}, "packages": {"torch": "2.13.0"},
            "files": dict.fromkeys(("weights", "self_check", "example"), entry),
        }
    )  # fmt: skip


def some_figures(classes: int, per_class: int, seed: int = 0) -> Figures:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    logits = rng.normal(0, 1, (len(labels), classes)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += 1.5
    return figures(logits, labels)


def some_images(measured: Figures) -> ArrayImages:
    pixels = np.random.default_rng(0).integers(0, 255, (measured.n, 32, 32, 3), dtype=np.uint8)
    return ArrayImages(pixels, measured.labels)


def write_run(folder: Path) -> None:
    """The files of a run of three epochs of four steps, resumed in the second, interrupted while writing."""
    lines: list[Any] = []
    for epoch in (1, 2, 2, 3):
        lines += [
            {"kind": "step", "step": 4 * epoch - 3 + i, "epoch": epoch, "batch_loss": 3 / (epoch + i),
             "batch_accuracy": 0.3, "learning_rate": 0.1}
            for i in range(4)
        ]  # fmt: skip
        lines.append(
            {"kind": "epoch", "epoch": epoch, "epochs": 3, "train_loss": 1 / epoch, "train_accuracy": 0.9,
             "validation_loss": float("nan") if epoch == 3 else 2 / epoch, "validation_accuracy": 0.1 * epoch,
             "learning_rate": 0.1, "seconds": 3.0}
        )  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "step", "st'
    (folder / "metrics.jsonl").write_text(text)
    firing = {
        "step": 3,
        "tensor": "fc.weight",
        "value": 0.5,
        "threshold": 0.1,
        "message": "It <b>grew</b>.",
        "advice": "Stop.",
    }
    rules = [
        {"rule": "Overfit", "status": "IssuesFound", "parameters": {}, "firings": [firing, {**firing, "step": 7}]},
        {"rule": "DeadRelu", "status": "NoIssuesFound", "parameters": {"share": 0.5, "regex": None}, "firings": []},
        {"rule": "AllZero", "status": "NoIssuesFound", "judged": False, "parameters": {"threshold": 1e-07},
         "unjudged": "judges from step 300 on, the run had 12", "firings": []},
    ]  # fmt: skip
    (folder / "rules.json").write_text(json.dumps({"rules": rules}))
    profile = {
        "summary": "The loader is the bottleneck.", "shares": {"data_wait": 0.7, "step": 0.3},
        "step_ms": {"median": 12.5, "p95": 20.0},
        "samples": [
            {"t_s": t, "cpu_percent": 50 + t, "loader_wait_percent": 9 * t, "memory_gb": 1.0} for t in range(5)
        ],
        "top_operators": [{"name": "aten::convolution", "total_ms": 100.0, "share": 0.6}],
    }  # fmt: skip
    (folder / "profile.json").write_text(json.dumps(profile))
    (folder / "settings.json").write_text(json.dumps({"epochs": 3, "momentum": 0.875}))


def write_hundred(folder: Path, per_class: int = 3) -> Path:
    """A whole report of the sample's 100 classes, with the files of a run; returns `folder`."""
    write_run(folder)
    rng = np.random.default_rng(0)
    measured = some_figures(100, per_class)
    images = ArrayImages(np.stack([sample.render(sample.CLASSES[k], rng) for k in measured.labels]), measured.labels)
    write_report(folder, manifest_of(sample.CLASSES, measured.n), images, measured, note="An example.")
    return folder
