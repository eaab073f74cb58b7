"""What is asked of AWS agrees with AWS's own service model: names, lengths, patterns, allowed values."""

import json
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore.validate import ParamValidator

from container import drivers
from tests.rehearsal.cloud import violations
from training.errors import ConfigError
from training.launch import autoscaling, batch, debugger, endpoint, jobs, tuning
from training.launch.__main__ import main
from training.launch.amis import AMIS, ami_for
from training.launch.errors import LaunchError
from training.launch.hosting import INSTANCE, STARTUP_S, Hosting, config_request
from training.launch.images import Image
from training.launch.names import Project
from training.tuning.config import TuningConfig

PROJECT = Project("resnet34", "sagemaker-eu-central-1-123456789012")
ROLE = "arn:aws:iam::123456789012:role/resnet34-sagemaker"
IMAGE = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/resnet34-sagemaker:1"
CHANNELS = {"train": PROJECT.uri("data", "train-1/"), "weights": PROJECT.uri("data", "weights-1/")}
SESSION = botocore.session.get_session()


def problems(operation: str, request: dict[str, Any], service: str = "sagemaker") -> list[str]:
    shape = SESSION.get_service_model(service).operation_model(operation).input_shape
    named = ParamValidator().validate(request, shape)  # unknown and missing names, and types, at every level
    return [*violations(request, shape, ""), *([named.generate_report()] if named.has_errors() else [])]


def test_what_is_wrong_far_inside_a_request_is_found() -> None:
    request = {"TrainingJobName": "j", **jobs.request(PROJECT, training(), "eu-central-1")}
    request["ResourceConfig"]["InstanceKind"] = "ml.g5.xlarge"
    del request["OutputDataConfig"]["S3OutputPath"]
    (report,) = problems("CreateTrainingJob", request)
    assert "InstanceKind" in report and "S3OutputPath" in report


def training(**changes: Any) -> jobs.Training:
    given = {"image": IMAGE, "role": ROLE, "channels": CHANNELS, "hyperparameters": {"epochs": "3"}, **changes}
    return jobs.Training(**given)


MLFLOW = "arn:aws:sagemaker:eu-central-1:123456789012:mlflow-tracking-server/mine"


def asked(**changes: Any) -> dict[str, Any]:
    """The request for a training, which is valid."""
    request = jobs.request(PROJECT, training(**changes), "eu-central-1")
    assert problems("CreateTrainingJob", {"TrainingJobName": "resnet34-train-12345678-1", **request}) == []
    return request


def test_a_training_is_a_valid_request_and_its_tensorboard_goes_to_s3() -> None:
    request = asked()
    assert request["TensorBoardOutputConfig"] == {
        "LocalPath": "/opt/ml/output/data/tensorboard", "S3OutputPath": PROJECT.uri("tensorboard")
    }  # fmt: skip
    assert request["RetryStrategy"] == {"MaximumRetryAttempts": 1}
    for name in ("MlflowConfig", "DebugHookConfig", "DebugRuleConfigurations", "ProfilerConfig"):
        assert name not in request
    assert "KeepAlivePeriodInSeconds" not in request["ResourceConfig"]


def test_a_training_says_how_often_it_is_tried_and_how_long_its_instances_stay() -> None:
    machines = jobs.Machines(keep_warm_minutes=10, retries=3, count=2, instance="ml.g4dn.12xlarge")
    request = asked(machines=machines)
    assert request["RetryStrategy"] == {"MaximumRetryAttempts": 3}
    assert request["ResourceConfig"] == {
        "InstanceType": "ml.g4dn.12xlarge", "InstanceCount": 2, "VolumeSizeInGB": 50, "KeepAlivePeriodInSeconds": 600
    }  # fmt: skip


def test_a_training_reports_to_mlflow_where_that_is_asked() -> None:
    assert asked(mlflow=MLFLOW)["MlflowConfig"] == {
        "MlflowResourceArn": MLFLOW, "MlflowExperimentName": PROJECT.name
    }  # fmt: skip


