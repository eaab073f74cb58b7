"""Jobs by name, and attempts of the same request: `BASE-1`, `BASE-2`, ... in the order they were made."""

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger("training")

Summary = dict[str, Any]


def listed(call: Callable[..., dict[str, Any]], summaries: str, name: str, prefix: str) -> list[Summary]:
    """What a List operation of SageMaker gives, all pages, of things whose name begins so.

    `summaries`, `name`: the fields of the answer and of each entry. Raises: AwsError.
    """
    given: dict[str, Any] = {"NameContains": prefix}
    found: list[Summary] = []
    while True:
        page = call(**given)
        found += [each for each in page[summaries] if each[name].startswith(prefix)]
        if not page.get("NextToken"):
            return found
        given["NextToken"] = page["NextToken"]


def take_or_make(
    base: str, found: list[Summary], name: str, status: str, make: Callable[[str], object], what: str
) -> str:  # fmt: skip
    """The name of the attempt that runs or has ended well; else the next one's, made by `make`. Raises: AwsError."""
    attempts = sorted(found, key=lambda each: int(each[name].rsplit("-", 1)[1]))
    if attempts and attempts[-1][status] in ("InProgress", "Completed"):
        taken = str(attempts[-1][name])
        log.info("%s %s for this very request is there: %s", what, taken, attempts[-1][status])
        return taken
    fresh = f"{base}-{len(attempts) + 1}"
    make(fresh)
    log.info("%s %s is started", what, fresh)
    return fresh
