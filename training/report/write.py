"""Figures of a network and the files of its run -> evaluation.json, report.html and PNGs, in one folder.

    Figures, Manifest, LabelledImages, folder/{metrics.jsonl, rules.json, profile.json, settings.json}  ->  folder/
        evaluation.json    the figures, for programs
        report.html        the page: one file that needs nothing else, neither network nor the PNGs
        confusion.png, classes.png, calibration.png, curves.png

The network is not needed again. Texts from outside (names of classes and files, messages) reach the page through
jinja2's autoescape only, and the page's content security policy lets no script run but its own.
"""

import base64
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from service.model.files import replace
from service.model.manifest import Manifest
from training.data.dataset import LabelledImages
from training.data.superclasses import superclasses
from training.errors import ExportError
from training.figures import Confused, Figures
from training.leftovers import remove_leftovers
from training.report import charts
from training.report.hardware import hardware
from training.report.headline import findings, headline, uncertainty
from training.report.matrix import matrix, summed
from training.report.pictures import pictures
from training.report.rules import rule_views
from training.report.run_charts import profile_view, training_charts
from training.report.sources import Record, Sources, read_sources, records
from training.report.thumbnails import thumbnail

log = logging.getLogger(__name__)

REPORT = "report.html"
EVALUATION = "evaluation.json"
PICTURES = ("curves.png", "confusion.png", "classes.png", "calibration.png")
"""Beside the report, in the order in which they are read."""
HERE = Path(__file__).parent

PAIRS, PICTURES_PER_PAIR = 12, 4
LISTED_PAIRS = 50
"""Most confused pairs in evaluation.json."""
LISTED_IMAGES = 12
"""Images with the highest loss, and most surprising ones."""


def write_report(
    folder: Path,
    manifest: Manifest,
    images: LabelledImages,
    figures: Figures,
    *,
    split: str = "validation",
    dataset: Record | None = None,
    note: str | None = None,
) -> Path:
    """Write evaluation.json, the report and its PNGs into `folder` (made if missing); files there are replaced.

    Args:
        folder: the run's folder; its other files are read, each if it is there.
        images: the N images of `figures`, in their order, for the pictures.
        split: what to call them ("validation", "train").
        dataset: facts of their data set; default: the manifest's.
        note: a sentence to stand above everything.

    Returns: the path of report.html. Raises: ExportError.
    """
    assert len(images) == figures.n, (len(images), figures.n)
    facts = manifest.dataset if dataset is None else dataset
    sources = read_sources(folder, records(manifest.metrics.get("history")))
    groups = superclasses(manifest.classes)
    evaluation = _evaluation(manifest, images, figures, split, facts)
    page = _page(manifest, images, figures, sources, groups, split, facts, note)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {
            EVALUATION: json.dumps(evaluation, ensure_ascii=False).encode() + b"\n",
            **pictures(figures, manifest.classes, groups, sources),
            REPORT: page.encode(),
        }.items():
            replace(folder / name, content)
    except OSError as exc:
        raise ExportError(
            f"The report cannot be written into {folder} ({exc.strerror}); free space or name another folder."
        ) from exc
    log.info("report: %s (%.1f MB)", folder / REPORT, len(page) / 1e6)
    return folder / REPORT


def remove_report(folder: Path) -> None:
    """Remove what `write_report` wrote into `folder`: it is of a model that was there before."""
    remove_leftovers(folder, (REPORT, EVALUATION, *PICTURES))


def _evaluation(
    manifest: Manifest, images: LabelledImages, figures: Figures, split: str, dataset: Record
) -> dict[str, Any]:
    """The content of evaluation.json."""
    names = manifest.classes

    def image(index: int) -> dict[str, Any]:
        return {
            "index": index, "file": images.file_name(index), "true": names[figures.labels[index]],
            "predicted": names[figures.predicted[index]], "confidence": float(figures.confidence[index]),
            "loss": float(figures.losses[index]),
        }  # fmt: skip

    return {
        "format_version": 1,
        "model": {"name": manifest.name, "version": manifest.version},
        "dataset": {**dataset, "evaluated": split},
        **figures.as_json(),
        "classes": [{"name": name, **vars(each)} for name, each in zip(names, figures.classes, strict=True)],
        "most_confused": [
            {"true": names[pair.true], "predicted": names[pair.predicted], "n": pair.n, "share": pair.share}
            for pair in figures.most_confused(LISTED_PAIRS)
        ],
        "worst": [image(index) for index in figures.worst(LISTED_IMAGES)],
        "surprising": [image(index) for index in figures.surprising(LISTED_IMAGES)],
        "hardware": hardware(),
        **({"quantization": manifest.quantization.model_dump()} if manifest.quantization else {}),
    }


