"""Training, tuning and transform jobs, really run: /opt/ml filled from S3, `train` executed, its files put to S3."""

import json
import random
import re
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boto3.s3.transfer import TransferConfig

from tests.rehearsal.logs import Stream
from training.launch.names import split_uri

if TYPE_CHECKING:
    from tests.rehearsal.control_plane import ControlPlane, Forward


WHOLE = TransferConfig(multipart_threshold=2**30, use_threads=False)
"""One request an object: the server is this very process."""


class Jobs:
    """Jobs by name."""

    def __init__(self, plane: "ControlPlane") -> None:
        self._plane = plane
        self._given: dict[str, dict[str, Any]] = {}
        self._more: dict[str, dict[str, Any]] = {}
        self._running: dict[str, Any] = {}
        self._stopped: set[str] = set()
        self._searches: dict[str, dict[str, Any]] = {}
        self._threads: list[threading.Thread] = []

    # Training

    def on_create_training_job(self, given: dict[str, Any], forward: "Forward") -> dict[str, Any]:
        from tests.rehearsal.control_plane import Refusal

        name = given["TrainingJobName"]
        if given["ResourceConfig"]["InstanceCount"] > 1:
            raise Refusal("ValidationException", "The rehearsal has one host; InstanceCount must be 1.")
        with self._plane.lock:  # of two at once one is refused
            if name in self._given:
                raise Refusal("ResourceInUse", f"Job name must be unique within an AWS account and region: {name}")
            answer = forward()
            self._given[name] = given
        self._begin(name, given)
        self._start(self._train, name)
        return answer

    def _begin(self, name: str, given: dict[str, Any]) -> None:
        self._given[name] = given
        now_s = time.time()
        self._more[name] = {
            "TrainingJobStatus": "InProgress", "SecondaryStatus": "Starting", "CreationTime": now_s,
            "SecondaryStatusTransitions": [
                {"Status": "Starting", "StartTime": now_s, "StatusMessage": "Preparing the instances for training"}
            ],
            "FinalMetricDataList": [],
            "AlgorithmSpecification": given["AlgorithmSpecification"],
            **{key: given[key] for key in ("Environment", "RetryStrategy", "ProfilerConfig") if key in given},
        }  # fmt: skip
        self._sync(name)

    def on_describe_training_job(self, given: dict[str, Any], forward: "Forward") -> dict[str, Any]:
        answer = forward()
        return {**answer, **self._more.get(given["TrainingJobName"], {})}

    def on_stop_training_job(self, given: dict[str, Any], _: "Forward") -> dict[str, Any]:
        from tests.rehearsal.control_plane import Refusal

        name = given["TrainingJobName"]
        if self._more.get(name, {}).get("TrainingJobStatus") != "InProgress":
            raise Refusal("ValidationException", f"The request was rejected because the training job {name} has ended.")
        self._stopped.add(name)
        self._set(name, "Stopping", "Stopping", "Stopping the training job")
        if name in self._running:
            self._start(self._running[name].stop)
        return {}

    def _set(self, name: str, status: str, secondary: str, message: str, **more: Any) -> None:
        now_s = time.time()
        record = self._more[name]
        record |= {"TrainingJobStatus": status, "SecondaryStatus": secondary, "LastModifiedTime": now_s, **more}
        record["SecondaryStatusTransitions"].append({"Status": secondary, "StartTime": now_s, "StatusMessage": message})
        self._sync(name)

    def _sync(self, name: str) -> None:
        """moto's own record, which its lists are made of."""
        job = self._plane.backend.training_jobs[name]
        job.training_job_status = self._more[name]["TrainingJobStatus"]
        job.secondary_status = self._more[name]["SecondaryStatus"]

    def _train(self, name: str) -> None:
        given = self._given[name]
        fault = self._plane.take_fault("TrainingJob")
        if fault:
            self._set(name, "Failed", "Failed", "Training job failed", FailureReason=fault["message"])
            return
        start_s = time.time()
        stream = Stream(self._plane.client("logs"), "/aws/sagemaker/TrainingJobs", f"{name}/algo-1-{int(start_s)}")
        folder = self._plane.work / name
        try:
            self._set(name, self._now(name), "Downloading", "Downloading the training image and input data")
            self._fill(folder, name, given)
            if name in self._stopped:
                self._set(name, "Stopped", "Stopped", "Training job stopped", TrainingEndTime=time.time())
                return
            self._set(name, self._now(name), "Training", "Training image download completed. Training in progress.")
            env = {"TRAINING_JOB_NAME": name, "OMP_NUM_THREADS": "1", **given.get("Environment", {})}
            self._running[name] = running = self._plane.engine.train(folder, env, stream.add)
            if name in self._stopped:
                running.stop()
            status = running.wait()
            stream.close()
            self._set(name, self._now(name), "Uploading", "Uploading generated training model")
            metrics = _metrics(stream.lines, given["AlgorithmSpecification"].get("MetricDefinitions", []))
            self._take(folder, name, given, status)
            seconds = max(1, int(time.time() - start_s))
            figures = {
                "FinalMetricDataList": metrics, "TrainingTimeInSeconds": seconds, "BillableTimeInSeconds": seconds,
                "TrainingEndTime": time.time(),
            }  # fmt: skip
            if name in self._stopped:
                self._set(name, "Stopped", "Stopped", "Training job stopped", **figures)
            elif status == 0:
                self._set(name, "Completed", "Completed", "Training job completed", **figures)
            else:
                failure = folder / "output" / "failure"
                said = failure.read_text(errors="replace")[:1024] if failure.is_file() else ""
                reason = f"AlgorithmError: {said or 'the container gave no reason'}, exit code: {status}"
                self._set(name, "Failed", "Failed", "Training job failed", FailureReason=reason, **figures)
        except Exception as exc:
            self._set(name, "Failed", "Failed", "Training job failed", FailureReason=f"InternalServerError: {exc!r}")
        finally:
            stream.close()
            self._running.pop(name, None)
            shutil.rmtree(folder, ignore_errors=True)

    def _now(self, name: str) -> str:
        return "Stopping" if name in self._stopped else "InProgress"

    def _fill(self, folder: Path, name: str, given: dict[str, Any]) -> None:
        """https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html"""
        config = folder / "input" / "config"
        for part in (config, folder / "model", folder / "output" / "data"):
            part.mkdir(parents=True)
        channels = {}
        for channel in given["InputDataConfig"]:
            source = channel["DataSource"]["S3DataSource"]["S3Uri"]
            target = folder / "input" / "data" / channel["ChannelName"]
            target.mkdir(parents=True)
            if not self.download(source, target):
                raise ValueError(f"ClientError: no S3 objects found under {source}")
            channels[channel["ChannelName"]] = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated"}
        files: dict[str, Any] = {
            "hyperparameters": given.get("HyperParameters", {}), "inputdataconfig": channels,
            "resourceconfig": {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"},
        }  # fmt: skip
        if "CheckpointConfig" in given:
            (folder / "checkpoints").mkdir()
            self.download(given["CheckpointConfig"]["S3Uri"].rstrip("/") + "/", folder / "checkpoints")
            # In the container the folder is /opt/ml/checkpoints; its path is the default, so nothing states it.
            files["checkpointconfig"] = {"S3Uri": given["CheckpointConfig"]["S3Uri"]}
        for file, content in files.items():
            (config / f"{file}.json").write_text(json.dumps(content))

    def _take(self, folder: Path, name: str, given: dict[str, Any], status: int) -> None:
        s3 = self._plane.client("s3")
        bucket, prefix = split_uri(f"{given['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{name}/output/")
        parts = [("output.tar.gz", folder / "output" / "data")]
        if status == 0:
            parts.append(("model.tar.gz", folder / "model"))
        for file, source in parts:
            packed = folder / file
            with tarfile.open(packed, "w:gz", compresslevel=1) as tar:
                for path in sorted(source.rglob("*")):
                    if path.is_file():
                        tar.add(path, path.relative_to(source).as_posix())
            s3.upload_file(str(packed), bucket, prefix + file, Config=WHOLE)
        if "CheckpointConfig" in given:
            self._mirror(folder / "checkpoints", given["CheckpointConfig"]["S3Uri"].rstrip("/") + "/")
        if "TensorBoardOutputConfig" in given:
            self._mirror(
                folder / "output" / "data" / "tensorboard",
                f"{given['TensorBoardOutputConfig']['S3OutputPath'].rstrip('/')}/{name}/tensorboard-output/",
            )  # fmt: skip

    def _mirror(self, folder: Path, place: str) -> None:
        s3, (bucket, prefix) = self._plane.client("s3"), split_uri(place)
        kept = set()
        for path in folder.rglob("*") if folder.is_dir() else ():
            if path.is_file():
                kept.add(prefix + path.relative_to(folder).as_posix())
                s3.upload_file(str(path), bucket, prefix + path.relative_to(folder).as_posix())
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                if entry["Key"] not in kept:
                    s3.delete_object(Bucket=bucket, Key=entry["Key"])

    def download(self, place: str, target: Path) -> int:
        """Every object below an S3 address; returns how many there were."""
        s3, (bucket, prefix) = self._plane.client("s3"), split_uri(place)
        count = 0
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                path = target / entry["Key"][len(prefix) :].lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                s3.download_file(bucket, entry["Key"], str(path))
                count += 1
        return count

    # Tuning

    def on_create_hyper_parameter_tuning_job(self, given: dict[str, Any], forward: "Forward") -> dict[str, Any]:
        answer = forward()
        name = given["HyperParameterTuningJobName"]
        self._searches[name] = {
            "given": given,
            "trials": [],
            "status": "InProgress",
            "stop": False,
            "created": time.time(),
        }
        self._sync_search(name)
        self._start(self._search, name)
        return answer

    def _sync_search(self, name: str) -> None:
        record = self._plane.backend.hyper_parameter_tuning_jobs
        job = record[name] if name in record else next(j for j in record.values() if j.arn.endswith(f"/{name}"))
        job.hyper_parameter_tuning_job_status = self._searches[name]["status"]

    def on_describe_hyper_parameter_tuning_job(self, given: dict[str, Any], forward: "Forward") -> dict[str, Any]:
        answer = forward()
        search = self._searches[given["HyperParameterTuningJobName"]]
        states = [self._more[trial]["TrainingJobStatus"] for trial in search["trials"]]
        done = [t for t in self._summaries(search) if "FinalHyperParameterTuningJobObjectiveMetric" in t]
        done = [t for t in done if t["TrainingJobStatus"] == "Completed"]
        best = max(done, key=lambda t: t["FinalHyperParameterTuningJobObjectiveMetric"]["Value"], default=None)
        answer |= {
            "HyperParameterTuningJobStatus": search["status"], "CreationTime": search["created"],
            "TrainingJobStatusCounters": {
                "Completed": states.count("Completed"), "InProgress": states.count("InProgress"),
                "RetryableError": 0, "NonRetryableError": states.count("Failed"), "Stopped": states.count("Stopped"),
            },
        }  # fmt: skip
        answer.pop("BestTrainingJob", None)
        answer.pop("FailureReason", None)
        if best:
            answer["BestTrainingJob"] = best
        if search.get("reason"):
            answer["FailureReason"] = search["reason"]
        return answer

    def on_list_training_jobs_for_hyper_parameter_tuning_job(
        self, given: dict[str, Any], _: "Forward"
    ) -> dict[str, Any]:  # fmt: skip
        return {"TrainingJobSummaries": self._summaries(self._searches[given["HyperParameterTuningJobName"]])}

    def _summaries(self, search: dict[str, Any]) -> list[dict[str, Any]]:
        objective = search["given"]["HyperParameterTuningJobConfig"]["HyperParameterTuningJobObjective"]["MetricName"]
        found = []
        for trial in search["trials"]:
            record, given = self._more[trial], self._given[trial]
            summary = {
                "TrainingJobName": trial, "TrainingJobArn": f"arn:aws:sagemaker:::training-job/{trial}",
                "CreationTime": record["CreationTime"], "TrainingJobStatus": record["TrainingJobStatus"],
                "TunedHyperParameters": given["Tuned"],
            }  # fmt: skip
            if "FailureReason" in record:
                summary["FailureReason"] = record["FailureReason"]
            for metric in record["FinalMetricDataList"]:
                if metric["MetricName"] == objective:
                    summary["FinalHyperParameterTuningJobObjectiveMetric"] = {**metric, "Type": "Maximize"}
            found.append(summary)
        return found

    def on_stop_hyper_parameter_tuning_job(self, given: dict[str, Any], _: "Forward") -> dict[str, Any]:
        from tests.rehearsal.control_plane import Refusal

        name = given["HyperParameterTuningJobName"]
        search = self._searches[name]
        if search["status"] != "InProgress":
            raise Refusal("ValidationException", f"The tuning job {name} has ended.")
        search["stop"], search["status"] = True, "Stopping"
        self._sync_search(name)
        for trial in search["trials"]:
            if self._more[trial]["TrainingJobStatus"] == "InProgress":
                self.on_stop_training_job({"TrainingJobName": trial}, lambda: {})
        return {}

    def _search(self, name: str) -> None:
        """Draws settings at random from the ranges (AWS's strategies are AWS's), and runs so many at once."""
        search = self._searches[name]
        given = search["given"]
        config, definition = given["HyperParameterTuningJobConfig"], given["TrainingJobDefinition"]
        limits, rng = config["ResourceLimits"], random.Random(config.get("RandomSeed", 0))
        drawn = [_draw(config["ParameterRanges"], rng) for _ in range(limits["MaxNumberOfTrainingJobs"])]

        def one(number: int, tuned: dict[str, str]) -> None:
            if search["stop"]:
                return
            trial = f"{name}-{number + 1:03}-{rng.getrandbits(32):08x}"
            request = {key: value for key, value in definition.items() if key != "StaticHyperParameters"}
            request |= {
                "TrainingJobName": trial,
                "HyperParameters": {
                    **definition.get("StaticHyperParameters", {}), **tuned,
                    "_tuning_objective_metric": config["HyperParameterTuningJobObjective"]["MetricName"],
                },
            }  # fmt: skip
            self._plane.backend.create_training_job(**_moto_arguments(request))
            self._begin(trial, {**request, "Tuned": tuned})
            search["trials"].append(trial)
            if search["stop"] and trial not in self._stopped:  # it was told while this one began
                self.on_stop_training_job({"TrainingJobName": trial}, lambda: {})
            self._train(trial)

        try:
            with ThreadPoolExecutor(limits["MaxParallelTrainingJobs"]) as threads:
                list(threads.map(one, range(len(drawn)), drawn))
        except Exception as exc:
            search["status"], search["reason"] = "Failed", f"InternalServerError: {exc!r}"
            self._sync_search(name)
            raise
        states = [self._more[trial]["TrainingJobStatus"] for trial in search["trials"]]
        if search["stop"]:
            search["status"] = "Stopped"
        elif "Completed" in states:
            search["status"] = "Completed"
        else:
            search["status"], search["reason"] = "Failed", "All training jobs failed."
        self._sync_search(name)

    # Batch transform

    def on_create_transform_job(self, given: dict[str, Any], forward: "Forward") -> dict[str, Any]:
        from tests.rehearsal.control_plane import Refusal

        if given.get("MaxPayloadInMB", 6) * given.get("MaxConcurrentTransforms", 1) > 100:
            raise Refusal("ValidationException", "MaxConcurrentTransforms * MaxPayloadInMB must not exceed 100 MB.")
        answer = forward()
        job = self._plane.backend.transform_jobs[given["TransformJobName"]]
        job.transform_job_status = "InProgress"
        self._start(self._plane.hosting.transform, given, job)
        return answer

    def on_stop_transform_job(self, given: dict[str, Any], _: "Forward") -> dict[str, Any]:
        from tests.rehearsal.control_plane import Refusal

        job = self._plane.backend.transform_jobs[given["TransformJobName"]]
        if job.transform_job_status != "InProgress":
            raise Refusal("ValidationException", f"The transform job {given['TransformJobName']} has ended.")
        job.transform_job_status = "Stopping"  # the job's own thread ends its server
        return {}

    def _start(self, work: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        for search in self._searches.values():
            search["stop"] = True
        running = list(self._running.values())
        with ThreadPoolExecutor(len(running) or 1) as threads:  # each may take the time SageMaker gives
            list(threads.map(lambda each: each.stop(), running))


def _metrics(lines: list[str], definitions: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The last figure of each metric, read from the log with the expressions of the job, as SageMaker does."""
    found = []
    for definition in definitions:
        values = [match[1] for line in lines if (match := re.search(definition["Regex"], line))]
        if values:
            found.append({"MetricName": definition["Name"], "Value": float(values[-1]), "Timestamp": time.time()})
    return found


def _draw(ranges: dict[str, Any], rng: random.Random) -> dict[str, str]:
    drawn: dict[str, str] = {}
    for each in ranges.get("ContinuousParameterRanges", ()):
        low, high = float(each["MinValue"]), float(each["MaxValue"])
        logarithmic = each.get("ScalingType") == "Logarithmic"
        value = low * (high / low) ** rng.random() if logarithmic else rng.uniform(low, high)
        drawn[each["Name"]] = repr(value)
    for each in ranges.get("IntegerParameterRanges", ()):
        drawn[each["Name"]] = str(rng.randint(int(each["MinValue"]), int(each["MaxValue"])))
    for each in ranges.get("CategoricalParameterRanges", ()):
        drawn[each["Name"]] = f'"{rng.choice(each["Values"])}"'  # AWS quotes them
    return drawn


def _moto_arguments(request: dict[str, Any]) -> dict[str, Any]:
    """CreateTrainingJob as moto's Python takes it."""
    names = {
        "training_job_name": "TrainingJobName", "hyper_parameters": "HyperParameters",
        "algorithm_specification": "AlgorithmSpecification", "role_arn": "RoleArn",
        "input_data_config": "InputDataConfig", "output_data_config": "OutputDataConfig",
        "resource_config": "ResourceConfig", "vpc_config": "VpcConfig", "stopping_condition": "StoppingCondition",
        "tags": "Tags", "enable_network_isolation": "EnableNetworkIsolation",
        "enable_inter_container_traffic_encryption": "EnableInterContainerTrafficEncryption",
        "enable_managed_spot_training": "EnableManagedSpotTraining", "checkpoint_config": "CheckpointConfig",
        "debug_hook_config": "DebugHookConfig", "debug_rule_configurations": "DebugRuleConfigurations",
        "tensor_board_output_config": "TensorBoardOutputConfig", "experiment_config": "ExperimentConfig",
    }  # fmt: skip
    copied = json.loads(json.dumps(request))  # moto writes into what it is given
    return {argument: copied.get(name) for argument, name in names.items()}
