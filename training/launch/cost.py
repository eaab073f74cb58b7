"""What instances cost per hour, so that nobody starts something without a number before it.

On-demand prices of SageMaker training and hosting in us-east-1, US dollars, as they were known to us on 2026-11-22;
AWS's page could not be read where this was written, so they are estimates. Other regions cost up to half as much
again. What AWS bills: https://aws.amazon.com/sagemaker/ai/pricing/
"""

DATE = "2026-11-22"
PAGE = "https://aws.amazon.com/sagemaker/ai/pricing/"

USD_PER_HOUR: dict[str, float] = {
    "ml.g4dn.xlarge": 0.736, "ml.g4dn.2xlarge": 0.94, "ml.g4dn.4xlarge": 1.505, "ml.g4dn.12xlarge": 4.89,
    "ml.g5.xlarge": 1.408, "ml.g5.2xlarge": 1.515, "ml.g5.4xlarge": 2.03, "ml.g5.12xlarge": 7.09,
    "ml.g6.xlarge": 1.127, "ml.g6.2xlarge": 1.222, "ml.g6.4xlarge": 1.654, "ml.g6.12xlarge": 5.752,
    "ml.c5.xlarge": 0.204, "ml.c5.2xlarge": 0.408, "ml.c6i.xlarge": 0.204, "ml.c6i.2xlarge": 0.408,
    "ml.c7i.xlarge": 0.214, "ml.c7i.2xlarge": 0.428, "ml.m5.large": 0.115, "ml.m5.xlarge": 0.23,
}  # fmt: skip

SERVERLESS_USD_PER_GB_S = 0.00002
"""Serverless inference is billed by the milliseconds of a request and the memory; nothing while it waits."""


def hourly(instance: str, count: int = 1) -> str:
    """`2 x ml.g5.xlarge: about 2.82 USD per hour (...)`."""
    price = USD_PER_HOUR.get(instance)
    note = f"(us-east-1, estimate of {DATE}; {PAGE})"
    if price is None:
        return f"{count} x {instance}: not in our price table; see {PAGE}"
    return f"{count} x {instance}: about {count * price:.2f} USD per hour {note}"


def job(instance: str, count: int, max_hours: float, spot: bool) -> str:
    """What a job costs per hour, and at most."""
    price = USD_PER_HOUR.get(instance)
    bound = "" if price is None else f"; at most {count * price * max_hours:.2f} USD in {max_hours:g} h"
    return hourly(instance, count) + bound + ("; spot instances usually cost 30 to 70 % less" if spot else "")


def serverless(memory_mb: int) -> str:
    """What a serverless endpoint costs."""
    per_hour = memory_mb / 1024 * SERVERLESS_USD_PER_GB_S * 3600
    return (
        f"serverless, {memory_mb} MB: about {per_hour:.2f} USD per hour of computing, nothing while it waits ({DATE})"
    )
