"""Several processes on one port: the supervisor, which starts the workers, replaces those that die, and stops them.

Each worker has a listening socket of its own (`service.listeners`). The supervisor keeps them all open, so that
connections which wait for a worker that died are served by its replacement, which accepts them when it is ready. Where
that takes longer than a second, the supervisor accepts them, and answers 503.
"""

import logging
import math
import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from service.deaths import STOOD_STILL, MemoryKills, cause_of
from service.forked import Forked
from service.lifeline import (
    FILES_BESIDES,
    LINGER_S,
    MAX_CONNECTIONS,
    UPLOAD_S,
    Held,
    Lingering,
    allow_files,
    is_waited_for,
    pair,
    refuse_waiting,
    shared,
    slots,
    take_no_more,
)
from service.metrics import Page
from service.record import RequestRecord
from service.workers import States, Worker

log = logging.getLogger(__name__)
requests_log = logging.getLogger("service.requests")

MAX_DEATHS, WITHIN_S = 5, 60.0
"""So many workers dying within this time end the service, and so many starts of one in a row that came to nothing:
something is wrong that new workers do not mend."""

STOP_S = 28.0
"""After so long workers that do not stop are killed; SageMaker kills us 30 s after SIGTERM."""

SILENT_S, SEEN_TWICE_S = 45.0, 5.0
"""A worker whose event loop has not gone round for so long, seen twice so far apart, is replaced. Twice, because the
whole machine may have stood still. Together less than a request's deadline: its clients still read a sentence."""

PATIENCE_S = 1.0
"""How long connections wait for a worker that does not accept yet. One that took a dead one's place mostly does after 1
to 2 s, so that many need not ask again; a /ping that is not answered within 2 s counts as failed."""

TURN_S = 0.05
"""How often is looked for what nothing tells: a worker's end, a client that waits."""

START_AGAIN_S = (0.0, 1.0, 2.0, 3.0)
"""Pauses between the attempts to start a worker, where there is no process, memory or file descriptor left."""

OF_LATE_S = 2.0
"""A worker that dies so long after the kernel killed a process of ours for memory was that process."""