def test_a_spot_job_waits_longer_than_it_runs_and_keeps_checkpoints() -> None:
    request = jobs.request(PROJECT, training(machines=jobs.Machines(spot=True, max_hours=2)), "eu-central-1")
    stopping = request["StoppingCondition"]
    assert stopping["MaxWaitTimeInSeconds"] > stopping["MaxRuntimeInSeconds"] == 7200
    place = request["CheckpointConfig"]["S3Uri"]
    assert place.startswith(PROJECT.uri("checkpoints")) and place.endswith("/")
    with pytest.raises(ConfigError, match="not for --spot"):
        jobs.Machines(spot=True, keep_warm_minutes=5)


def test_debugger_is_asked_for_with_rules_of_aws() -> None:
    request = asked(debugger=True)
    assert {rule["RuleParameters"]["rule_to_invoke"] for rule in request["DebugRuleConfigurations"]} == set(
        debugger.RULES
    )
    image = "482524230118.dkr.ecr.eu-central-1.amazonaws.com/sagemaker-debugger-rules:latest"
    assert {rule["RuleEvaluatorImage"] for rule in request["DebugRuleConfigurations"]} == {image}
    hook = request["DebugHookConfig"]
    assert hook["S3OutputPath"] == PROJECT.uri("debugger")
    assert [each["CollectionName"] for each in hook["CollectionConfigurations"]] == [
        "losses", "weights", "gradients", "biases", "relu_output"
    ]  # fmt: skip
    assert {json.dumps(each["CollectionParameters"]) for each in hook["CollectionConfigurations"]} == {
        '{"save_interval": "500"}'
    }  # fmt: skip
    assert request["ProfilerConfig"] == {
        "S3OutputPath": PROJECT.uri("profiler"), "ProfilingIntervalInMilliseconds": 500
    }  # fmt: skip
    assert "TensorBoardOutputConfig" not in request
    assert debugger.rules_image("cn-north-1").startswith("618459771430.dkr.ecr.cn-north-1.amazonaws.com.cn/")
    with pytest.raises(ConfigError, match=r"--debugger: AWS has no Debugger in eu-nowhere-1, only in .*leave it out"):
        debugger.rules_image("eu-nowhere-1")


@pytest.mark.slow  # as make test-slow installs the group sagemaker
def test_the_accounts_of_debuggers_images_are_those_of_the_sdk() -> None:
    table = next(iter(Path(boto3.__file__).parents[1].glob("sagemaker/core/image_uri_config/debugger.json")), None)
    if table is None:
        pytest.skip("the group sagemaker is not installed")
    assert json.loads(table.read_text())["versions"]["latest"]["registries"] == debugger.ACCOUNTS


def test_the_same_training_has_the_same_name_and_another_has_another() -> None:
    one, two, other = (
        PROJECT.of("train", jobs.request(PROJECT, training(hyperparameters=values), "eu-central-1"))
        for values in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"a": "1"})
    )
    assert one == two != other


@pytest.mark.parametrize("strategy", ["Bayesian", "Random"])
def test_a_search_is_a_valid_request(strategy: tuning.Strategy) -> None:
    search = tuning.Search(TuningConfig(), 3, strategy)
    request = tuning.request(PROJECT, training(hyperparameters={"weights": "none"}), search, "eu-central-1")
    name = f"{PROJECT.of('t', request)}-99"
    assert problems("CreateHyperParameterTuningJob", {"HyperParameterTuningJobName": name, **request}) == []


def test_the_longest_project_still_has_valid_names() -> None:
    longest = Project("a" * 18, "b")
    assert len(f"{longest.of('t', {})}-99") <= 32
    with pytest.raises(ConfigError, match="1 to 18 small letters"):
        Project("a" * 19, "b")


def test_what_is_given_is_not_tuned_and_nothing_left_is_an_error() -> None:
    found = tuning.ranges(TuningConfig(), {"epochs": "3"})
    assert found["IntegerParameterRanges"] == []
    with pytest.raises(LaunchError, match="nothing is left to tune"):
        tuning.ranges(TuningConfig(), {"epochs": "3", "batch_size": "8", "learning_rate": "0.1"})


