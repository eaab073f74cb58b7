"""What `status` writes to stdout of an endpoint and its jobs, and what `delete` says: where it looked, what stays."""

import re
from pathlib import Path

import pytest

from tests.launch.in_process import ROLE, Account
from tests.launch.telling import problem, shown, told
from tests.launch.test_interrupted import train
from tests.rehearsal.start import IMAGE
from training.launch import autoscaling, registry
from training.launch import data as s3
from training.launch.hosting import Hosting, config_request
from training.launch.names import Project


def test_status_tells_machines_models_and_prices_of_the_endpoint(
    here: Account, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project("tells", "tells")
    status = ("status", "--project", "tells", "--bucket", "tells")
    said = shown(caplog, capsys, *status)
    assert said == "project tells in eu-central-1, account 123456789012, bucket tells\n  nothing\n"
    first = config_request(project, here.model(project), Hosting())
    second = config_request(project, here.model(project, SAYS="two"), Hosting(), here.model(project, SAYS="3"))
    for wanted in (first, second):
        here.settle(project, wanted)
    autoscaling.apply(here.aws, project, Hosting(max_count=3))
    said = shown(caplog, capsys, *status)
    old, live = first["EndpointConfigName"], second["EndpointConfigName"]
    assert re.search(rf"endpoint configuration +{live}  current  made \d{{4}}-\d\d-\d\d \d\d:\d\d UTC", said)
    assert re.search(rf"endpoint configuration +{old}  made", said)
    assert "endpoint tells: InService, realtime\n" in said
    price = r"1 x ml\.g4dn\.xlarge: about 0\.74 USD per hour"
    assert re.search(rf"\n  machines +1 running, 1 desired; {price}", said)
    assert re.search(rf"\n  shadow's machines +1 running, 1 desired; {price}", said)
    for label, variants in (("model", "ProductionVariants"), ("shadow's model", "ShadowProductionVariants")):
        assert re.search(rf"\n  {label} +{second[variants][0]['ModelName']}\n", said)
    assert re.search(r"\n  scaling +from 1 to 3 instances\n", said)
    assert "/aws/sagemaker/Endpoints/tells, python -m training.launch logs endpoint --project tells" in said
    assert "https://eu-central-1.console.aws.amazon.com/sagemaker/home?region=eu-central-1#/endpoints/tells" in said
    assert "starts with two" in shown(caplog, capsys, "logs", "endpoint", *status[1:])


def test_status_tells_the_version_behind_the_endpoint(
    here: Account, packed: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project("version", "version")
    s3.ensure_bucket(here.aws, project)
    with registry.located(here.aws, project, str(packed)) as model:
        registry.upload(here.aws, project, model)
        package, _ = registry.register(here.aws, project, model, IMAGE, "Approved")
        name = registry.create_model(here.aws, project, {"ModelPackageName": package}, ROLE, [])
    serverless = Hosting("serverless", memory_mb=2048)
    here.client("sagemaker").create_endpoint_config(**config_request(project, name, serverless))
    client, config = here.client("sagemaker"), config_request(project, name, serverless)["EndpointConfigName"]
    client.create_endpoint(EndpointName="version", EndpointConfigName=config, Tags=project.tags)
    said = shown(caplog, capsys, "status", "--project", "version", "--bucket", "version")
    assert re.search(
        rf"model +version {model.manifest.version}, validation accuracy [\d.]+ % \(version/1 in the registry, {name}\)",
        said,
    )
    assert ", serverless\n" in said and "at most 5 requests at once; serverless, 2048 MB: about 0.14 USD" in said


def test_status_tells_what_runs_and_leaves_out_folders_that_are_not_there(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    told(caplog, *train(here, "works", data, tmp_path / "model", artifact), "--no-wait")
    said = shown(caplog, capsys, "status", "--project", "works")
    (name,) = re.findall(r"training job +(works-train-\S+)", said)
    assert "what jobs write while they are stopped" not in said and "works/data/" in said
    assert re.search(rf"\njob {name}: InProgress, started \d+ s ago, 1 x ml\.g5\.xlarge: about 1\.41 USD", said)
    for part in (f"logs {name} --follow --project works", f"stop {name} --project works", f"#/jobs/{name}\n"):
        assert part in said
    assert "/aws/sagemaker/TrainingJobs, https://" in said
    told(caplog, "stop", "--project", "works", name)


def test_delete_says_where_it_looked_and_what_removes_what_stays(
    here: Account, data: Path, artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    delete = ("delete", "--project", "stays")
    command = train(here, "stays", data, tmp_path / "model", artifact)
    assert "project stays has nothing to remove in eu-central-1, account 123456789012" in told(caplog, *delete)
    told(caplog, "iam-role", "--project", "stays")
    told(caplog, *command, "--no-wait")
    kept = (
        "role stays-sagemaker: python -m training.launch delete --role --project stays",
        "MB: python -m training.launch delete --data --project stays",
        "bucket sagemaker-eu-central-1-123456789012, which others may use: aws s3 rb ",
        "log group /aws/sagemaker/TrainingJobs, of the jobs of all projects: aws logs delete-log-group",
        "AWS's records of jobs that have ended: they cost nothing",
        "images in ECR",
    )
    for more, begins in (("--dry-run", "to be removed"), ("--yes", "to be removed"), ("--yes", "project stays has no")):
        said = told(caplog, *delete, more)
        assert said.startswith(begins)
        assert all(part in said for part in kept), said
    said = told(caplog, *delete, "--data", "--role", "--yes")
    assert "role stays-sagemaker:" not in said and "delete --data" not in said and kept[2] in said


def test_without_an_endpoint_invoke_says_where_it_looked_and_writes_nothing(
    here: Account, asked: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = problem(caplog, "invoke", "--project", "nobody", asked)
    assert "There is no endpoint nobody in eu-central-1: `deploy` first" in sentence
    assert capsys.readouterr().out == ""
