"""What training/train_and_deploy.ipynb shows: the commands as one function, and results as tables and pictures."""

import csv
import html
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from service.model.artifact import open_artifact
from service.model.errors import ArtifactError
from training.errors import TrainingError
from training.launch import images
from training.launch.__main__ import main
from training.launch.errors import LaunchError
from training.launch.flags import parser
from training.report.sources import read_sources
from training.report.write import PICTURES

REFERENCE = {
    "validation accuracy": 0.4071, "training accuracy": 0.5819, "training loss": 1.5454,
    "learning_rate": 0.017483127170473314, "batch_size": 128, "epochs": 70,
}  # fmt: skip
"""The published run on CIFAR-100, on one V100: the last epoch's figures, and the hyperparameters its tuning found."""


class NotShown(LaunchError):
    """A cell cannot do what it is for: the notebook shows the sentence alone, and goes no further."""

    def _render_traceback_(self) -> list[str]:
        """What IPython asks for in place of a trace."""
        return [str(self)]


@contextmanager
def _sentences() -> Iterator[None]:
    """Errors that say what to do are shown without a trace. Raises: NotShown."""
    try:
        yield
    except (TrainingError, ArtifactError) as exc:
        raise NotShown(str(exc)) from exc


def go_home() -> None:
    """Work in the checkout's folder from here on, where the notebook's paths begin; Jupyter starts it in training/."""
    os.chdir(Path(__file__).parents[2])


def account(project: str, region: str, profile: str) -> list[str]:
    """The flags that every command is given; an empty region or profile is left to `aws configure`."""
    given = {"--project": project, "--region": region, "--profile": profile}
    return [text for name, value in given.items() if value for text in (name, value)]


def preflight_flags(tune: Sequence[object], train: Sequence[object], deploy: Sequence[object]) -> list[str]:
    """What `preflight` is to be given, so that it looks at the quotas which these commands' flags take.

    Raises: NotShown where one of them is wrong.
    """

    def read(command: str, flags: Sequence[object]) -> Any:
        data = [] if command == "deploy" else ["--data", "-"]
        try:
            return parser().parse_known_args([command, *data, *map(str, flags)])[0]
        except SystemExit as exc:  # argparse has told why
            raise NotShown(
                f"{command.upper()} in the cell of settings holds a flag that `{command}` does not take; the lines "
                "above say which."
            ) from exc

    tuning, training, endpoint = read("tune", tune), read("train", train), read("deploy", deploy)
    given = {
        "--instance": training.instance, "--instances": max(tuning.instances, training.instances),
        "--parallel": tuning.parallel, "--kind": endpoint.kind, "--hosting-instance": endpoint.instance,
        "--min": endpoint.min_count, "--max": endpoint.max_count, "--max-concurrency": endpoint.max_concurrency,
    }  # fmt: skip
    flags = [text for name, value in given.items() if value is not None for text in (name, str(value))]
    return [*flags, "--spot"] if tuning.spot or training.spot else flags


class Table(str):
    """An HTML table, which a notebook shows as one."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


def launch(command: str, *arguments: object) -> None:
    """`python -m training.launch COMMAND ...`, in this process, its lines shown here. Raises: NotShown."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    status = main([command, *map(str, arguments)])
    if status:
        raise NotShown(
            f"`{command}` ended with status {status}; the lines above say why. Flags that they name, --region and "
            "--profile among them, are given in the cell of settings."
        )


def note_images(uris: Mapping[str, str]) -> None:
    """Note images that are in ECR, by what they are for (train, serve, serve-cpu), for every command to come.

    Raises: NotShown.
    """
    if uris:
        with _sentences():
            images.note(uris)


def charts(run: Path) -> list[Any]:
    """The report's pictures that a run folder holds, to be displayed. Raises: NotShown."""
    _require(run, "train")
    display: Any = importlib.import_module("IPython.display")
    return [display.Image(filename=str(run / name)) for name in PICTURES if (run / name).is_file()]


def rules(run: Path) -> Table:
    """What Debugger's rules said of a run: status, and the first finding of each. Raises: NotShown."""
    _require(run, "train")
    found = read_sources(run, []).rules or []
    rows = [tuple(str(rule.get(name) or "") for name in ("rule", "status", "message")) for rule in found]
    return _table(("rule", "status", "first finding"), rows)


def profile(run: Path) -> str:
    """The profiler's sentence: what holds the run up, and what to do about it. Raises: NotShown."""
    _require(run, "train")
    return str((read_sources(run, []).profile or {}).get("summary", "no profile"))


def beside_reference(model: Path) -> Table:
    """The model's figures and hyperparameters beside those of the published run.

    The reference is of CIFAR-100; on other data the comparison means nothing, and the last row says so.

    Raises: NotShown.
    """
    _require(model, "train")
    with _sentences():
        manifest = open_artifact(model).manifest
    train, validation = (manifest.metrics.get(name) or {} for name in ("train", "validation"))
    ours = {
        "validation accuracy": validation.get("accuracy"),
        "training accuracy": train.get("accuracy"),
        "training loss": train.get("loss"),
        **{name: manifest.hyperparameters.get(name) for name in ("learning_rate", "batch_size", "epochs")},
    }
    rows = [(name, _shown(name, value), _shown(name, ours[name])) for name, value in REFERENCE.items()]
    data = str(manifest.dataset.get("name", ""))
    rows.append(("data", "CIFAR-100, 100 classes", f"{data}, {len(manifest.classes)} classes"))
    if data != "cifar-100":
        rows.append(("not to be compared", "", "other data: these accuracies say nothing about each other"))
    return _table(("", "reference (one V100)", f"{manifest.name} {manifest.version}"), rows)


def best_trial(folder: Path) -> Table:
    """What a tuning found. Raises: NotShown."""
    _require(folder / "best.json", "tune")
    best = json.loads((folder / "best.json").read_text())
    rows = [(name, f"{value:.6g}") for name, value in best["hyperparameters"].items()]
    return _table(("", best["trial"]), [*rows, ("validation accuracy", f"{100 * best['value']:.2f} %")])


def gallery(answers: Path, columns: int = 5) -> Any:
    """Pictures with what the endpoint said of them, from the CSV that `invoke` wrote. Raises: NotShown."""
    _require(answers, "invoke")
    display: Any = importlib.import_module("IPython.display")
    from matplotlib.figure import Figure
    from PIL import Image

    with answers.open() as file:
        rows = list(csv.DictReader(file))
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * height), layout="constrained")
    for place, row in enumerate(rows):
        axes = figure.add_subplot(height, columns, place + 1)
        axes.axis("off")
        text = row["problem"] or f"{row['label']}\n{100 * float(row['probability']):.0f} %"
        axes.set_title(text[:60], fontsize=8)
        if not row["problem"]:
            with Image.open(row["file"]) as picture:
                axes.imshow(picture.convert("RGB"))
    png = BytesIO()
    figure.savefig(png, format="png", dpi=80)
    return display.Image(png.getvalue())


def _require(path: Path, command: str) -> None:
    """Raises: NotShown where what a command brings is not there."""
    if not path.exists():
        raise NotShown(f'{path} is not there yet: the cell of launch("{command}", ...) brings it; run that first.')


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag} style='text-align:left'>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return Table(f"<table>{line('th', heads)}{''.join(line('td', row) for row in rows)}</table>")


def _shown(name: str, value: object) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{100 * value:.2f} %" if "accuracy" in name else f"{value:.6g}"
