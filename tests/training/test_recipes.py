"""Recipes: each resolves, says how it was measured, and gives way to flags."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from service.model.artifact import open_artifact
from training.config import RECIPES, TrainingConfig, read_recipe
from training.errors import ConfigError
from training.train_model import main, parse_arguments

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
PLACES = {"data": "in", "output": "out"}
FACTS = {
    "command": r"\w",
    "hardware": r"\d cores|\bGPU\b|\bV100\b",
    "duration": r"\d (ms|s|minutes|hours)\b|not (measured|stated)",
    "accuracy": r"\d\.\d\d %|not measured",
}
"""What a header tells, in this order, and what must be among it: a figure, or that there is none."""


def resolve(*arguments: str, **below: object) -> TrainingConfig:
    return TrainingConfig.resolve({**PLACES, **below, **parse_arguments(arguments)})


def header(name: str) -> str:
    lines = (RECIPES / f"{name}.toml").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def facts(name: str) -> dict[str, str]:
    """What the header tells, by its first word; lines that go on are indented."""
    found = re.findall(r"^# (\w+) {2,}(.+(?:\n# {5,}.+)*)", header(name), re.MULTILINE)
    return {fact: " ".join(re.split(r"\n# +", text)) for fact, text in found}


def test_the_promised_recipes_are_there() -> None:
    assert NAMES == ["best", "quick", "reference", "sample"]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_resolves_to_the_values_it_holds(name: str) -> None:
    held = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    assert held
    assert not {"data", "validation", "output", "run_folder", "checkpoints", "cache_folder"} & set(held)
    config = resolve("--recipe", name)
    for field, value in held.items():
        expected = () if value == "none" and field == "freeze" else value
        if field == "freeze" and value != "none":
            expected = tuple(value.split(","))
        assert getattr(config, field) == expected, field


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_begins_with_command_hardware_duration_and_accuracy(name: str) -> None:
    assert (RECIPES / f"{name}.toml").read_text().startswith("# ")
    told = facts(name)
    assert list(told) == list(FACTS)
    for fact, pattern in FACTS.items():
        assert re.search(pattern, told[fact]), (fact, told[fact])
    flags = " --data data --output artifacts/model"
    assert told["command"].startswith((f"python -m training.train_model --recipe {name}{flags}", "make serve,"))


@pytest.mark.parametrize(("name", "row"), [("sample", "| Starter:"), ("quick", "| Recipe `quick` on")])
def test_the_readme_states_what_a_recipe_was_measured_at(name: str, row: str) -> None:
    (said,) = [line for line in (RECIPES.parents[1] / "README.md").read_text().splitlines() if line.startswith(row)]
    for fact, figure in (("duration", r"\d+ s"), ("accuracy", r"[\d.]+ % \(n = [\d,]+")):
        stated = re.match(figure, facts(name)[fact])
        assert stated and stated[0] in said, fact


def test_the_reference_states_the_published_numbers_and_is_the_default() -> None:
    text = header("reference")
    for number in ("40.71 %", "58.19 %", "1.5454"):
        assert number in text
    held = read_recipe("reference")
    assert (held["learning_rate"], held["batch_size"], held["epochs"]) == (0.017483127170473314, 128, 70)
    assert resolve("--recipe", "reference") == resolve("--freeze", "stem,layer1,layer2,layer3", "--precision", "auto")


@pytest.mark.slow
def test_the_best_recipe_trains_every_block_in_the_end(
    shades: Path, backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    small = ["--side", "32", "--epochs", "4", "--unfreeze-at", "3", "--batch-size", "9", "--weights", str(backbone)]
    places = ["--data", str(shades), "--output", str(tmp_path / "model"), "--device", "cpu", "--quantize", "off"]
    assert main(["--recipe", "best", *small, *places]) == 0
    artifact = open_artifact(tmp_path / "model")
    metrics, recipe = artifact.manifest.metrics, read_recipe("best")
    assert [epoch["epoch"] for epoch in metrics["history"]] == [1, 2, 3, 4]
    rates = [epoch["learning_rate"] for epoch in metrics["history"]]
    assert (
        max(rates[:2]) <= recipe["learning_rate"]
        and max(rates[2:]) <= recipe["learning_rate"] * recipe["unfreeze_rate"]
    )
    assert "epoch 3: every block is trained from here on" in caplog.messages
    kept, before = artifact.weights(), torch.load(backbone, weights_only=True)
    for block in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        names = [name for name in kept if name.startswith(block) and name.endswith("weight")]
        assert names and all(np.abs(kept[name] - before[name].numpy()).max() > 0 for name in names), block
    assert (tmp_path / "model-run" / "report.html").exists()


def test_flags_and_hyperparameters_win_over_the_recipe_and_the_recipe_over_defaults() -> None:
    config = resolve("--recipe", "quick", "--epochs", "9", seed="5", epochs="7")
    assert (config.epochs, config.seed) == (9, 5)
    assert (config.side, config.schedule, config.momentum) == (64, "one-cycle", 0.9)


def test_the_best_recipe_unfreezes_unless_a_flag_says_otherwise() -> None:
    assert resolve("--recipe", "best").unfreeze_at == 6
    for off in (resolve("--recipe", "best", "--unfreeze-at", "none"), resolve(recipe="best", unfreeze_at="none")):
        assert off.unfreeze_at is None
        assert off.frozen == ("stem", "layer1", "layer2", "layer3")


def test_a_recipe_can_be_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('epochs = 3\naugment = "none"\n')
    assert (resolve("--recipe", str(path)).epochs, resolve("--recipe", str(path)).augment) == (3, "none")


def test_an_unknown_recipe_is_refused_and_the_known_are_listed() -> None:
    with pytest.raises(ConfigError, match=f"no such recipe \\({', '.join(NAMES)}\\) and no such file"):
        resolve("--recipe", "fastest")


@pytest.mark.parametrize("content", [b"epochs: 3", b"\xff\xfe\x00", b"[broken"])
def test_a_recipe_that_is_not_toml_is_refused_naming_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--recipe .*mine\.toml is not TOML"):
        resolve("--recipe", str(path))


def test_a_name_in_a_recipe_that_is_no_setting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("epoch = 3\n")
    with pytest.raises(ConfigError, match=r"Unknown hyperparameter epoch\. Did you mean epochs"):
        resolve("--recipe", str(path))


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        resolve("--recipe", str(tmp_path))
