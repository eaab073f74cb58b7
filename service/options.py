"""What a request may ask for besides a prediction: `top_k`, and its attributes back.

In the query string; behind a SageMaker endpoint, which passes none on, in the Custom-Attributes header, where what else
there is (a trace id, say) is the client's own affair, and goes back to it.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import parse_qsl

from service.answers import MAX_TOP_K, TOP_K
from service.errors import MalformedRequest

CUSTOM_ATTRIBUTES = b"x-amzn-sagemaker-custom-attributes"
"""What the client of an endpoint adds to a request, and reads in its answer: at most 1,024 visible ASCII characters
(https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpoint.html)."""

_SAFE_ATTRIBUTES = re.compile(rb"[\x20-\x7e]{1,1024}")
_ATTRIBUTE = re.compile(r"(?:^|[\s,;&])top_k=([^\s,;&]*)")


@lru_cache(maxsize=256)
def top_k_of(query: bytes, custom_attributes: str | None) -> int:
    """How many classes to rank. Raises: MalformedRequest."""
    try:
        options = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=10, errors="strict")
    except ValueError as exc:
        raise MalformedRequest("The query string cannot be read; allowed is top_k, as in ?top_k=3.") from exc
    for name, _ in options:
        if name != "top_k":
            raise MalformedRequest(f"The query option {name[:40]!a} is not known; allowed is top_k, as in ?top_k=3.")
    given = [value for _, value in options] or _ATTRIBUTE.findall(custom_attributes or "")
    if not given:
        return TOP_K
    if len(given) > 1 or not re.fullmatch(r"[0-9]{1,6}", given[0]) or not 1 <= int(given[0]) <= MAX_TOP_K:
        shown = ", ".join(ascii(value[:40]) for value in given[:3])
        raise MalformedRequest(f"top_k must be one whole number from 1 to {MAX_TOP_K}, given: {shown}.")
    return int(given[0])


def echoed(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The Custom-Attributes header for the answer, if it is safe; repeated ones joined as RFC 9110, 5.3 says."""
    given = b", ".join([value for name, value in headers if name == CUSTOM_ATTRIBUTES])
    return [(CUSTOM_ATTRIBUTES, given)] if _SAFE_ATTRIBUTES.fullmatch(given) else []
