"""`python -m service`: serves a model in the foreground until it is told to stop, in one process or several.

Exit status: 0 after SIGTERM or Ctrl-C (143 and 130 while nothing is begun yet), 1 when the model or the port cannot be
served or a worker does not end as it is told, 2 for wrong settings, 128 and the signal's number when a library crashes
while it is imported.
"""

import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from service.forked import run_and_exit
from service.layout import choose_count, count_gpus
from service.lifeline import FILES_BESIDES, allow_files
from service.listeners import open_port, refusal
from service.logs import configure_logging, counted, shown
from service.model.errors import ArtifactError
from service.model.files import find_home
from service.model.machine import cores, few_arenas, tasks
from service.settings import Settings, heaps_are_chosen
from service.supervisor import Supervisor
from service.workers import Worker

log = logging.getLogger("service")

LEAST_FILES = 2 * FILES_BESIDES
"""A worker with fewer file descriptors would hardly have connections."""

LEAST_TASKS = 24
"""A worker has 15 threads on 2 cores, a supervisor, and at least one decoder process."""

SWITCH_INTERVAL_S = 0.0002
"""How long a thread that wants the GIL waits until it is asked of the one that has it. By default 5 ms, which the
engine's threads wait twice a batch while the event loop is busy; their core idles, and its caches grow cold. 32 px,
int8, 32 clients, two workers on 2 cores with AMX, two runs each in turns: 2,720 against 2,220 images/s."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service; returns the exit status."""
    parent = os.getppid()  # now: it may end while we start
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever started us may ignore it; how workers end is then not told
    _keep_standard_files()
    settings = Settings.load(arguments)
    configure_logging(settings.log_level, settings.log_format)
    log.info("settings: %s", shown(settings.model_dump()))
    workers = settings.workers or choose_count(settings.model, settings.engine)
    with_openvino = settings.engine.startswith("openvino") or (settings.engine == "auto" and not count_gpus())
    log.info(
        "layout: %s, %s and %s%s, on %s",
        counted(workers, "worker"), counted(settings.engine_threads, "engine thread"),
        counted(settings.decode_threads, "decoding thread"), " among them" * (workers > 1), counted(cores(), "core"),
    )  # fmt: skip

    if (files := allow_files()) < LEAST_FILES * workers:
        log.error(
            "This process may open %d files, the service needs %d; raise the limit (ulimit -n %d).",
            files, LEAST_FILES * workers, 4096 * workers,
        )  # fmt: skip
        return 1
    if (limit := tasks()) is not None and limit < LEAST_TASKS * workers:
        log.error(
            "This container may have %d processes and threads, the service needs %d; raise the limit (docker run "
            "--pids-limit %d)%s.", limit, LEAST_TASKS * workers, 256 * workers,
            ", or set fewer CLASSIFIER_WORKERS" if workers > 1 else "",
        )  # fmt: skip
        return 1
    try:
        if not settings.model.is_file():  # an archive is a worker's to open
            find_home(settings.model)
    except ArtifactError as exc:
        log.error("The model cannot be served. %s", exc)
        return 1
    except OSError as exc:  # a name that is too long, or a folder that may not be entered
        log.error("The model cannot be served. %s cannot be read: %s.", str(settings.model)[:200], exc.strerror or exc)
        return 1
    try:
        listeners = open_port(settings.host, settings.port, workers)
    except (OSError, TypeError, ValueError) as exc:  # the latter two of a host that can be none
        log.error("%s", refusal(settings.host, settings.port, exc))
        return 1
    supervisor = Supervisor(listeners, partial(serve, settings), settings.start_timeout_s)
    _stop_with(supervisor.stop, parent if settings.exit_with_parent and parent > 1 else None)
    log.info("listening on %s port %d, loading the model", settings.host, settings.port)
    status = supervisor.run(partial(prepare, with_openvino))
    log.info("stopped")
    return status


def _keep_standard_files() -> None:
    """Where 0, 1 or 2 were closed when we were started, no socket shall take their place: children would lose it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def prepare(with_openvino: bool) -> bool:
    """Import, once for all workers, what one needs; `with_openvino`, its engine too. Returns: False when it cannot be,
    which is told.

    torch is left to those whose engine needs it: nothing of CUDA may begin here.
    """
    if sys.platform != "linux":  # libraries start threads there that no fork survives (python.org, bpo-33725)
        return True
    gc.disable()
    was_enabled = faulthandler.is_enabled()
    faulthandler.enable(2, all_threads=False)  # a library made for another processor ends this process: it says where
    if not _is_complete():
        return False
    if with_openvino:
        with suppress(Exception):  # whatever is wrong with it, the worker tells, or takes another
            import service.engines.openvino  # noqa: F401
    if not was_enabled:
        faulthandler.disable()
    gc.freeze()  # to look for garbage among it would write to it, so that the workers share less of it
    gc.enable()
    return True


def _is_complete() -> bool:
    """Whether all that a worker imports can be; what cannot is told."""
    try:
        import service.app
        import service.server  # noqa: F401
    except ImportError as exc:
        log.error(
            "The service cannot start: a package that it needs cannot be imported (%s); install what uv.lock has, "
            "or use the image as it was built.", _root_of(exc),
        )  # fmt: skip
        return False
    return True


def serve(settings: Settings, worker: Worker) -> int:
    """Serve in this process until told to stop; returns the exit status."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.disable()  # what a start creates, stays: the runtime enables it when the model is served
    if not heaps_are_chosen():
        few_arenas()
    configure_logging(settings.log_level, settings.log_format)  # its lines have this process's id
    if not _is_complete():
        return 1
    from service.app import create_app  # here, because a supervisor begins to answer without
    from service.server import Server

    failed = threading.Event()

    def stop() -> None:
        server.should_exit = True

    def fail() -> None:
        failed.set()
        stop()

    server = Server(create_app(settings, on_failure=fail, worker=worker), worker.lifeline(), worker.is_replaced)
    _stop_with(stop, worker.supervisor_pid)
    server.run(sockets=[worker.listener()])
    return 1 if failed.is_set() else 0


def _root_of(exc: BaseException) -> str:
    """What the first of the errors that led to this one says, in one line."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return " ".join(str(exc).split())[:300].rstrip(".")


def _stop_with(stop: Callable[[], None], parent: int | None) -> None:
    """Call `stop` on SIGTERM, on Ctrl-C, and when this is no longer a child of `parent`."""
    if parent is not None:
        threading.Thread(target=_watch_parent, args=(parent, stop), daemon=True, name="parent").start()
    # uvicorn raises the signal that stopped it once more when all is closed: ours then ends nothing, so we exit 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def _watch_parent(parent: int, stop: Callable[[], None]) -> None:
    """Stop the service once its parent is gone: the kernel then gives it another (getppid(2))."""
    while os.getppid() == parent:
        time.sleep(0.5)
    log.info("the process that started the service has ended; stopping")
    stop()


if __name__ == "__main__":
    run_and_exit(main)