class Supervisor:
    """Runs a worker for each listening socket until it is told to stop, or until it makes no sense to go on."""

    def __init__(
        self, listeners: Sequence[socket.socket], serve: Callable[[Worker], int], start_timeout_s: float
    ) -> None:
        """`serve`: what a worker does in a process of its own, which ends with the status returned."""
        self._sockets = list(listeners)
        count = len(self._sockets)
        self._states_fd = shared(States.size(count))
        self._states = States(self._states_fd)
        self._metrics_fd = shared(Page.size(count))
        self._page = Page(count, self._metrics_fd)
        self._connections_each = min(MAX_CONNECTIONS, (allow_files() - FILES_BESIDES) // count)
        self._memory_kills = MemoryKills()
        self._memory_killed_s = -math.inf
        self._looked_at_s = 0.0
        self._serve = serve
        self._processes: dict[int, Forked] = {}
        self._held: dict[int, Held] = {}
        self._start_timeout_s = start_timeout_s
        self._began_s = time.monotonic()
        self._ready_by_s: dict[int, float] = {}
        self._killed: set[int] = set()  # by us
        self._lingering = Lingering(self._connections_each)  # in place of those that a dead worker had
        self._waits_since_s: dict[int, float] = {}  # connections, for a worker that does not accept
        self._talk = selectors.DefaultSelector()
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._in_vain: dict[int, int] = {}  # starts of a worker that ended before it was ready, in a row
        self._stopping = False
        self._failed = False
        self._kill_at_s = math.inf
        self._silent: dict[int, float] = {}  # since when workers have been seen to be silent for too long

    def stop(self) -> None:
        """Tell every worker to answer what it accepted and end; safe in a signal handler."""
        self._stopping = True
        self._states.tell_stopping()
        self._kill_at_s = min(self._kill_at_s, time.monotonic() + STOP_S)
        for process in list(self._processes.values()):
            process.terminate()

    def run(self, prepare: Callable[[], bool]) -> int:
        """Start the workers, replace those that die. Returns: the exit status, 0 when all ended as they were told.

        `prepare`: what is done once for all of them and takes long, before any is started; False: it failed, and said
        why.
        """
        if not self._stopping and not self._is_prepared(prepare):
            self._failed = not self._stopping
            self.stop()
        for index in range(len(self._sockets)):
            self._start(index)
        status = 0
        while self._processes:
            index, returned = self._wait()
            if self._stopping:
                # As the signals end it that come before it can catch them; a terminal sends Ctrl-C to the workers too.
                status = max(status, int(returned not in (0, -signal.SIGTERM, 128 + signal.SIGINT)))
                if returned < 0 and returned != -signal.SIGTERM and index not in self._killed:
                    how = cause_of(returned, self._memory_killed()).how
                    log.error("worker %d died (%s) while the service stopped; what it had is not answered", index, how)
                self._close_port(index)
                continue
            death = STOOD_STILL if index in self._killed else cause_of(returned, self._memory_killed())
            how = death.how
            self._page.died(index, death.cause)
            self._deaths.append(time.monotonic())
            ready = self._states.is_ready(index)
            told = returned == 1 or index in self._killed  # with 1, it has said why
            self._in_vain[index] = 0 if ready else self._in_vain.get(index, 0) + 1
            if not ready and (told or not self._states.all_were_ready()):
                log.log(logging.INFO if told else logging.ERROR, "worker %d ended before it was ready (%s)", index, how)
            elif self._in_vain[index] == MAX_DEATHS:
                log.error("worker %d ended %d times before it was ready (%s); giving up", index, MAX_DEATHS, how)
            elif len(self._deaths) == MAX_DEATHS and self._deaths[-1] - self._deaths[0] < WITHIN_S:
                log.error("%d workers died within %.0f s, the last by %s; giving up", MAX_DEATHS, WITHIN_S, how)
            else:
                log.error(
                    "worker %d died (%s)%s; its requests are answered with 503, another takes its place",
                    index, how, "" if ready else " before it was ready",
                )  # fmt: skip
                self._start(index)
                continue
            status = 1
            self.stop()
        for index in range(len(self._sockets)):  # of those that did not end as they were told
            self._close_port(index)
        until_s = time.monotonic() + LINGER_S
        while self._lingering and time.monotonic() < until_s:
            time.sleep(0.05)
            self._lingering.sweep()
        return max(status, int(self._failed))

    def _is_prepared(self, prepare: Callable[[], bool]) -> bool:
        """Whether it succeeded, in a thread of its own, while we answer those who wait and may be told to stop."""
        succeeded = False

        def run() -> None:
            nonlocal succeeded
            try:
                succeeded = prepare()
            except BaseException:  # a package may raise anything while it is imported
                log.exception("The service cannot start on an error of its own.")

        thread = threading.Thread(target=run, name="prepare", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:  # no thread is left
            log.error("The service cannot start (%s); raise the limit of processes and threads.", exc)
            return False
        while thread.is_alive() and not self._stopping:
            if time.monotonic() - self._began_s > self._start_timeout_s:
                log.error(
                    "The service was not imported within %g s; CLASSIFIER_START_TIMEOUT_S allows more.",
                    self._start_timeout_s,
                )  # fmt: skip
                return False
            thread.join(TURN_S)
            self._look_after_clients()
        return succeeded

    def _close_port(self, index: int) -> None:
        take_no_more(self._sockets[index])
        self._refuse(index, "stopping")

    def _refuse(self, index: int, state: str) -> None:
        self._lingering.add(refuse_waiting(self._sockets[index], state, self._note_told), UPLOAD_S)

    def _start(self, index: int) -> None:
        for pause_s in (*START_AGAIN_S, None):
            if self._stopping:
                return
            try:
                self._start_process(index)
                return
            except OSError as exc:  # no process, memory or file descriptor left
                log.error("worker %d cannot be started (%s)", index, exc.strerror or exc)
            again_s = time.monotonic() + (pause_s or 0)
            while time.monotonic() < again_s and not self._stopping:
                self._turn()
        self._failed = True
        self.stop()

    def _start_process(self, index: int) -> None:
        self._states.all_were_ready()  # noted before this one is not
        self._states.forget(index)
        self._killed.discard(index)
        self._silent.pop(index, None)
        ours, theirs = pair()
        slots_fd = slots(self._connections_each)
        worker = Worker(
            index, len(self._sockets), os.getpid(), self._sockets[index].fileno(), self._states_fd, self._metrics_fd,
            theirs.fileno(), slots_fd,
        )  # fmt: skip
        try:
            held = Held(ours, slots_fd)
            # Its name has no space: many split what proc_pid_stat(5) holds at spaces.
            self._processes[index] = Forked(lambda: self._serve(worker), worker.files, f"worker-{index}")
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(slots_fd)
        self._held[index] = held
        self._talk.register(ours, selectors.EVENT_READ, held)
        # Preparing is part of the first start.
        began_s = time.monotonic() if index in self._ready_by_s else self._began_s
        self._ready_by_s[index] = began_s + self._start_timeout_s
        if self._stopping:  # the signal came before the process was in the table
            self._processes[index].terminate()

    def _wait(self) -> tuple[int, int]:
        """Wait until one of the workers ends. Returns: its index and return code, negative for a signal."""
        while True:
            for index, process in self._processes.items():
                if (returned := process.poll()) is not None:
                    del self._processes[index]
                    held = self._held.pop(index)
                    with suppress(KeyError):  # where its end was read before it was seen
                        self._talk.unregister(held.socket)
                    self._lingering.add(held.answer(self._note_told))
                    return index, returned
            self._turn()

    def _turn(self) -> None:
        """Look after the workers and their clients once."""
        for key, _ in self._talk.select(TURN_S):
            if not key.data.read():
                self._talk.unregister(key.fileobj)
        self._look_after_clients()
        self._kill_the_stuck()
        if os.getpid() == 1:
            self._reap_adopted()
        if time.monotonic() - self._looked_at_s > OF_LATE_S / 2:  # decoders are killed for memory too
            self._memory_killed()
            self._looked_at_s = time.monotonic()

    def _reap_adopted(self) -> None:
        """Let the kernel forget the decoders of workers that died, which are the first process's then
        (pid_namespaces(7)).
        """
        ours = {process.pid for process in self._processes.values()}
        with suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in ours:  # seen by `poll` next
                    return
                os.waitpid(ended.si_pid, 0)

    def _look_after_clients(self) -> None:
        self._lingering.sweep()
        self._answer_for_who_starts()

    def _answer_for_who_starts(self) -> None:
        """Tell connections of which one has waited long enough for a worker that does not accept yet, or no more.
        Whoever of the two accepts one answers it, so none is lost where the worker begins meanwhile.
        """
        now_s = time.monotonic()
        for index, listener in enumerate(self._sockets):
            held, process = self._held.get(index), self._processes.get(index)
            accepts = held is not None and held.has_begun() and process is not None and process.poll() is None
            if accepts or not is_waited_for(listener):
                self._waits_since_s.pop(index, None)
            elif now_s - self._waits_since_s.setdefault(index, now_s) >= PATIENCE_S:
                del self._waits_since_s[index]
                self._refuse(index, "stopping" if self._stopping else "loading")

    def _memory_killed(self) -> bool:
        """Whether the kernel has just killed one of our processes for memory."""
        now_s = time.monotonic()
        if self._memory_kills.any_new():
            self._memory_killed_s = now_s
        return now_s - self._memory_killed_s < OF_LATE_S

    def _note_told(self, request_id: str, code: str) -> None:
        requests_log.info(RequestRecord(request_id, "", "", 503, code))
        self._page.answered_for_another(code)

    def _kill_the_stuck(self) -> None:
        """End workers that do not start or stop in time, and those whose event loop no longer goes round."""
        now_s = time.monotonic()
        late = now_s > self._kill_at_s
        if late:
            self._kill_at_s = now_s + 1
        for index, process in self._processes.items():
            if late:
                log.error("worker %d did not stop within %.0f s; it is killed", index, STOP_S)
                self._killed.add(index)
                process.kill()
            elif index in self._killed:
                process.kill()
            elif now_s > self._ready_by_s[index] and not self._states.is_ready(index):
                log.error(
                    "worker %d was not ready within %g s and is killed; CLASSIFIER_START_TIMEOUT_S allows more.",
                    index, self._start_timeout_s,
                )  # fmt: skip
                self._killed.add(index)
            silent_s = self._held[index].silent_s()
            if silent_s < SILENT_S:
                self._silent.pop(index, None)
            elif now_s - self._silent.setdefault(index, now_s) > SEEN_TWICE_S and index not in self._killed:
                log.error("worker %d has not answered for %.0f s; it is killed", index, silent_s)
                self._killed.add(index)
