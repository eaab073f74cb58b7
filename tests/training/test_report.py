"""The report: one page that stands alone, says the right numbers, and lets no text become markup."""

import ast
import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from service.model.machine import cores
from service.model.manifest import Quantization
from tests.training.reports import manifest_of, some_figures, some_images, write_hundred, write_run
from training.data import sample
from training.data.dataset import FileImages
from training.errors import ExportError
from training.figures import figures
from training.report.charts import duration
from training.report.headline import uncertainty
from training.report.sources import read_sources
from training.report.write import write_report

ROOT = Path(__file__).parent.parent.parent
VOID = {"meta", "img", "br", "hr", "link", "input"}
SECTIONS = {"result", "training", "rules", "confusion", "classes", "mistakes", "calibration", "profile", "settings"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)> $\\frac{$ 狗',
    "</script><b>'{{ 7*7 }}",
    "d&lt;og",
)


class Page(HTMLParser):
    """The tags of a page; refuses those that are closed in another order than opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hundred(tmp_path_factory.mktemp("run"))


def test_the_page_has_every_section_and_stands_alone(hundred: Path) -> None:
    text = (hundred / "report.html").read_text()
    page = Page(text)
    assert page.ids() >= SECTIONS
    assert text.lstrip().startswith("<!doctype html>")
    assert not re.search(r"https?:|url\(|@import", text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#"))
    assert len(text) < 5_000_000
    assert {path.name for path in hundred.glob("*.png")} == {
        "confusion.png", "classes.png", "calibration.png", "curves.png",
    }  # fmt: skip
    for path in hundred.glob("*.png"):
        with Image.open(path) as picture:
            picture.verify()


def test_the_page_lets_no_script_run_but_its_own(hundred: Path) -> None:
    page = Page((hundred / "report.html").read_text())
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    (own,) = (text for attributes, text in page.scripts if attributes.get("type") != "application/json")
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_the_run_is_told_of(hundred: Path) -> None:
    text = Page((hundred / "report.html").read_text()).text
    for said in (
        "An example.", "Batch accuracy", "Learning rate", "Seconds per epoch", "issues found",
        "Steps 3, 7: It <b>grew</b>.", "Stop.", "The loader is the bottleneck.", "12.5 ms",
        "aten::convolution", "Load in percent", "loader wait", "0.875",
        "Debugging rules that found issues: Overfit. 1 of 3 saw too little to judge.", "not judged",
        "judges from step 300 on, the run had 12", "Parameters", "ended before its last epoch: No gain in 5 epochs.",
        "of the mistakes stay within the superclass",
    ):  # fmt: skip
        assert said in text, said


def test_the_machine_it_was_evaluated_on_is_stated(hundred: Path) -> None:
    text = Page((hundred / "report.html").read_text()).text
    stated = json.loads((hundred / "evaluation.json").read_text())["hardware"]
    assert stated.keys() >= {"processor", "memory", "system", "python", "torch"}
    assert stated["torch"] == torch.__version__
    assert stated["processor"].endswith(f", {cores()} cores")
    assert all(f"{name} {value}" in text for name, value in stated.items())


def test_parameters_of_a_rule_have_a_column_of_their_own_and_those_without_a_value_are_left_out(hundred: Path) -> None:
    table = (hundred / "report.html").read_text().partition('<table class="rules">')[2].partition("</table>")[0]
    rows = [re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr>")[2:]]
    cells = [[re.sub(r"<.*?>", "", cell).strip() for cell in row] for row in rows]
    assert cells[1] == ["DeadRelu", "no issues", "", "share 0.5"]
    assert cells[2] == ["AllZero", "not judged", "judges from step 300 on, the run had 12", "threshold 1e-07"]
    assert (cells[0][0], cells[0][3]) == ("Overfit", "")


def test_a_calibration_error_of_few_images_is_called_uncertain_and_that_of_many_is_not(tmp_path: Path) -> None:
    for per_class, said in ((30, True), (500, False)):
        measured = some_figures(2, per_class)
        path = write_report(tmp_path, manifest_of(("cat", "dog"), measured.n), some_images(measured), measured)
        assert ("Below 1,000 images this is uncertain: with 60, perfect" in Page(path.read_text()).text) == said


def test_classes_and_pairs_that_are_as_hard_as_the_one_named_are_counted(tmp_path: Path) -> None:
    logits = np.eye(4)[[0, 1, 1, 0, 3, 3]]
    measured = figures(logits, [0, 1, 1, 2, 2, 3])
    path = write_report(tmp_path, manifest_of(("a", "b", "c", "d"), 6), some_images(measured), measured)
    text = Page(path.read_text()).text.replace("\u00a0", " ")
    assert "Most often confused: c taken for a, once (50.0 % of that class), as often as one other pair." in text
    assert "Hardest: c (0.0 %); easiest: a and 2 more (100 %)." in text


def test_the_error_that_chance_would_show_is_what_calibrated_networks_show() -> None:
    rng = np.random.default_rng(0)
    found, named = [], []
    for _ in range(200):
        right = rng.uniform(0.5, 1, 300)  # the probability of class 0, and how often it is right
        measured = figures(np.log(np.stack([right, 1 - right], 1)), (rng.uniform(size=300) > right).astype(int))
        found.append(100 * measured.ece)
        named.append(float(re.findall(r"about ([\d.]+)", uncertainty(measured))[0]))
    assert np.mean(found) == pytest.approx(np.mean(named), rel=0.1)


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.0125, "0.01 ms"), (12.5, "12.5 ms"), (950.4, "950 ms"), (1234.5, "1.23 s"), (83_400, "1.39 min"),
        (1_234_567.8, "20.6 min"), (9e6, "2.50 h"),
    ],
)  # fmt: skip
def test_times_are_told_in_units_that_suit_them(ms: float, text: str) -> None:
    assert duration(ms) == text


def test_page_and_json_state_the_same_figures(hundred: Path) -> None:
    stated = json.loads((hundred / "evaluation.json").read_text())
    measured = some_figures(100, 3)
    assert stated["accuracy"] == measured.accuracy
    assert [each["name"] for each in stated["classes"]] == list(sample.CLASSES)
    assert stated["confusion"] == measured.confusion.tolist()
    assert stated["worst"][0]["loss"] == max(measured.losses)
    assert stated["worst"][0]["file"] == f"{int(measured.losses.argmax())}.png"
    assert f"{100 * measured.accuracy:.1f}\u00a0%" in (hundred / "report.html").read_text()


def test_matrices_hold_every_image_in_the_order_of_superclasses(hundred: Path) -> None:
    page = Page((hundred / "report.html").read_text())
    classes, groups = (json.loads(text) for attributes, text in page.scripts if "type" in attributes)
    assert classes["groups"] == sorted(classes["groups"])
    assert sorted(classes["names"]) == sorted(sample.CLASSES)
    assert groups["names"] == list(sample.SUPERCLASSES)
    measured = some_figures(100, 3)
    for data in (classes, groups):
        assert sum(count for *_, count in data["cells"]) == sum(data["totals"]) == 300
    for i, j, count in classes["cells"]:
        true, predicted = (sample.CLASSES.index(classes["names"][k]) for k in (i, j))
        assert measured.confusion[true, predicted] == count


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    measured = some_figures(4, 6)
    firing = {"step": "<i>", "message": HOSTILE[1], "advice": HOSTILE[0], "value": "x"}
    (tmp_path / "rules.json").write_text(
        json.dumps({"rules": [{"rule": HOSTILE[0], "status": HOSTILE[1], "firings": [firing, 3]}, 7]})
    )
    (tmp_path / "profile.json").write_text(
        json.dumps({"summary": HOSTILE[0], "shares": {HOSTILE[1]: 2.0}, "top_operators": [{"name": HOSTILE[0]}, None]})
    )
    (tmp_path / "settings.json").write_text(json.dumps({HOSTILE[0]: HOSTILE}))
    write_report(tmp_path, manifest_of(HOSTILE, measured.n), some_images(measured), measured, note=HOSTILE[0])
    page = Page((tmp_path / "report.html").read_text())
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json", None]
    assert json.loads(page.scripts[0][1])["names"] == list(HOSTILE)
    for tag, attributes in page.tags:
        assert tag not in ("b", "i") or not attributes.get("onerror")
        assert not [name for name in attributes if name.startswith("on")]
    assert all((a.get("src") or "").startswith("data:") for tag, a in page.tags if tag == "img")
    for name in HOSTILE:
        assert re.sub(r"\s+", " ", name) in page.text


def test_a_run_without_its_files_still_has_a_report(tmp_path: Path) -> None:
    measured = some_figures(2, 10)
    path = write_report(tmp_path / "new", manifest_of(("cat", "dog"), 20), some_images(measured), measured)
    page = Page(path.read_text())
    assert page.ids() >= SECTIONS
    for sentence in (
        "No epochs are recorded for this model.", "No rules watched this run.", "No profile was taken of this run.",
    ):  # fmt: skip
        assert sentence in page.text
    assert "top-5" not in page.text
    assert not (tmp_path / "new" / "curves.png").exists()


def test_page_and_json_state_what_the_int8_network_was_measured_at(tmp_path: Path) -> None:
    measured, manifest = some_figures(2, 10), manifest_of(("cat", "dog"), 20)
    write_report(tmp_path, manifest, some_images(measured), measured)
    assert "int8" not in Page((tmp_path / "report.html").read_text()).text
    assert "quantization" not in json.loads((tmp_path / "evaluation.json").read_text())
    int8 = Quantization(
        method="nncf", calibration_images=300, n=4321, top1_agreement=0.987, accuracy=0.712, accuracy_float32=0.715,
        self_check_difference=0.01,
    )  # fmt: skip
    with_int8 = manifest.model_copy(update={"quantization": int8})
    write_report(tmp_path, with_int8, some_images(measured), measured)
    text = Page((tmp_path / "report.html").read_text()).text
    for part in ("The int8 network", "98.7 %", "71.2 % (-0.30 points)", "4,321"):
        assert part in text
    assert json.loads((tmp_path / "evaluation.json").read_text())["quantization"] == int8.model_dump()


def test_without_recorded_metrics_the_manifests_history_is_drawn(tmp_path: Path) -> None:
    history = [{"epoch": e, "train_loss": 1.0, "validation_loss": 2.0, "seconds": 1.0} for e in (1, 2)]
    measured = some_figures(2, 10)
    path = write_report(tmp_path, manifest_of(("cat", "dog"), 20, history), some_images(measured), measured)
    assert "epoch 2: validation 2" in Page(path.read_text()).text


def test_no_mistakes_and_one_image_make_a_report_too(tmp_path: Path) -> None:
    measured = figures(np.array([[9.0, 0.0]]), [0])
    text = Page(write_report(tmp_path, manifest_of(("a", "b"), 1), some_images(measured), measured).read_text()).text
    assert "Not one image is taken for another class." in text
    assert "no image" in text


def test_an_image_that_is_gone_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    measured = figures(np.array([[0.0, 2.0], [0.0, 1.0]]), [0, 1])
    Image.new("RGB", (120, 90), "red").save(tmp_path / "there.jpg")
    images = FileImages((tmp_path / "gone.png", tmp_path / "there.jpg"), measured.labels)
    page = Page(write_report(tmp_path / "r", manifest_of(("a", "b"), 2), images, measured).read_text())
    assert "image no longer readable" in page.text
    assert any((a.get("src") or "").startswith("data:image/jpeg") for tag, a in page.tags if tag == "img")
    assert "gone.png" in caplog.text


def test_damaged_files_are_left_out_with_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(tmp_path)
    (tmp_path / "rules.json").write_text("[1")
    (tmp_path / "profile.json").write_text("[]")
    sources = read_sources(tmp_path, [])
    assert (sources.rules, sources.profile) == (None, None)
    assert [step["step"] for step in sources.steps] == list(range(1, 13))  # those made twice once
    assert [epoch["epoch"] for epoch in sources.epochs] == [1, 2, 3]
    for name in ("rules.json", "profile.json", "metrics.jsonl: 1 of 21 lines"):
        assert name in caplog.text


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    measured = some_figures(2, 2)
    with pytest.raises(ExportError, match="name another folder"):
        write_report(tmp_path / "file", manifest_of(("a", "b"), 4), some_images(measured), measured)


def test_matplotlib_and_jinja_are_imported_only_when_a_report_is_written() -> None:
    for path in (ROOT / "training").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"matplotlib", "jinja2", "markupsafe"}, path
