"""The service's parts and their lifecycle: loading -> warming_up -> ready (or failing) -> stopping, or failed.

Built by `create_app`, opened and closed in the app's lifespan. Routes ask it for answers and see no tensors.
"""

import asyncio
import gc
import logging
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from typing import Literal

import numpy as np

from service.admission import Admission
from service.batcher import Batcher
from service.classifier import Classifier, ExampleFile, Prediction
from service.decoding import Decoders
from service.engines.base import EngineUnavailable
from service.engines.choose import Layout
from service.errors import NotReady
from service.inference import load_model
from service.metrics import Gauges
from service.model.archive import model_folder
from service.model.errors import ArtifactError
from service.model.images import RgbImage
from service.model.machine import give_back_memory, give_way, gpus
from service.model.resize import decode_resized
from service.payloads import Payloads, is_image, payloads_of
from service.predictor import Predictor
from service.settings import Settings
from service.workers import Worker

log = logging.getLogger(__name__)

ENGINE_THREADS = 64
"""More than any engine has lanes: threads are started as they are needed."""

SMALL_FORM_BYTES = 64 * 2**10
"""Forms and JSON up to this size are taken apart on the event loop."""

GC_OBJECTS = 20_000
"""New objects after which garbage is looked for. Python's default, 700 or 2,000, is some 50 requests; with it the
event loop took 0.67 ms a photograph, with this 0.60 (four runs each in turns, 2 cores of a Xeon with AMX, not alone
there, Python 3.11)."""

COLD = 2.0
"""The first batch of a size takes up to so many times what later ones do."""

LOOK_AGAIN_S = 0.05
"""How often it is looked whether all workers are ready."""

WATCH_S = 1.0
"""How often it is looked whether the engine has come back."""

GIVE_BACK_BYTES = 64 * 2**20
"""Once the bodies under way are so much fewer than they were, what they took is given back to the system."""

FAILING_AFTER, ENDS_AFTER = 3, 10
"""Batches in a row on which the engine may fail until /ping tells, and until the process ends for a new one to take its
place: what a CUDA error leaves behind, no later call mends."""

State = Literal["loading", "warming_up", "ready", "failing", "stuck", "stopping", "failed"]

MEANING: dict[State, str] = {
    "loading": "The model is being loaded and verified.",
    "warming_up": "The model is loaded; its first batches run, or those of another worker.",
    "failing": "The engine failed on its last batches, the log says why; a batch that succeeds ends this.",
    "stuck": "The engine has not come back from a batch within the deadline of a request.",
    "stopping": "The service was told to stop; what it has accepted is still answered.",
    "failed": "The model cannot be served; the log says why.",
}
"""What /ping says of each state that is not "ready"."""