def _page(
    manifest: Manifest, images: LabelledImages, figures: Figures, sources: Sources, groups: Sequence[str] | None,
    split: str, dataset: Record, note: str | None,
) -> str:  # fmt: skip
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    classes = manifest.classes
    style, script = ((HERE / name).read_text() for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": charts.percent, "plain": charts.plain, "text": _text}
    group_matrix = None
    if groups is not None:
        counts, names = summed(figures.confusion, groups)
        group_matrix = matrix(counts, names)
    ranked = sorted(
        ((each, classes[k], groups[k] if groups else "") for k, each in enumerate(figures.classes)),
        key=lambda row: (row[0].accuracy is None, row[0].accuracy, row[1]),
    )
    surprising = figures.surprising(LISTED_IMAGES)
    # With two classes these are the same images: the second list goes on where the first ends.
    others = [index for index in figures.worst(2 * LISTED_IMAGES) if index not in surprising]
    return environment.get_template("report.html.j2").render(
        # Ours, as they lie in this folder; everything else is escaped.
        style=Markup(style), script=Markup(script), script_sha256=digest,  # noqa: S704
        manifest=manifest, figures=figures, sources=sources, split=split, note=note, dataset=dataset,
        headline=headline(manifest, figures, split), findings=findings(manifest, figures, sources, groups),
        curves=training_charts(sources), rules=rule_views(sources.rules),
        matrix=matrix(figures.confusion, classes, groups), group_matrix=group_matrix,
        ranked=ranked,
        pairs=[_shown_pair(pair, images, figures, classes) for pair in figures.most_confused(PAIRS)],
        surprising=_shown(surprising, images, figures, classes),
        worst=_shown(others[:LISTED_IMAGES], images, figures, classes),
        calibration=(charts.reliability_chart(figures), charts.confidence_chart(figures)),
        uncertain=uncertainty(figures),
        profile=profile_view(sources.profile), hardware=hardware(),
        settings=sources.settings or manifest.hyperparameters, int8=_int8(manifest),
    )  # fmt: skip


def _int8(manifest: Manifest) -> dict[str, str]:
    """The row of the int8 network; empty where there is none."""
    found = manifest.quantization
    if found is None:
        return {}
    return {
        "same class as float32": charts.percent(found.top1_agreement),
        "accuracy": f"{charts.percent(found.accuracy)} ({0.0 - found.loss_points:+.2f} points)",
        "validation images": f"{found.n:,}", "calibration images": f"{found.calibration_images:,}",
        "method": found.method,
    }  # fmt: skip


def _shown(
    indices: Iterable[int], images: LabelledImages, figures: Figures, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """What the template says of each image."""
    return [
        {
            "picture": thumbnail(images, index), "file": images.file_name(index),
            "true": classes[figures.labels[index]], "predicted": classes[figures.predicted[index]],
            "right": figures.labels[index] == figures.predicted[index],
            "confidence": float(figures.confidence[index]), "loss": float(figures.losses[index]),
        }
        for index in indices
    ]  # fmt: skip


def _shown_pair(pair: Confused, images: LabelledImages, figures: Figures, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "true": classes[pair.true], "predicted": classes[pair.predicted], "n": pair.n, "share": pair.share,
        "images": _shown(figures.mistaken(pair, PICTURES_PER_PAIR), images, figures, classes),
    }  # fmt: skip


def _text(value: object) -> str:
    """A value of a setting or fact, as a person writes it."""
    if isinstance(value, list | tuple):
        return ", ".join(_text(each) for each in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items()) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)
