"""SageMaker Debugger in a training's request, for accounts that have it: hook, rules, profiler (`--debugger`).

Closed to new accounts since 2026-07-30; training/debugging has the same rules for everyone, and they run anywhere.
"""

import logging
from collections.abc import Mapping
from typing import Any

from training.errors import ConfigError
from training.launch.names import Project

log = logging.getLogger("training")

RULES = (
    "VanishingGradient", "ExplodingTensor", "DeadRelu", "LossNotDecreasing", "Overfit", "Overtraining",
    "PoorWeightInitialization", "WeightUpdateRatio",
)  # fmt: skip
"""AWS's names."""

ACCOUNTS = {
    "af-south-1": "314341159256", "ap-east-1": "199566480951", "ap-northeast-1": "430734990657",
    "ap-northeast-2": "578805364391", "ap-northeast-3": "479947661362", "ap-south-1": "904829902805",
    "ap-southeast-1": "972752614525", "ap-southeast-2": "184798709955", "ca-central-1": "519511493484",
    "cn-north-1": "618459771430", "cn-northwest-1": "658757709296", "eu-central-1": "482524230118",
    "eu-north-1": "314864569078", "eu-south-1": "563282790590", "eu-west-1": "929884845733",
    "eu-west-2": "250201462417", "eu-west-3": "447278800020", "me-south-1": "986000313247",
    "sa-east-1": "818342061345", "us-east-1": "503895931360", "us-east-2": "915447279597",
    "us-gov-west-1": "515509971035", "us-west-1": "685455198987", "us-west-2": "895741380848",
}  # fmt: skip
"""AWS's account that has the rules' image, by region: `image_uri_config/debugger.json` of the SageMaker SDK, which
takes 13 s to import. https://docs.aws.amazon.com/sagemaker/latest/dg/debugger-reference.html"""


def rules_image(region: str) -> str:
    """The image that evaluates AWS's rules. Raises: ConfigError where a region has none."""
    try:
        account = ACCOUNTS[region]
    except KeyError as exc:
        raise ConfigError(
            f"--debugger: AWS has no Debugger in {region}, only in {', '.join(ACCOUNTS)}; leave it out: the training "
            "has rules of its own."
        ) from exc
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"{account}.dkr.ecr.{region}.{domain}/sagemaker-debugger-rules:latest"


def request(project: Project, region: str) -> dict[str, Any]:
    """The fields of CreateTrainingJob. Raises: ConfigError."""
    image = rules_image(region)
    return {
        "DebugHookConfig": {
            "S3OutputPath": project.uri("debugger"),
            "CollectionConfigurations": [
                {"CollectionName": name, "CollectionParameters": {"save_interval": "500"}}
                for name in ("losses", "weights", "gradients", "biases", "relu_output")
            ],
        },
        "DebugRuleConfigurations": [
            {"RuleConfigurationName": rule, "RuleEvaluatorImage": image, "RuleParameters": {"rule_to_invoke": rule}}
            for rule in RULES
        ],
        "ProfilerConfig": {"S3OutputPath": project.uri("profiler"), "ProfilingIntervalInMilliseconds": 500},
    }


def tell_verdicts(job: Mapping[str, Any]) -> None:
    """Say what AWS's rules found in a training, which DescribeTrainingJob tells; nothing where it has none."""
    for rule in job.get("DebugRuleEvaluationStatuses") or ():
        name, status = rule.get("RuleConfigurationName"), rule.get("RuleEvaluationStatus")
        if status == "InProgress":
            log.info("rule %s is at work still; the same command tells later what it found", name)
            continue
        details = rule.get("StatusDetails")
        level = logging.WARNING if status in ("IssuesFound", "Error") else logging.INFO
        log.log(level, "rule %s: %s%s", name, status, f" ({details})" if details else "")
