"""Several processes that train together: torchrun as a child, one process a GPU, on one host or many.

torchrun (https://docs.pytorch.org/docs/stable/elastic/run.html) is what gives each process its rank; this
process waits for it, hands signals on and takes over its exit status. See `training.elastic`.
"""

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from service.model.machine import cores
from training.environment import SageMakerJob, environment_with
from training.errors import ConfigError

log = logging.getLogger(__name__)

MASTER_PORT = 29500
"""torchrun's own default; hosts of a job reach each other on any port."""
SHUTDOWN_S = 110
"""Time for the processes to save and end after SIGTERM; SageMaker kills the container after 120 s."""
NAME_LIMIT_S = 300.0
"""How long another host's name may take to become known: hosts of a job start minutes apart."""
FORWARDED = (signal.SIGTERM, signal.SIGINT)


def command(
    module: str, arguments: Sequence[str], processes: int, job: SageMakerJob | None, master: str | None = None
) -> list[str]:
    """The command line that runs `python -m module arguments` in `processes` processes on each host of the job.

    `master`: where the hosts meet, `host` or `host:port`; default: the first host of the job.
    """
    hosts = 1 if job is None else len(job.hosts)
    flags = ["--nnodes", str(hosts), "--nproc-per-node", str(processes), "--shutdown-timeout", str(SHUTDOWN_S)]
    if job is None or hosts == 1:
        flags += ["--standalone"]
    else:
        address, _, port = (master or job.hosts[0]).partition(":")
        flags += ["--node-rank", str(job.host_rank), "--master-addr", address]
        flags += ["--master-port", port or str(MASTER_PORT)]
    return [sys.executable, "-m", "training.elastic", *flags, "-m", module, *arguments]


def variables(processes: int, job: SageMakerJob | None) -> dict[str, str]:
    """What the processes need in their environment: their share of the cores, and the network they talk over."""
    found = {"OMP_NUM_THREADS": str(max(1, cores() // processes))}  # torchrun would say 1, and warn
    if job is not None and len(job.hosts) > 1 and job.network_interface:
        found |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), job.network_interface)
    return found


def wait_for_name(host: str, limit_s: float = NAME_LIMIT_S) -> None:
    """Wait until the name of the first host is known to the network. Raises: ConfigError after `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as exc:
            if time.monotonic() >= deadline_s:
                raise ConfigError(
                    f"Host {host} of resourceconfig.json is unknown to the network after {limit_s:.0f} s ({exc}); "
                    "start the job again."
                ) from exc
        log.info("waiting for the name of host %s", host)
        time.sleep(min(2.0, limit_s))


def run_child(line: Sequence[str], extra: Mapping[str, str]) -> int:
    """Run a command until it ends; SIGTERM and SIGINT go to it.

    Returns: its exit status; 128 plus the number of the signal that ended it, as shells say it.
    """
    waiting: list[int] = []
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if child is None:  # it came between the two lines below
            waiting.append(number)
        else:
            child.send_signal(number)

    in_main = threading.current_thread() is threading.main_thread()  # only there signals can be caught
    before = {number: signal.signal(number, forward) for number in FORWARDED} if in_main else {}
    try:
        # In a group of its own: a terminal sends Ctrl-C to the whole group, and torchrun would get it twice.
        child = subprocess.Popen(  # noqa: S603  # our own command line, no shell
            line, env=environment_with(extra), start_new_session=True
        )
        for number in waiting:
            child.send_signal(number)
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and status != 0:  # torchrun ends with 1 then, whatever its processes ended with
        return 128 + received[0]
    return status if status >= 0 else 128 - status