class Runtime:
    """Loads the model in the background, then answers payloads.

    Threads of their own load, warm up and infer, one for each of the engine's lanes: what a library keeps per thread
    is then warm where it is used.
    """

    def __init__(
        self,
        settings: Settings,
        classifier: Classifier | None = None,
        on_failure: Callable[[], None] | None = None,
        worker: Worker | None = None,
    ) -> None:
        """With a `classifier`, nothing is loaded. `on_failure` is called when the model cannot be served."""
        self.settings = settings
        self._state: State = "loading"
        self._given = classifier
        self._worker, self._states = worker, worker.states() if worker else None
        device = worker.index % max(1, gpus()) if worker else 0
        threads = worker.share(settings.engine_threads) if worker else settings.engine_threads
        # In the place of a worker that died, all is done before it is ready: where memory is too little for that, it is
        # not ready and dead in turns.
        replaces = self._states is not None and self._states.all_were_ready()
        self._layout = Layout(threads, settings.engine_threads, device, settings.max_batch, settles=not replaces)
        self._on_failure = on_failure
        self.admission = Admission(
            settings.max_images, settings.max_body_bytes, settings.deadline_s, settings.max_queue_s,
            kept_bytes=min(settings.max_body_bytes // 8, settings.max_body_bytes - settings.max_payload_bytes),
        )  # fmt: skip
        self.stopping = False
        self._engine_threads = ThreadPoolExecutor(ENGINE_THREADS, thread_name_prefix="engine", initializer=give_way)
        decoders = worker.share(settings.decode_threads) if worker else settings.decode_threads
        self._decoders = Decoders(decoders, settings.decode_limit_s)
        self._predictor: Predictor | None = None
        self._starting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._finishing: asyncio.Task[None] | None = None
        self._held = ExitStack()

    @property
    def state(self) -> State:
        """How far it is; "warming_up" also while other workers are not ready for the first time.

        "failing": the engine failed on its last batches; "stuck": it has not come back from one in time.
        """
        if self._state in ("loading", "warming_up", "failed"):
            return self._state
        if self.stopping:
            return "stopping"
        if self._states is not None and not self._states.all_were_ready():
            return "warming_up"
        assert self._predictor is not None
        batcher = self._predictor.batcher
        if batcher.failures >= FAILING_AFTER:
            return "failing"
        return "stuck" if batcher.busy_s() > self.settings.deadline_s else "ready"

    @property
    def gauges(self) -> Gauges:
        """What /metrics shows of it."""

        def model() -> tuple[str, str, str] | None:
            if self._predictor is None:
                return None
            classifier = self._predictor.classifier
            return classifier.card.name, classifier.card.version, classifier.engine.name

        return Gauges(
            state=lambda: self.state,
            queue_depth=lambda: self._predictor.batcher.waiting if self._predictor else 0,
            under_way=lambda: self.admission.under_way,
            model=model,
        )

    @property
    def example(self) -> ExampleFile | None:
        """The model's own image to try, if it came with one. Raises: NotReady."""
        return self.require_ready().classifier.example

    async def open(self) -> None:
        """Begin to load; `state` tells how far it is.

        The replacement of a worker that died loads before it returns, and so before it accepts connections: the others
        answer meanwhile, and the supervisor those who wait for this one.
        """
        self._starting = asyncio.get_running_loop().create_task(self._start(), name="start")
        if self._states is not None and self._states.all_were_ready():
            await self._starting

    async def close(self) -> None:
        """Answer what was accepted, then let everything go. A load under way is waited for."""
        self.stopping = True
        if self._starting is not None:
            await self._starting
        if self._watching is not None:
            self._watching.cancel()
        if self._finishing is not None:
            await self._finishing
        if self._predictor is not None:
            await self._predictor.batcher.close()
        self._engine_threads.shutdown(wait=False)
        await self._decoders.close()
        self._held.close()
        gc.unfreeze()

    async def drain(self, grace_s: float) -> None:
        """Answer what is under way now, for `grace_s` at most; `state` is "stopping" from now on."""
        self.stopping = True
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self.settings.drain_s
        self.admission.stop_within(grace_s)
        await self.admission.all_done()
        await asyncio.sleep(until_s - loop.time())

    async def read(self, body: bytes, content_type: str | None) -> Payloads:
        """The images' bytes in a request's body. Raises: RequestError."""
        if is_image(body) or len(body) <= SMALL_FORM_BYTES:
            return payloads_of(body, content_type)
        return await asyncio.to_thread(payloads_of, body, content_type)

    def require_ready(self) -> Predictor:
        """What answers. Raises: NotReady."""
        # Requests accepted before a stop are still answered: the batcher refuses when it closes.
        if self._predictor is None:
            raise NotReady(f"The service is not ready (state: {self.state}); GET /ping tells when it is.")
        return self._predictor

    def overload(self) -> str | None:
        """Why invocations are refused before they are looked at, None when they are not."""
        return None if self._predictor is None or self.stopping else self.admission.overload()

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            if self._given is not None:
                classifier = self._given
            else:
                classifier = await loop.run_in_executor(self._engine_threads, self._load)
            if self.stopping:
                return
            self._state = "warming_up"
            all_here = Barrier(classifier.engine.lanes)
            lanes = [
                loop.run_in_executor(self._engine_threads, self._warm_up, classifier, all_here)
                for _ in range(classifier.engine.lanes)
            ]
            seconds = await asyncio.gather(*lanes)
            self.admission.expect(max(seconds) / classifier.engine.lanes / COLD)
        except Exception as exc:  # whatever it is, the service cannot serve: told, then ended
            self._state = "failed"
            level = logging.ERROR if self._states is None or self._states.fails_first() else logging.DEBUG
            if _is_out_of_memory(exc):
                log.log(
                    level, "The model cannot be served. There is not enough memory for it (%s); give the process more, "
                    "or set fewer CLASSIFIER_WORKERS.", " ".join(str(exc).split())[-200:].rstrip(".") or "MemoryError",
                )  # fmt: skip
            else:
                trace = None if isinstance(exc, ArtifactError | EngineUnavailable) else exc
                log.log(level, "The model cannot be served. %s", exc, exc_info=trace)
            if self._on_failure is not None:
                self._on_failure()
            return
        batcher: Batcher[RgbImage, Prediction] = Batcher(
            classifier.classify,
            self._engine_threads,
            lanes=classifier.engine.lanes,
            max_batch=self._max_batch(classifier),
            max_queue=self.settings.max_images,
            max_wait_ms=self.settings.max_wait_ms,
            on_failure=self._note_failure,
            on_lost=self._on_failure or (lambda: None),
        )
        batcher.open()
        self._predictor = Predictor(classifier, batcher, self._decoders, self.settings.max_batch)
        self._watching = loop.create_task(self._watch_engine(batcher), name="engine watch")
        self._state = "ready"
        # What lives until the end is looked through no more: with it, a full collection in an overload takes 80 ms (the
        # slowest refusal of each of 6 runs, 2 cores of a Xeon with AMX). What a start leaves is 0.5 MiB of 304.
        gc.freeze()
        gc.set_threshold(GC_OBJECTS, *gc.get_threshold()[1:])
        gc.enable()
        if not self.stopping:
            if self._worker is not None and self._states is not None:
                self._states.tell_ready(self._worker.index)
            self._log_ready(classifier)
            self._finishing = loop.create_task(self._finish_start(classifier), name="finish start")

    def _note_failure(self, failures: int) -> None:
        """Of the engine, on so many batches in a row."""
        if failures == FAILING_AFTER:
            log.error("the engine failed on %d batches in a row: /ping answers 503 until one succeeds", failures)
        if failures == ENDS_AFTER and self._on_failure is not None:
            log.error("the engine failed on %d batches in a row; this process ends, so that a new one begins", failures)
            self._on_failure()

    async def _watch_engine(self, batcher: Batcher[RgbImage, Prediction]) -> None:
        stuck = False
        while True:
            await asyncio.sleep(WATCH_S)
            if self.admission.bytes_peak - self.admission.bytes_held > GIVE_BACK_BYTES:
                self.admission.bytes_peak = self.admission.bytes_held
                await asyncio.to_thread(give_back_memory)
            busy_s = batcher.busy_s()
            if stuck != (busy_s > self.settings.deadline_s):
                stuck = not stuck
                if stuck:
                    log.error(
                        "the engine has not come back from a batch for %.0f s: /ping answers 503 until it does", busy_s
                    )
                else:
                    log.info("the engine has come back")

    def _load(self) -> Classifier:
        started_s = time.perf_counter()
        folder = self._held.enter_context(model_folder(self.settings.model))
        classifier = load_model(folder, self.settings.engine, self._layout)
        card = classifier.card
        log.info(
            "model %s version %s: %d classes, %d px, engine %s, loaded and verified in %.1f s from %s",
            card.name, card.version, len(card.classes), classifier.side_px, classifier.engine.name,
            time.perf_counter() - started_s, self.settings.model,
        )  # fmt: skip
        return classifier

    def _warm_up(self, classifier: Classifier, all_here: Barrier) -> float:
        """Decode an image, run the largest batch and those of the engine's sizes: the first clients do not pay for what
        each needs once.

        In every lane: none begins before all have a thread of their own. Returns: seconds an image, of the largest.
        """
        all_here.wait()
        image: RgbImage = np.zeros((classifier.side_px, classifier.side_px, 3), np.uint8)
        if classifier.example is not None:
            image = decode_resized(classifier.example.path.read_bytes(), classifier.side_px)
        largest = self._max_batch(classifier)
        took_s = 0.0
        for size in sorted({largest, *(size for size in classifier.engine.warm_sizes if size < largest)}):
            began_s = time.perf_counter()
            classifier.classify([image] * size)
            took_s = time.perf_counter() - began_s
        return took_s / largest

    async def _finish_start(self, classifier: Classifier) -> None:
        """Do what takes a core for a while, and may wait until all workers answer."""
        while self._states is not None and not self._states.all_were_ready() and not self.stopping:
            await asyncio.sleep(LOOK_AGAIN_S)
        if self.stopping:
            return
        self._decoders.open()
        try:
            await asyncio.get_running_loop().run_in_executor(self._engine_threads, classifier.engine.settle)
        except Exception as exc:  # the service answers without: told, whatever it is
            trace = None if isinstance(exc, EngineUnavailable) else exc
            log.warning("images that come alone are answered no faster than others: %s", exc, exc_info=trace)

    def _max_batch(self, classifier: Classifier) -> int:
        return min(self.settings.max_batch, classifier.engine.best_batch)

    def _log_ready(self, classifier: Classifier) -> None:
        host = "127.0.0.1" if self.settings.host == "0.0.0.0" else self.settings.host  # noqa: S104  # compared
        url = f"http://{f'[{host}]' if ':' in host else host}:{self.settings.port}/invocations"
        log.info("ready: %s", url)
        if self._worker is not None and self._worker.index:
            return  # the first worker says the rest
        if classifier.card.caution is not None:
            log.warning("%s `make serve MODEL=...` serves another.", classifier.card.caution)
        if self.settings.page:
            log.info("a page to try images on: %s", url.removesuffix("invocations"))
        if classifier.example is not None:
            example = classifier.example
            kind = f"Content-Type: {example.media_type}"
            if self.settings.page:  # works from wherever the service is reached, a container's outside too
                command = f"curl -s {url.removesuffix('invocations')}example | "
                command += shlex.join(["curl", "-H", kind, "--data-binary", "@-", url])
            else:
                command = shlex.join(["curl", "-H", kind, "--data-binary", f"@{example.path}", url])
            log.info("an image of class %r to try: %s", example.label, command)


def _is_out_of_memory(exc: Exception) -> bool:
    """Python says so by a class, native libraries by their words."""
    words = ("bad_alloc", "cannot allocate memory", "failed to map segment", "out of memory")
    return isinstance(exc, MemoryError) or any(word in str(exc).lower() for word in words)
