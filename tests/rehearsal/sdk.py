"""The SageMaker SDK as a second client: what AWS's own library asks for, our image answers as well."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from service.model.archive import unpack
from service.model.artifact import open_artifact
from tests.rehearsal.containers import free_port
from tests.rehearsal.start import IMAGE, ROOT, Rehearsal
from training.launch.policies import trust_policy

TELL = """
import sys

def tell(text):
    sys.stdout.write(f"\\nSDK {text}\\n")  # at once: the SDK's threads write their containers' logs there, too
    sys.stdout.flush()
"""

TRAIN = """
import sys
from sagemaker.core.helper.session_helper import Session
from sagemaker.train import ModelTrainer
from sagemaker.train.configs import Compute, InputData, OutputDataConfig, StoppingCondition
import boto3

image, role, bucket, data = sys.argv[1:]
session = Session(boto_session=boto3.Session(), default_bucket=bucket)
trainer = ModelTrainer(
    training_image=image, role=role, sagemaker_session=session, base_job_name="by-sdk",
    compute=Compute(instance_type="ml.m5.xlarge", instance_count=1, volume_size_in_gb=30),
    stopping_condition=StoppingCondition(max_runtime_in_seconds=3600),
    output_data_config=OutputDataConfig(s3_output_path=f"s3://{bucket}/sdk"),
    hyperparameters={"weights": "none", "epochs": 1, "batch_size": 8, "learning_rate": 0.02, "quantize": "off",
                     "report": False},
)
trainer.train(input_data_config=[InputData(channel_name="train", data_source=data)], wait=True, logs=False)
job = trainer._latest_training_job
tell(f"{job.training_job_status} {job.model_artifacts.s3_model_artifacts}")
"""

TRAIN_HERE = """
import sys
from sagemaker.train import ModelTrainer
from sagemaker.train.configs import Compute, InputData
from sagemaker.train.model_trainer import Mode

image, root, data = sys.argv[1:]
trainer = ModelTrainer(
    training_mode=Mode.LOCAL_CONTAINER, training_image=image, base_job_name="by-sdk", local_container_root=root,
    compute=Compute(instance_type="local_cpu", instance_count=1), environment={"OMP_NUM_THREADS": "1"},
    hyperparameters={"weights": "none", "epochs": 1, "batch_size": 8, "learning_rate": 0.02, "quantize": "off",
                     "report": False},
)
trainer.train(input_data_config=[InputData(channel_name="train", data_source=data)])
tell("trained")
"""

SERVE = """
import sys, time, urllib.request
from pathlib import Path
from sagemaker.core.local import LocalSession

image, folder, port, picture, bucket = sys.argv[1:]
session = LocalSession(default_bucket=bucket)
session.config = {"local": {"serving_port": int(port), "local_code": True}}
client = session.sagemaker_client
container = {"Image": image, "ModelDataUrl": Path(folder).as_uri(), "Environment": {"CLASSIFIER_WORKERS": "1"}}
client.create_model(ModelName="by-sdk", PrimaryContainer=container)
variant = {"VariantName": "main", "ModelName": "by-sdk", "InitialInstanceCount": 1, "InstanceType": "local"}
client.create_endpoint_config(EndpointConfigName="by-sdk", ProductionVariants=[variant])
client.create_endpoint(EndpointName="by-sdk", EndpointConfigName="by-sdk")
try:
    answer = session.sagemaker_runtime_client.invoke_endpoint(
        EndpointName="by-sdk", Body=Path(picture).read_bytes(), ContentType="image/png", Accept="application/json"
    )
    tell(answer["Body"].read().decode())
finally:
    client.delete_endpoint(EndpointName="by-sdk")