@pytest.mark.parametrize(
    ("hosting", "shadow"),
    [
        (Hosting(), None),
        (Hosting(min_count=2, max_count=4, capture_percent=20, startup_s=900), "shadow-model"),
        (Hosting("serverless", max_concurrency=10), None),
        (Hosting("async", min_count=0, max_count=2), None),
        (Hosting(instance="ml.c6i.xlarge"), None),
    ],
)
def test_every_kind_of_endpoint_is_a_valid_request(hosting: Hosting, shadow: str | None) -> None:
    request = config_request(PROJECT, "model-1", hosting, shadow)
    assert problems("CreateEndpointConfig", request) == []
    variant = request["ProductionVariants"][0]
    gpu = hosting.kind != "serverless" and hosting.instance.startswith("ml.g")
    assert ("InferenceAmiVersion" in variant) == gpu
    observed = {"EnableEnhancedMetrics": True, "EnableDetailedObservability": True}  # AWS reads /metrics then
    assert request.get("MetricsConfig") == (None if hosting.kind == "serverless" else observed)
    capture = request.get("DataCaptureConfig")
    assert (capture is not None) == (hosting.capture_percent > 0)
    if capture:
        assert capture["EnableCapture"] and capture["InitialSamplingPercentage"] == 20
        assert capture["DestinationS3Uri"] == PROJECT.uri("captured")
        assert {each["CaptureMode"] for each in capture["CaptureOptions"]} == {"Input", "Output"}
    variants = [variant, *request.get("ShadowProductionVariants", ())]
    assert len(variants) == (1 if shadow is None else 2)
    for each in variants:
        for name in ("ContainerStartupHealthCheckTimeoutInSeconds", "ModelDataDownloadTimeoutInSeconds"):
            assert each.get(name) == (None if hosting.kind == "serverless" else hosting.startup_s)


@pytest.mark.parametrize("startup_s", [STARTUP_S, 3600])
@pytest.mark.parametrize(("count", "kind"), [(1, "ALL_AT_ONCE"), (3, "CANARY")])
def test_an_update_goes_back_by_alarms_which_have_the_time_to_be_raised(count: int, kind: str, startup_s: int) -> None:
    config = endpoint.deployment(Hosting(min_count=count, max_count=count, startup_s=startup_s), ["a", "b"])
    given = {"EndpointName": "e", "EndpointConfigName": "c", "DeploymentConfig": config}
    assert problems("UpdateEndpoint", given) == []
    policy = config["BlueGreenUpdatePolicy"]
    traffic = policy["TrafficRoutingConfiguration"]
    assert traffic["Type"] == kind
    # 120 s more: metrics come a minute late, and the first period may have been half without traffic.
    raised_s = endpoint.ALARM_PERIOD_S * endpoint.ALARM_PERIODS + 120
    assert policy["TerminationWaitInSeconds"] >= raised_s
    assert kind != "CANARY" or traffic["WaitIntervalInSeconds"] >= raised_s
    waits_s = policy["TerminationWaitInSeconds"] + traffic["WaitIntervalInSeconds"]
    assert policy["MaximumExecutionTimeoutInSeconds"] >= startup_s + waits_s + 1800


def test_autoscaling_follows_requests_and_concurrency_or_the_backlog() -> None:
    for hosting, names in (
        (Hosting(max_count=3), {"resnet34-requests", "resnet34-concurrency"}),
        (Hosting("async", min_count=0), {"resnet34-backlog"}),
    ):
        wanted = autoscaling.policies(PROJECT, hosting)
        assert set(wanted) == names
        for name, tracking in wanted.items():
            request = {
                "PolicyName": name, "PolicyType": "TargetTrackingScaling", "ServiceNamespace": "sagemaker",
                "ResourceId": autoscaling.resource(PROJECT), "ScalableDimension": autoscaling.DIMENSION,
                "TargetTrackingScalingPolicyConfiguration": tracking,
            }  # fmt: skip
            assert problems("PutScalingPolicy", request, "application-autoscaling") == []
            assert tracking["TargetValue"] == {"requests": 1200, "concurrency": 16, "backlog": 5}[name.split("-")[1]]
    for kind, name in (("realtime", "backlog"), ("async", "requests"), ("serverless", "concurrency")):
        with pytest.raises(ConfigError, match=f"--scale-at-{name}: a {kind} endpoint (scales by|is scaled by AWS)"):
            autoscaling.require_targets(kind, {name: 1.0})  # type: ignore[arg-type]


def test_a_batch_is_a_valid_request_within_its_100_megabytes() -> None:
    request = batch.request(PROJECT, "model-1", PROJECT.uri("batch", "1", "input") + "/")
    assert problems("CreateTransformJob", {"TransformJobName": "j", **request}) == []
    assert request["MaxPayloadInMB"] * request["MaxConcurrentTransforms"] <= 100
    assert request["BatchStrategy"] == "SingleRecord"
    assert request["TransformResources"] == {"InstanceType": batch.INSTANCE, "InstanceCount": 1}
    source = request["TransformInput"]
    assert source["SplitType"] == source["CompressionType"] == request["TransformOutput"]["AssembleWith"] == "None"
    assert source["ContentType"] == "application/octet-stream"


