"""The log of what AWS runs for us: CloudWatch's lines as they come, and the last ones when something failed."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from training.launch.errors import AwsError
from training.launch.session import Aws

TRAINING, ENDPOINTS, TRANSFORM = (
    "/aws/sagemaker/TrainingJobs",
    "/aws/sagemaker/Endpoints",
    "/aws/sagemaker/TransformJobs",
)
LAST_LINES = 15
RECENT_STREAMS = 20
"""So many of a group's streams, those written to last, are asked for their last lines: of an endpoint there is one for
each instance that ever was."""
PROBE = "path=/ping"
"""What the service writes of a health check that is not answered with 200: once a second while it starts."""


class LogTail:
    """Follows the streams of a group whose names begin with `prefix`. A log that cannot be read is no error.

    `since_ms`: lines from then on (milliseconds since 1970, AWS's clock); with `new_streams` only of streams that began
    then or later: those of an update's new instances, without what the old ones go on to say.
    """

    def __init__(
        self, aws: Aws, group: str, prefix: str = "", since_ms: int | None = None, *, new_streams: bool = False
    ) -> None:
        self._logs: Any = aws.client("logs")
        self._group, self._prefix = group, prefix
        self._since_ms, self._new_streams = since_ms, new_streams
        self._tokens: dict[str, str] = {}
        self._left_out: set[str] = set()
        self._written_ms: dict[str, int] = {}
        """When each stream was last written to."""
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self.problem: str | None = None
        """Why the log could not be read, last time."""

    def new_lines(self) -> list[str]:
        """What came since the last call, in the order it was written."""
        events: list[tuple[int, str]] = []
        self.problem = None
        try:
            for stream in self._streams():
                events.extend(self._read(stream))
        except AwsError as exc:  # what was read until then is kept
            self.problem = None if exc.is_missing else str(exc)  # the group appears with the first line
        lines = [line for _, line in sorted(events, key=lambda event: event[0])]
        self._last.extend(lines)
        return lines

    def recent(self, count: int) -> list[str]:
        """The last `count` lines, of a log that may be long; `new_lines` goes on after them."""
        events: list[tuple[int, str]] = []
        self.problem = None
        try:
            streams = sorted(self._streams(), key=lambda name: self._written_ms.get(name, 0), reverse=True)
            self._left_out |= set(streams[RECENT_STREAMS:])
            for stream in streams[:RECENT_STREAMS]:
                page = self._logs.get_log_events(
                    logGroupName=self._group, logStreamName=stream, startFromHead=False, limit=count
                )
                self._tokens[stream] = page["nextForwardToken"]
                events += _shown(page)
        except AwsError as exc:
            self.problem = None if exc.is_missing else str(exc)
        lines = [line for _, line in sorted(events, key=lambda event: event[0])][-count:]
        self._last.extend(lines)
        return lines

    def last_lines(self) -> list[str]:
        """The last LAST_LINES lines, or why there are none."""
        if self._tokens or self._since_ms is not None:
            self.new_lines()
        else:
            self.recent(LAST_LINES)
        if not self._last and self.problem:
            return [f"(the log cannot be read: {self.problem})"]
        return list(self._last)

    def _streams(self) -> list[str]:
        found: list[str] = []
        given: dict[str, str] = {"logStreamNamePrefix": self._prefix} if self._prefix else {}
        first_ms = self._since_ms or 0 if self._new_streams else 0
        while True:
            page = self._logs.describe_log_streams(logGroupName=self._group, **given)
            new = [each for each in page["logStreams"] if each.get("creationTime", first_ms) >= first_ms]
            self._written_ms |= {
                each["logStreamName"]: each.get("lastEventTimestamp") or each.get("creationTime", 0) for each in new
            }
            found += [each["logStreamName"] for each in new if each["logStreamName"] not in self._left_out]
            if not page.get("nextToken"):
                return found
            given["nextToken"] = page["nextToken"]

    def _read(self, stream: str) -> Iterator[tuple[int, str]]:
        """Time and text of the stream's new lines."""
        start = {} if self._since_ms is None else {"startTime": self._since_ms}
        while True:
            given = {"nextToken": self._tokens[stream]} if stream in self._tokens else {}
            page = self._logs.get_log_events(
                logGroupName=self._group, logStreamName=stream, startFromHead=True, **start, **given
            )
            yield from _shown(page)
            token = page["nextForwardToken"]
            if token == self._tokens.get(stream):  # only that is the end: pages on the way may be empty
                return
            self._tokens[stream] = token


def _shown(page: dict[str, Any]) -> list[tuple[int, str]]:
    """Time and text of a page's lines but for PROBE."""
    return [
        (event["timestamp"], event["message"].rstrip()) for event in page["events"] if PROBE not in event["message"]
    ]
