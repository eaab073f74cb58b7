"""README and ARCHITECTURE.md say what the code does: settings, error codes, targets, modules, defaults."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from service.errors import CONNECTION_ERRORS, HTTP_ERRORS
from service.settings import Settings, names
from training.config import FILES, TrainingConfig
from training.instrumentation import Instrumentation
from training.launch import flags as launch_flags
from training.tuning.config import TuningConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


def rows(table_of: str) -> dict[str, list[str]]:
    """The cells of each README row whose first cell matches, by that cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:1] == "|"]
    return {row[0].strip("`"): row[1:] for row in cells if re.search(table_of, row[0])}


def test_the_table_of_settings_is_the_settings_with_their_defaults() -> None:
    table = rows("CLASSIFIER_")
    assert list(table) == names()
    for name, field in Settings.model_fields.items():
        if field.default_factory is None:
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            stated = table[f"CLASSIFIER_{name.upper()}"][0]
            assert f"`{default.lower()}`" in stated, (name, stated)


def test_the_table_of_errors_has_every_code_with_its_status() -> None:
    stated = {
        (int(status), code)
        for statuses, (codes, *_) in rows(r"^\d{3}").items()
        for status in re.findall(r"\d{3}", statuses)
        for code in re.findall(r"`(\w+)`", codes)
    }
    given = {*HTTP_ERRORS.values(), *((status, code) for code, status in CONNECTION_ERRORS.items())}
    given |= {(404, "not_found"), (405, "method_not_allowed"), (500, "internal_error")}
    given |= {(429, code) for status, code in given if status == 503}  # by setting
    assert stated == given


def test_every_make_command_of_the_readme_is_a_target() -> None:
    listed = subprocess.run(["make", "--silent"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([\w-]+)", listed, re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", README, re.MULTILINE))
    assert {"serve", "test"} <= used <= targets


def test_every_module_and_flag_the_readme_runs_exists() -> None:
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", README)}
    others = {"data_binary", "help", "model", "host", "port", "output", "inexact", "group", "logdir"}
    others |= {"profile", "rm", "policy", "repository", "region"}  # docker compose's, container.push's
    others |= {"payload", "content_type", "docker_options", "gpus"}  # container.contract's, docker run's
    others |= {"engine"}  # training.evaluate's
    settings = (TrainingConfig, Instrumentation, TuningConfig)
    others |= {action.dest for sub in launch_commands().values() for action in sub._actions} | {"max", "min"}
    assert flags - others <= {name for model in settings for name in model.model_fields} | set(FILES)


def launch_commands() -> dict[str, argparse.ArgumentParser]:
    """The commands of `python -m training.launch` by name."""
    groups = [action for action in launch_flags.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(groups[0].choices)


def test_the_readme_shows_every_launch_command() -> None:
    assert set(re.findall(r"python -m training\.launch ([a-z-]+)", README)) == set(launch_commands())


def test_every_file_the_documents_name_exists() -> None:
    named = set(re.findall(r"`((?:service|training|tests)/[\w/]*(?:\.py)?)`", README + ARCHITECTURE))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_folder_table_names_every_module() -> None:
    rows = dict(re.findall(r"^\| `([\w/]+)/` \| (.*)", ARCHITECTURE, re.MULTILINE))
    folders = {path.parent for name in ("service", "training", "container") for path in (ROOT / name).rglob("*.py")}
    modules = [path.relative_to(ROOT) for folder in folders for path in folder.glob("*.py")]
    assert modules
    unnamed = [
        str(path)
        for path in modules
        if path.stem not in ("__init__", "__main__", "errors", "progress")
        and f"`{path.stem}`" not in rows[str(path.parent)]
    ]
    assert unnamed == []


def test_the_readme_states_the_reference_recipe_that_is_the_default() -> None:
    for name in ("learning_rate", "batch_size", "epochs"):
        assert f"`{name}` {TrainingConfig.model_fields[name].default}" in README


def test_top_level_holds_the_agreed_names_and_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tops = {name.split("/")[0] for name in listed}
    agreed = {"container", "service", "training", "tests", "docker-compose.yml", "Makefile", "README.md"}
    usual = {"pyproject.toml", "uv.lock", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE"}
    assert {name for name in tops if not name.startswith(".")} <= agreed | usual


def test_nothing_that_git_ignores_is_committed_and_no_link() -> None:
    """A committed `.venv` or link to one stands in the way of `make serve` in every clone."""
    ignored = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(ignored, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""
    staged = ["git", "ls-files", "--stage"]
    listed = subprocess.run(staged, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line for line in listed.splitlines() if line.startswith("120000")] == []


def test_no_advice_makes_uv_remove_what_is_installed() -> None:
    """`uv sync` alone removes every group that it does not name."""
    advice = {
        (path.name, line.strip())
        for folder in ("service", "training", "container", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"uv sync (?!--frozen|--inexact)--", line) and path != Path(__file__)
    }
    assert advice == set()


def test_the_readme_names_the_launch_commands_that_have_a_dry_run() -> None:
    (named,) = re.findall(r"`--dry-run`, after ([^.]*?), changes nothing", README, re.DOTALL)
    having = {name for name, sub in launch_commands().items() if "--dry-run" in sub._option_string_actions}
    assert set(re.findall(r"`([a-z-]+)`", named)) == having


def test_outside_the_environment_a_sentence_says_what_to_do() -> None:
    for module in ("training.train_model", "training.hpo", "training.data.cifar100", "training.launch"):
        command = [sys.executable, "-S", "-m", module]  # -S: without the environment's packages
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
        assert "make setup" in ended.stderr and ".venv/bin/python" in ended.stderr