def test_a_batch_on_a_gpu_asks_for_the_host_on_which_the_image_can_start() -> None:
    request = batch.request(PROJECT, "model-1", PROJECT.uri("batch", "1", "input") + "/", "ml.g4dn.xlarge", 2)
    assert problems("CreateTransformJob", {"TransformJobName": "j", **request}) == []
    assert request["TransformResources"] == {
        "InstanceType": "ml.g4dn.xlarge", "InstanceCount": 2, "TransformAmiVersion": drivers.TRANSFORM_AMI
    }  # fmt: skip
    for instance, cuda, said in (
        (batch.INSTANCE, (13, 0), ""),
        ("ml.g5.xlarge", (12, 2), ""),
        ("ml.g5.xlarge", (13, 0), "driver 535 at most, on which CUDA 13.0 runs by forward compatibility alone"),
        ("ml.g5.xlarge", None, "the image, which has no CUDA, leaves it unused"),
    ):
        found = batch.caution(instance, Image("uri", cuda))
        assert said in found and bool(said) == bool(found)
    assert "13.0" not in batch.caution("ml.g5.xlarge", Image("uri", (13, 0), known=False))
    with pytest.raises(ConfigError, match="CUDA 13 dropped its GPU"):
        batch.caution("ml.p3.2xlarge", Image("uri", (13, 0)))


def test_what_cannot_be_hosted_is_refused() -> None:
    with pytest.raises(ConfigError, match="only an asynchronous endpoint can go down to 0"):
        Hosting(min_count=0)
    with pytest.raises(ConfigError, match="1024, 2048"):
        Hosting("serverless", memory_mb=1000)
    with pytest.raises(ConfigError, match="CUDA 13 dropped its GPU"):
        ami_for("ml.p3.2xlarge")
    with pytest.raises(ConfigError, match="look like ml"):
        ami_for("g5.xlarge")


def test_the_amis_are_those_that_aws_lists() -> None:
    known = SESSION.get_service_model("sagemaker").shape_for("ProductionVariantInferenceAmiVersion").enum
    assert {ami.name for ami in AMIS} == {name for name in known if "neuron" not in name}
    assert ami_for("ml.g4dn.xlarge") == "al2023-ami-sagemaker-inference-gpu-4-1"
    assert ami_for("ml.g5.xlarge", (12, 4)) == "al2-ami-sagemaker-inference-gpu-3-1"
    assert ami_for("ml.c6i.xlarge") is None


def test_default_instances_exist_at_aws_and_have_a_price() -> None:
    from training.launch.cost import USD_PER_HOUR, hourly

    model = SESSION.get_service_model("sagemaker")
    assert set(USD_PER_HOUR) <= set(model.shape_for("ProductionVariantInstanceType").enum)
    assert jobs.INSTANCE in model.shape_for("TrainingInstanceType").enum
    assert batch.INSTANCE in model.shape_for("TransformInstanceType").enum
    assert {jobs.INSTANCE, INSTANCE, batch.INSTANCE} <= set(USD_PER_HOUR)
    assert "not in our price table" in hourly("ml.new.xlarge")


@pytest.mark.parametrize(
    ("command", "flag", "value", "said"),
    [
        (["status"], "--poll-seconds", "0", "above 0"),
        (["status"], "--poll-seconds", "nan", "above 0"),
        (["train", "--data", "d"], "--max-hours", "-1", "above 0"),
        (["train", "--data", "d"], "--keep-warm-minutes", "61", "from 0 to 60"),
        (["train", "--data", "d"], "--mlflow", "http://host:5000", "--mlflow-uri"),
        (["deploy"], "--capture-percent", "200", "from 0 to 100"),
        (["deploy"], "--startup-seconds", "5", "from 60 to 3600"),
        (["deploy"], "--max", "0", "from 1 to 1000"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_before_anything(
    command: list[str], flag: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, flag, value]) == 2
    assert f"given {value}, allowed" in (stderr := capsys.readouterr().err) and said in stderr
