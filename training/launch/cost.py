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


HOURS_A_MONTH = 730
NOTE = f"(us-east-1, estimate of {DATE}; {PAGE})"
UNKNOWN = f"not in our price table; see {PAGE}"


def is_known(instance: str) -> bool:
    """Whether its price is."""
    return instance in USD_PER_HOUR


def hourly(instance: str, count: int = 1) -> str:
    """`2 x ml.g5.xlarge: about 2.82 USD per hour (...)`."""
    price = USD_PER_HOUR.get(instance)
    if price is None:
        return f"{count} x {instance}: {UNKNOWN}"
    return f"{count} x {instance}: about {count * price:.2f} USD per hour {NOTE}"


def job(instance: str, count: int, max_hours: float, spot: bool, trials: int = 1, warm_minutes: int = 0) -> str:
    """What a job costs per hour, and at most; with `trials`, all of them together. `warm_minutes`: billed after it."""
    price = USD_PER_HOUR.get(instance)
    bound = ""
    if price is not None:
        of = f"for all {trials} trials of {max_hours:g} h" if trials > 1 else f"in {max_hours:g} h"
        of += f" and {warm_minutes} min that it is kept warm" if warm_minutes else ""
        bound = f"; at most {count * price * (trials * max_hours + warm_minutes / 60):,.2f} USD {of}"
    return hourly(instance, count) + bound + ("; spot instances usually cost 30 to 70 % less" if spot else "")


def endpoint(instance: str, least: int, most: int, shadow: bool = False) -> str:
    """What an endpoint of `least` to `most` instances costs, per hour and per month.

    `shadow`: a second variant runs on as many instances as the first has at least, which do not scale.
    """
    shadows = least if shadow else 0
    machines = f"{least if least == most else f'{least} to {most}'} x {instance}"
    if shadow:
        machines += f", and {shadows} for the shadow"
    if instance not in USD_PER_HOUR:
        return f"{machines}: {UNKNOWN}"
    return f"{machines}: {_range(USD_PER_HOUR[instance], least + shadows, most + shadows)} {NOTE}"


def _range(price: float, least: int, most: int) -> str:
    """`about 0.74 to 2.21 USD per hour, 540 to 1,610 a month`; `price`: of one instance for an hour."""
    low, high = least * price, most * price
    hour, month = f"{high:.2f}", f"{_of_month(high):,}"
    if least == 0:
        return f"0 USD while idle, else up to about {hour} USD per hour, {month} a month"
    if least < most:
        hour, month = f"{low:.2f} to {hour}", f"{_of_month(low):,} to {month}"
    return f"about {hour} USD per hour, {month} a month"


def _of_month(per_hour: float) -> int:
    return 10 * round(per_hour * HOURS_A_MONTH / 10)


def serverless(memory_mb: int) -> str:
    """What a serverless endpoint costs."""
    per_hour = memory_mb / 1024 * SERVERLESS_USD_PER_GB_S * 3600
    return (
        f"serverless, {memory_mb} MB: about {per_hour:.2f} USD per hour of computing, nothing while it waits ({DATE})"
    )
