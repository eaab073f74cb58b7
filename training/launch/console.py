"""Where a person sees it: addresses of SageMaker's and CloudWatch's pages."""

from urllib.parse import quote

_JOBS = {"train": "jobs", "t": "hyper-tuning-jobs", "batch": "transform-jobs"}
"""By what stands for the kind in names of jobs."""


def job(region: str, part: str, name: str = "") -> str:
    """Of a job, or the list of its kind."""
    return _page(region, "sagemaker", f"/{_JOBS[part]}" + (f"/{name}" if name else ""))


def endpoint(region: str, name: str) -> str:
    """Of an endpoint."""
    return _page(region, "sagemaker", f"/endpoints/{name}")


def log_group(region: str, group: str, prefix: str = "") -> str:
    """Of a log group, or of its streams whose names begin with `prefix`. Its part after # is quoted twice, with $."""
    shown = f"logsV2:log-groups/log-group/{_twice(group)}"
    return _page(region, "cloudwatch", shown + (f"$3FlogStreamNameFilter$3D{_twice(prefix)}" if prefix else ""))


def _twice(text: str) -> str:
    return quote(quote(text, ""), "").replace("%", "$")


def _page(region: str, service: str, shown: str) -> str:
    if region.startswith("cn-"):
        host = "console.amazonaws.cn"
    elif region.startswith("us-gov-"):
        host = "console.amazonaws-us-gov.com"
    else:
        host = "console.aws.amazon.com"
    return f"https://{region}.{host}/{service}/home?region={region}#{shown}"
