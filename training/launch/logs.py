"""The log of what AWS runs for us: CloudWatch's lines as they come, and the last ones when something failed."""

from collections import deque
from typing import Any

from training.launch.errors import AwsError
from training.launch.session import Aws

TRAINING, ENDPOINTS, TRANSFORM = (
    "/aws/sagemaker/TrainingJobs",
    "/aws/sagemaker/Endpoints",
    "/aws/sagemaker/TransformJobs",
)
LAST_LINES = 15
PROBE = "path=/ping"
"""What the service writes of a health check that is not answered with 200: once a second while it starts."""


class LogTail:
    """Follows the streams of a group whose names begin with `prefix`. A log that cannot be read is no error."""

    def __init__(self, aws: Aws, group: str, prefix: str = "") -> None:
        self._logs: Any = aws.client("logs")
        self._group, self._prefix = group, prefix
        self._tokens: dict[str, str] = {}
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self.problem: str | None = None
        """Why the log could not be read, last time."""

    def new_lines(self) -> list[str]:
        """What came since the last call, stream after stream."""
        try:
            lines = [line for stream in self._streams() for line in self._read(stream)]
        except AwsError as exc:
            self.problem = None if exc.is_missing else str(exc)  # the group appears with the first line
            return []
        self.problem = None
        self._last.extend(lines)
        return lines

    def last_lines(self) -> list[str]:
        """The last LAST_LINES lines, or why there are none."""
        self.new_lines()
        if not self._last and self.problem:
            return [f"(the log cannot be read: {self.problem})"]
        return list(self._last)

    def _streams(self) -> list[str]:
        found: list[str] = []
        given: dict[str, str] = {"logStreamNamePrefix": self._prefix} if self._prefix else {}
        while True:
            page = self._logs.describe_log_streams(logGroupName=self._group, **given)
            found += [stream["logStreamName"] for stream in page["logStreams"]]
            if not page.get("nextToken"):
                return found
            given["nextToken"] = page["nextToken"]

    def _read(self, stream: str) -> list[str]:
        lines: list[str] = []
        while True:
            given = {"nextToken": self._tokens[stream]} if stream in self._tokens else {}
            page = self._logs.get_log_events(
                logGroupName=self._group, logStreamName=stream, startFromHead=True, **given
            )
            lines += [line for event in page["events"] if PROBE not in (line := event["message"].rstrip())]
            token = page["nextForwardToken"]
            if token == self._tokens.get(stream) or not page["events"]:  # the same token again: nothing new
                self._tokens[stream] = token
                return lines
            self._tokens[stream] = token