"""


@contextmanager
def _environment(cloud: Rehearsal) -> Iterator[dict[str, str]]:
    """The cloud's, and the SDK's telemetry off: it would go to the network."""
    with TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.yaml"
        config.write_text("SchemaVersion: '1.0'\nSageMaker:\n  PythonSDK:\n    Modules:\n      TelemetryOptOut: true\n")
        yield {**cloud.environment, "SAGEMAKER_USER_CONFIG_OVERRIDE": str(config)}


def _run(cloud: Rehearsal, code: str, *arguments: str, limit_s: float = 300) -> str:
    """What the program tells last (TELL). Raises: ValueError."""
    with _environment(cloud) as environment:
        done = subprocess.run(
            [sys.executable, "-c", TELL + code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=limit_s, check=False,
        )  # fmt: skip
    said = [line.removeprefix("SDK ") for line in done.stdout.splitlines() if line.startswith("SDK ")]
    if done.returncode or not said:
        raise ValueError(f"{done.stdout[-800:]} {done.stderr[-1500:]}")
    return said[-1]


def train_by_sdk(cloud: Rehearsal, data: Path) -> str:
    """ModelTrainer, hyperparameters JSON-quoted as it does, to the end. Raises: ValueError."""
    iam = cloud.client("iam")
    # ModelTrainer refuses roles without permissions for a VPC, which the product's role has not: nothing uses one.
    allowed = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    role = iam.create_role(RoleName="by-sdk", AssumeRolePolicyDocument=json.dumps(trust_policy()))["Role"]["Arn"]
    iam.put_role_policy(RoleName="by-sdk", PolicyName="all", PolicyDocument=json.dumps(allowed))
    bucket = f"sagemaker-eu-central-1-{role.split(':')[4]}"
    listed = cloud.client("s3").list_objects_v2(Bucket=bucket, Prefix="resnet34/data/train-")["Contents"]
    place = f"s3://{bucket}/{'/'.join(listed[0]['Key'].split('/')[:3])}/"
    try:
        said = _run(cloud, TRAIN, IMAGE, role, bucket, place)
    finally:
        iam.delete_role_policy(RoleName="by-sdk", PolicyName="all")
        iam.delete_role(RoleName="by-sdk")
        _remove_of_sdk(cloud, bucket)
    if not said.startswith("Completed"):
        raise ValueError(said)
    return "ModelTrainer trained with the same image and data, hyperparameters quoted its way"


def _remove_of_sdk(cloud: Rehearsal, bucket: str) -> None:
    """What ModelTrainer and its job wrote, beside the project's own."""
    s3 = cloud.client("s3")
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", ()):
            if not entry["Key"].startswith("resnet34/"):
                s3.delete_object(Bucket=bucket, Key=entry["Key"])


def train_here_by_sdk(cloud: Rehearsal, data: Path, folder: Path, image: str) -> Path:
    """The SDK's local container mode runs `image`, which trains; returns the archive it makes, in `folder`, a model.

    It gives the container no command, so the image's own must be `train`. Raises: ValueError, ArtifactError.
    """
    root, archive = folder / "trained-by-sdk", folder / "trained-by-sdk.tar.gz"
    root.mkdir()
    try:
        _run(cloud, TRAIN_HERE, image, str(root), str(data), limit_s=1200)
        shutil.copy(root / "compressed_artifacts" / "model.tar.gz", archive)
    finally:
        for container in _listed(f"label=com.docker.compose.project.working_dir={root}"):
            _docker("rm", "--force", container)
        _docker("run", "--rm", "--volume", f"{root}:/left", "--entrypoint", "chmod", image, "-R", "a+rwX", "/left")
        shutil.rmtree(root, ignore_errors=True)  # of which the container's part belongs to root; what failed is told
    with TemporaryDirectory() as unpacked:
        unpack(archive, Path(unpacked))
        open_artifact(Path(unpacked)).verify()
    return archive


def serve_by_sdk(cloud: Rehearsal, archive: Path, pictures: Path, image: str) -> str:
    """The SDK's local container mode runs `IMAGE serve` and asks it. Raises: ValueError."""
    picture = sorted(pictures.iterdir())[0]
    ended = ("ancestor=" + image, "name=algo-1-", "status=exited")
    before = _listed(*ended)
    try:
        said = json.loads(_run(cloud, SERVE, image, str(archive), str(free_port()), str(picture), "unused-bucket"))
    finally:  # the SDK stops its container and leaves it there
        for name in _listed(*ended) - before:
            _docker("rm", name)
    return f"LocalSession ran `{image} serve`, which takes {picture.name} for {said['predictions'][0]['label']}"


def _listed(*filters: str) -> set[str]:
    """The containers, by name, that all the filters leave."""
    flags = [part for each in filters for part in ("--filter", each)]
    return set(_docker("ps", "--all", "--format", "{{.Names}}", *flags).split())


def _docker(*arguments: str) -> str:
    """What docker says; nothing where it fails: it tidies up, and what went wrong before must be told."""
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False).stdout
