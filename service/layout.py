"""How many processes serve a model on this machine: as many as their event loops need."""

import json
import math
import stat
import sys
from functools import cache
from pathlib import Path

from service.engines.names import Wanted
from service.forked import Forked
from service.model.errors import ArtifactError
from service.model.files import MANIFEST, MAX_MANIFEST_BYTES, find_home
from service.model.machine import cores, gpus, has_driver, memory_bytes

SMALL_PX, PHOTO_PX = 32, 224
"""The sides at which it was measured what an image costs."""

LOOP_MS, WHOLE_MS = (0.28, 0.75), (0.71, 8.6)
"""Of a core, for an image of each of these sides: on the event loop, and in all (tests/bench, serving-limits.md).

int8 on 2 cores with AMX, where the network takes least, 0.43 and 4.9 ms, so that event loops count most. Where it is
slower (20 ms at 224 px on an EPYC without AMX), fewer workers would do: those too many cost their memory.
"""

LOOP_SHARE = 0.4
"""Of a core that one event loop gets at most: it shares the GIL with threads that decode and compute.

On 2 cores at 32 px, int8, 32 clients, one worker answered 1,253 images/s (EPYC) and 1,400 (AMX, one lane), 0.28 ms of
event loop each, where two answered 1,642 and 2,709. More than 2 cores were not measured.
"""

WORKER_BYTES = 768 * 2**20
"""Memory for each of several: a worker takes 250 to 450 MiB (tests/bench/RESULTS.md), and a large image as much."""

MAX_WORKERS = 16
"""Unless more are asked for: each has a model in memory, and the threads are shared among them."""


def choose_count(model: Path, engine: Wanted) -> int:
    """How many workers serve the model best on this machine with that engine."""
    if sys.platform != "linux":  # elsewhere the socket that was bound last gets every connection
        return 1
    if engine in ("auto", "torch-cuda") and (count := count_gpus()):
        return count
    loops = math.ceil(cores() * _share_of_loop(_side_px(model)) / LOOP_SHARE)
    return max(1, min(MAX_WORKERS, cores(), loops, memory_bytes() // WORKER_BYTES))


COUNTED = 100
"""Added to what is counted in another process, whose status this is: what ends it otherwise is no count."""


@cache
def count_gpus() -> int:
    """As `machine.gpus`, asked once, in a process of its own: no fork of one that has initialised CUDA can use it
    (torch: "Cannot re-initialize CUDA in forked subprocess", https://docs.pytorch.org/docs/stable/notes/multiprocessing.html).
    """
    if not has_driver():
        return 0
    return max(0, Forked(lambda: COUNTED + gpus()).wait() - COUNTED)


def _share_of_loop(side_px: int) -> float:
    """What the event loop takes of the time that an image costs; between and beyond the measured sides by pixels."""
    further = (side_px**2 - SMALL_PX**2) / (PHOTO_PX**2 - SMALL_PX**2)
    loop_ms = LOOP_MS[0] + (LOOP_MS[1] - LOOP_MS[0]) * min(1, further)  # of larger sides the files are no larger
    return loop_ms / (WHOLE_MS[0] + (WHOLE_MS[1] - WHOLE_MS[0]) * further)


def _side_px(model: Path) -> int:
    """The side of the model's pictures; of an archive, or what a worker will complain of, that of photos.

    Read from the manifest without verifying it, which the workers do: here it would hold up the first answers for a
    third of a second of imports, and decides nothing but how many they are.
    """
    try:
        path = find_home(model) / MANIFEST
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
            return PHOTO_PX
        side_px = json.loads(path.read_bytes())["preprocessing"]["side_px"]
        return side_px if isinstance(side_px, int) and 1 <= side_px <= 1024 else PHOTO_PX
    except (ArtifactError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return PHOTO_PX
