"""`python -m training.elastic`: torchrun, flags and all, and a reason for the job where a process of it was killed or
a host of it did not come.

A killed process (out of memory, say) says nothing, and its peers fail of a connection that is closed, which is what
SageMaker would show. Of several hosts, the one on which it was killed says so.
"""

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from training.command_line import configure_logging
from training.environment import write_failure
from training.torchrun import SHUTDOWN_S

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

log = logging.getLogger("training")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run torchrun. Raises: its ChildFailedError or DistError, after the reason is written."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(list(sys.argv[1:] if arguments is None else arguments))
    except ChildFailedError as exc:
        reason = killed(exc.failures)
        if reason is not None:
            configure_logging()
            log.error("%s", reason)
            write_failure(reason, str(exc), instead=True)
        raise
    except DistError as exc:
        said = str(exc).partition("\n")[0].rstrip(".")
        reason = f"torchrun could not bring the processes together ({said})."
        if "clients joined" in said or "timed out" in said:
            reason = f"The hosts did not come together ({said}); the missing one's log says why; start the job again."
        configure_logging()
        log.error("%s", reason)
        write_failure(reason, str(exc))
        raise


def killed(failures: "Mapping[int, ProcessFailure]") -> str | None:
    """A sentence about the first process that a signal ended, by rank; None where none was.

    SIGTERM is torchrun's own to the others, and so is SIGKILL to what has not ended SHUTDOWN_S later. SIGABRT is what
    NCCL's watchdog does to processes that lost a peer: it counts where nothing else was as early, and blames nobody.
    """
    first_s = min(failure.timestamp for failure in failures.values())
    found = [
        (rank, failure.exitcode) for rank, failure in failures.items()
        if failure.exitcode < 0 and -failure.exitcode not in (signal.SIGTERM, signal.SIGABRT)
        and failure.timestamp - first_s < SHUTDOWN_S
    ]  # fmt: skip
    if not found:
        first = {rank: -failure.exitcode for rank, failure in failures.items() if failure.timestamp == first_s}
        aborted = [rank for rank, number in first.items() if number == signal.SIGABRT]
        if not aborted or not set(first.values()) <= {signal.SIGABRT, signal.SIGTERM}:
            return None
        return (
            f"Training process {aborted[0]} was ended by SIGABRT: it failed, or it has lost the others, as one of "
            "them, its host or the network has failed (NCCL ends it so); the logs may say why; started again, the "
            "training goes on from its last checkpoint, if there is one."
        )
    rank, code = found[0]
    advice = ", most likely for want of memory: a smaller --batch-size or fewer --loader-workers need less"
    return (
        f"Training process {rank} was ended by {signal.Signals(-code).name}"
        f"{advice if -code == signal.SIGKILL else ''}; the others could not go on without it."
    )


if __name__ == "__main__":
    main()
