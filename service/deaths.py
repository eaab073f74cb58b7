"""Why a worker died, as far as a parent can know: its return code, and whether memory ran out meanwhile.

https://docs.kernel.org/admin-guide/cgroup-v2.html, memory.events; cgroup v1 has the same number in memory.oom_control.
"""

import signal
from dataclasses import dataclass
from pathlib import Path

from service.model.machine import CGROUP

OWN = Path("/proc/self/cgroup")

_SIGNALS: dict[int, tuple[str, str]] = {
    signal.SIGKILL: (
        "sigkill",
        "probably the kernel's memory killer or an operator: look at the machine's log (dmesg), and give it more "
        "memory or set fewer CLASSIFIER_WORKERS",
    ),
    signal.SIGSEGV: ("sigsegv", "a fault in a native library or the machine's memory"),
    signal.SIGBUS: ("sigbus", "a file that shrank while it was read, a full /dev/shm, or the machine's memory"),
    signal.SIGABRT: ("sigabrt", "a native library gave up; its own words are above"),
}


@dataclass(frozen=True)
class Death:
    """One worker's end."""

    cause: str
    """One of `service.metrics.CAUSES`."""
    how: str
    """The same for people: the signal or status, and what it probably means."""


STOOD_STILL = Death("stood_still", "signal SIGKILL, from the supervisor: it did not answer any more")


class MemoryKills:
    """Notices processes of this container or group that the kernel has killed for memory."""

    def __init__(self, cgroup: Path = CGROUP, own: Path = OWN) -> None:
        self._files = _event_files(cgroup, own)
        self._seen = self._count()

    def any_new(self) -> bool:
        """Whether there were some since this was last asked. False also where the kernel does not tell."""
        count = self._count()
        new = count > self._seen
        self._seen = count
        return new

    def _count(self) -> int:
        total = 0
        for path in self._files:
            try:
                lines = dict(line.split() for line in path.read_text().splitlines())
                total += int(lines.get("oom_kill", 0))
            except (OSError, ValueError):  # not that version of cgroups, or not readable for us
                continue
        return total


def cause_of(returned: int, memory_kill: bool) -> Death:
    """What `Forked.poll` told of an end means: an exit status, negative for a signal."""
    if returned >= 0:
        return Death("exit_status", f"exit status {returned}; the lines above say why")
    name = signal_name(-returned)
    if name == "SIGKILL" and memory_kill:
        return Death(
            "out_of_memory",
            "signal SIGKILL: out of memory, the kernel killed it; give it more memory, or set fewer CLASSIFIER_WORKERS "
            "or a smaller CLASSIFIER_MAX_IMAGES",
        )
    cause, meaning = _SIGNALS.get(-returned, ("other_signal", "sent by another process"))
    return Death(cause, f"signal {name}: {meaning}")


def signal_name(number: int) -> str:
    """Such as SIGKILL; of a realtime signal, the number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _event_files(cgroup: Path, own: Path) -> list[Path]:
    """Where the count may be: of our own group, and of the container's root, which hides the groups above it."""
    files = [cgroup / "memory.events", cgroup / "memory" / "memory.oom_control"]
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no cgroups at all (macOS)
        return files
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            files.append(cgroup / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(cgroup / "memory" / path.lstrip("/") / "memory.oom_control")
    return files
