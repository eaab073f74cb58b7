"""Before anything costs: what would be done and what it costs, and a dry run changes nothing."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.launch.in_process import ROLE, Account
from tests.launch.telling import told
from tests.rehearsal.start import IMAGE
from training.flags import flag
from training.launch.__main__ import main
from training.launch.cost import DATE, PAGE
from training.tuning.config import TuningConfig

NOTE = re.escape(f"(us-east-1, estimate of {DATE}; {PAGE})")
CHANGES = re.compile(r" (Create|Put|Update|Delete|Register|Deregister|Start|Stop|Post|Upload|Abort|Invoke)")
SMALL = ("--weights", "none", "--quantize", "off")


def dry(here: Account, caplog: pytest.LogCaptureFixture, *command: object) -> str:
    """What a dry run tells; AWS was asked for nothing that changes anything."""
    before = here.calls
    said = told(caplog, *command, "--project", "planned", "--dry-run")
    assert [call for call in here.calls - before if CHANGES.search(call)] == []
    return said


def cost(said: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith("cost: ")]
    return line


def test_a_dry_run_of_train_tells_job_and_price(here: Account, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = ("train", "--data", data, "--image", IMAGE, "--role", ROLE, *SMALL, "--epochs", 3)
    said = dry(here, caplog, *train, "--spot", "--max-hours", 2)
    assert re.fullmatch(
        rf"cost: 1 x ml\.g5\.xlarge: about 1\.41 USD per hour {NOTE}; at most 2\.82 USD in 2 h; spot instances .* less",
        cost(said),
    )
    assert re.search(r"would upload \d+ files, 0\.\d MB, to s3://", said)
    lines = dict(re.findall(r"^  (\S+(?: train)?) +(\S.*)$", said, re.MULTILINE))
    assert re.fullmatch(r"planned-train-[0-9a-f]{8}-1", lines["job"])
    assert (lines["image"], lines["role"]) == (IMAGE, ROLE)
    assert lines["machines"].startswith("1 x ml.g5.xlarge, 50 GB each; ends after 2 h") and lines["spot"].startswith(
        "yes"
    )
    assert lines["channel train"].startswith("s3://sagemaker-eu-central-1-123456789012/planned/data/train-")
    assert "epochs=3" in lines["hyperparameters"].split()
    assert lines["output"] == "s3://sagemaker-eu-central-1-123456789012/planned/jobs"
    assert "not in our price table" in cost(dry(here, caplog, *train, "--instance", "ml.g99.xlarge"))
    warm = cost(dry(here, caplog, *train, "--max-hours", 2, "--keep-warm-minutes", 30))
    assert warm.endswith("; at most 3.52 USD in 2 h and 30 min that it is kept warm")


def test_a_dry_run_of_tune_tells_trials_and_price(here: Account, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = dry(
        here, caplog, "tune", "--data", data, "--image", IMAGE, "--role", ROLE, *SMALL, "--trials", 3, "--parallel", 2,
        "--instance", "ml.g4dn.xlarge", "--instances", 2, "--max-hours", 2, "--epochs", 7,
    )  # fmt: skip
    assert re.fullmatch(
        rf"cost: 3 trials, 2 at once; each 2 x ml\.g4dn\.xlarge: about 1\.47 USD per hour {NOTE}; "
        r"at most 8\.83 USD for all 3 trials of 2 h",
        cost(said),
    )
    assert re.search(r"  job +planned-t-[0-9a-f]{8}-1\n", said) and "--parallel" not in said
    assert '"MaxNumberOfTrainingJobs": 3' in said and '"MaxParallelTrainingJobs": 2' in said


@pytest.mark.parametrize(
    ("flags", "price"),
    [
        (("--max", 3), rf"1 to 3 x ml\.g4dn\.xlarge: about 0\.74 to 2\.21 USD per hour, 540 to 1,610 a month {NOTE}"),
        (("--min", 2, "--max", 2), rf"2 x ml\.g4dn\.xlarge: about 1\.47 USD per hour, 1,070 a month {NOTE}"),
        (("--kind", "serverless"), rf"serverless, 4096 MB: about 0\.29 USD per hour of computing, .* \({DATE}\)"),
        (
            ("--kind", "async", "--min", 0, "--max", 1),
            rf"0 to 1 x ml\.g4dn\.xlarge: 0 USD while idle, else up to about 0\.74 USD per hour, 540 a month {NOTE}",
        ),
        (("--instance", "ml.g5.24xlarge"), r"1 x ml\.g5\.24xlarge: not in our price table; see \S+"),
    ],
)
def test_a_dry_run_of_deploy_tells_endpoint_and_price(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture, flags: tuple[object, ...], price: str
) -> None:
    said = dry(here, caplog, "deploy", "--model", packed, "--image", IMAGE, "--role", ROLE, *flags)
    assert re.fullmatch(f"cost: {price}", cost(said))
    assert "would register it and bring endpoint planned to" in said
    assert re.search(rf"  image +{re.escape(IMAGE)}\n  role +{ROLE}\n  model data +s3://\S+/planned/models/\S+", said)
    assert re.search(r"model: .* version \S+, validation accuracy \d", said)
    assert ("would let it scale" in said) is (0 in flags or flags == ("--max", 3))


def test_a_dry_run_of_deploy_names_the_containers_variables_without_what_they_hold(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deploy = ("deploy", "--model", packed, "--image", IMAGE, "--role", ROLE, "--startup-seconds", 900)
    said = dry(here, caplog, *deploy, "--env", "TOKEN=SECRET", "--env", "image=SECRET")
    assert re.search(rf"  image +{re.escape(IMAGE)}\n", said) and "SECRET" not in said
    for name in ("TOKEN", "image", "CLASSIFIER_START_TIMEOUT_S"):
        assert re.search(rf"^  env {name} +\*\*\*$", said, re.MULTILINE)


def test_a_shadow_is_in_the_price_and_does_not_scale(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    deploy = ("deploy", "--model", packed, "--shadow", packed, "--image", IMAGE, "--role", ROLE)
    assert re.fullmatch(
        rf"cost: 1 x ml\.g4dn\.xlarge, and 1 for the shadow: about 1\.47 USD per hour, 1,070 a month {NOTE}",
        cost(dry(here, caplog, *deploy)),
    )
    assert "1 to 3 x ml.g4dn.xlarge, and 1 for the shadow: about 1.47 to 2.94 USD per hour" in cost(
        dry(here, caplog, *deploy, "--max", 3)
    )


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for number in range(3):
            picture = Image.new("RGB", (400, 300), (number, 0, 0))
            picture.save(tmp_path / "photographs" / name / f"{number}.jpg")
    return tmp_path / "photographs"


@pytest.mark.parametrize("command", ["train", "tune"])
def test_photographs_that_would_be_looked_at_as_stamps_are_told(
    here: Account, data: Path, photographs: Path, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    learn = (command, "--image", IMAGE, "--role", ROLE, *SMALL)
    hint = "the pictures are about 300 px, and the training looks at them at 32 px: --side 224 suits photographs"
    assert hint in dry(here, caplog, *learn, "--data", photographs)
    for more in (("--data", photographs, "--side", "32"), ("--data", data)):
        assert "the pictures are about" not in dry(here, caplog, *learn, *more)


def test_a_dry_run_tells_the_settings_that_nobody_gave_too(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learn = ("--data", data, "--image", IMAGE, "--role", ROLE, *SMALL, "--epochs", 3)
    said = dry(here, caplog, "train", *learn)
    (line,) = [line for line in said.splitlines() if line.startswith("would train with: ")]
    for setting in ("side=32", "epochs=3", "learning_rate=0.01748", "batch_size=128", "weights=none", "freeze=none"):
        assert f" {setting}" in line
    assert "output=" not in line and "device=" not in line
    said = dry(here, caplog, "tune", *learn)
    (line,) = [line for line in said.splitlines() if line.startswith("would try them with: ")]
    assert " side=32" in line and " epochs=3" in line and " learning_rate=" not in line and "batch_size=" not in line


def test_dry_runs_of_the_other_commands_change_nothing(
    here: Account, packed: Path, asked: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = dry(here, caplog, "batch", "--model", packed, "--image", IMAGE, "--role", ROLE, asked, "--env", "A=SECRET")
    assert re.fullmatch(rf"cost: 1 x ml\.c6i\.2xlarge: about 0\.41 USD per hour {NOTE}", cost(said))
    assert "would classify 5 images with version " in said and "SECRET" not in said
    lines = dict(re.findall(r"^  (image|role|model data|images|env A) +(\S+)$", said, re.MULTILINE))
    assert (lines["image"], lines["role"], lines["env A"]) == (IMAGE, ROLE, "***")
    for name, below in (("model data", "models"), ("images", "batch")):
        assert lines[name].startswith(f"s3://sagemaker-eu-central-1-123456789012/planned/{below}/")
    gpu = ("batch", "--model", packed, "--image", IMAGE, "--role", ROLE, asked, "--instance", "ml.g4dn.xlarge")
    assert "runs by forward compatibility alone; a job for which that fails ends at its start; without --inst" in dry(
        here, caplog, *gpu
    )
    assert "would make role planned-sagemaker" in dry(here, caplog, "iam-role")
    assert "MB, to s3://" in dry(here, caplog, "upload", "--data", data)
    assert "has nothing to remove" in dry(here, caplog, "delete", "--data", "--role")


def test_the_help_of_tune_names_what_is_searched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for name in TuningConfig.model_fields.keys() - {"timeout_minutes"}:  # which is refused here
        assert flag(name) in said, name
    defaults = TuningConfig.create({})
    assert ",".join(map(str, defaults.batch_sizes)) in said and f"(default: {defaults.trials})" in said
    for low, high in (defaults.learning_rate_range, defaults.epochs_range):
        assert f"({low}:{high})" in said
    assert "a trial that loses its machine begins anew" in said and "goes on from its checkpoints" not in said


def test_the_price_is_told_before_the_job_is_started(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    said = told(
        caplog, "train", "--project", "priced", "--data", data, "--image", IMAGE, "--role", ROLE, *SMALL, "--no-wait"
    )
    assert said.index("cost: ") < said.index("is started")


def test_a_dry_run_says_which_job_is_there_and_that_fewer_trials_run_at_once(
    here: Account, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learn = ("--project", "there", "--data", data, "--image", IMAGE, "--role", ROLE, *SMALL)
    told(caplog, "train", *learn, "--no-wait")
    assert re.search(r"  job +there-train-[0-9a-f]{8}-1, which is there: ", told(caplog, "train", *learn, "--dry-run"))
    said = told(caplog, "tune", *learn, "--parallel", 20, "--trials", 2, "--dry-run")
    assert "--parallel 20: of --trials 2 no more run at once" in said


def test_the_trainings_own_profiler_and_hook_are_switched_in_a_recipe(
    here: Account, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text('profile = false\ndebugger = "on"\n')
    train = ("train", "--data", data, "--image", IMAGE, "--role", ROLE, *SMALL, "--recipe", tmp_path / "mine.toml")
    assert re.search(r"hyperparameters +.*profile=false debugger=on", dry(here, caplog, *train))
    tune = ("tune", "--project", "planned", *train[1:], "--dry-run")
    assert "profile, debugger: trials are not watched" in told(caplog, *tune, status=2)
    assert main(["train", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert 'profile = false (no profiler) or debugger = "on"' in said
