"""The commands that the README names in its sentences: each is understood, and does what a dry run can show."""

import re
import shlex
from pathlib import Path

import pytest

from tests.launch.in_process import ROLE, Account
from tests.launch.telling import told
from tests.launch.test_client import GOOD, answering
from tests.launch.test_interrupted import train
from tests.rehearsal.start import IMAGE, ROOT
from training.launch.attempts import TRAINING_JOBS
from training.launch.client import EndpointTarget
from training.launch.commands import COMMANDS
from training.launch.flags import options_of
from training.launch.names import Project
from training.launch.session import connect

VALUES = {"--capture-percent": "20", "--min": "1", "--max": "2", "--kind": "async"}
"""For flags that are named alone."""
ELSEWHERE = {"--profile", "--region", "--asynchronous", "--checkpoints", "--mlflow"}
"""Named alone as well: of every command, of one whose endpoint no dry run has (test_targets), what is refused, and what
takes the address of a server (test_channels).
"""


def named() -> list[list[str]]:
    """The words of each: a command and its flags, or flags alone."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("\n## On Amazon SageMaker") : text.index("\n## The service")]
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", section, flags=re.DOTALL))
    words = [shlex.split(span) for span in dict.fromkeys(spans) if re.match(rf"--|({'|'.join(COMMANDS)})\b", span)]
    return [each for each in words if each[0].startswith("--") or each[1:]]


def command_of(words: list[str]) -> str:
    """The first that knows these flags; of a setting of the training, `train`."""
    flags = {word for word in words if word.startswith("--")}
    return next((each for each in ("deploy", "train", "invoke") if flags <= set(options_of(each))), "train")


def test_the_readme_names_commands_in_its_sentences() -> None:
    found = [" ".join(words) for words in named()]
    for one in ("deploy --model JOB", "--shadow MODEL", "--image URI --send-code", "delete --data", "--side 224"):
        assert one in found


@pytest.mark.slow
def test_the_commands_in_the_readmes_sentences_are_understood(
    here: Account, data: Path, packed: Path, asked: Path, artifact: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    here.containers.artifact = artifact
    told(caplog, *train(here, "inline", data, tmp_path / "model", artifact), "--no-wait")
    here.containers.runs = False
    (job,) = TRAINING_JOBS.states(here.aws, Project("inline", ""))
    TRAINING_JOBS.wait_until_over(here.aws, job, 0.1)
    used = ("--project", "inline", "--image", IMAGE, "--role", ROLE)
    usual: dict[str, tuple[object, ...]] = {
        "deploy": (*used, "--model", packed),
        "train": (*used, "--data", data, "--weights", "none", "--quantize", "off"),
        "delete": ("--project", "inline", "--yes"), "iam-role": ("--project", "inline"),
    }  # fmt: skip
    recipe = tmp_path / "mine.toml"
    recipe.write_text("profile = false\n")
    with answering((200, {}, GOOD)) as (url, _):
        stands_for = {
            "JOB": job, "MODEL": packed, "URI": IMAGE, "NAME": "inline", "pictures": asked, "photos": asked,
            "http://127.0.0.1:8080": url, "FILE.toml": recipe, "answers.json": tmp_path / "answers.json",
        }  # fmt: skip
        usual["invoke"] = "--url", url
        for words in named():
            if set(words) <= ELSEWHERE:
                continue
            name = words[0] if words[0] in COMMANDS else command_of(words)
            given = [stands_for.get(word, word) for word in words if word != name]
            if words[-1] in VALUES:
                given.append(VALUES[words[-1]])
            # Of a flag that is given twice the last counts.
            more = ["--dry-run"] if "--dry-run" in options_of(name) and "--dry-run" not in given else []
            before = here.cloud.plane.leftovers()
            told(caplog, name, *usual[name], *given, *more)
            assert here.cloud.plane.leftovers() == before, words


def test_the_readmes_python_asks_a_service_and_would_ask_an_endpoint(
    here: Account, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "photos").symlink_to(asked)
    monkeypatch.chdir(tmp_path)
    with answering((200, {}, GOOD)) as (url, _):
        exec(block.replace("http://127.0.0.1:8080", url), {})
    lines = capsys.readouterr().out.splitlines()
    label = GOOD["predictions"][0]["label"]
    assert sorted(lines) == sorted(f"{Path('photos') / path.name} {label}" for path in asked.iterdir())
    (target,) = re.findall(r"`(EndpointTarget\(.*?\))`, with", text)
    assert eval(target, {"EndpointTarget": EndpointTarget, "connect": connect}).name == "endpoint resnet34"
