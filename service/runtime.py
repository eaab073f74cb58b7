"""The service's parts and their lifecycle: loading -> warming_up -> ready -> stopping, or failed.

Built by `create_app`, opened and closed in the app's lifespan. Routes ask it for answers and see no tensors.
"""

import asyncio
import logging
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Literal

import numpy as np

from service.batcher import Batched, Batcher
from service.classifier import Classifier, Prediction
from service.decoding import Decoders
from service.engines.base import EngineUnavailable
from service.engines.choose import Layout, gpus
from service.errors import NotReady, Overloaded
from service.inference import input_fn, load_model, payload_of, predict_fn
from service.model.archive import model_folder
from service.model.errors import ArtifactError
from service.model.images import RgbImage
from service.settings import Settings
from service.workers import Worker

log = logging.getLogger(__name__)

ENGINE_THREADS = 64
"""More than any engine has lanes: threads are started as they are needed."""

State = Literal["loading", "warming_up", "ready", "stopping", "failed"]


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
        self._layout = Layout(threads, settings.engine_threads, device, settings.max_batch)
        self._on_failure = on_failure
        self._under_way = 0
        self._stopping = False
        self._engine_threads = ThreadPoolExecutor(ENGINE_THREADS, thread_name_prefix="engine")
        decoders = worker.share(settings.decode_threads) if worker else settings.decode_threads
        self._decoders = Decoders(decoders, settings.decode_limit_s)
        self._serving: tuple[Classifier, Batcher[RgbImage, Prediction]] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._held = ExitStack()

    @property
    def state(self) -> State:
        """How far it is; "warming_up" also while other workers are not ready for the first time."""
        if self._state == "ready" and self._states is not None and not self._states.all_were_ready():
            return "warming_up"
        return self._state

    async def open(self) -> None:
        """Begin to load; `state` tells how far it is.

        The replacement of a worker that died loads before it returns, and so before it accepts connections: the others
        answer meanwhile.
        """
        self._starting = asyncio.get_running_loop().create_task(self._start(), name="start")
        if self._states is not None and self._states.all_were_ready():
            await self._starting

    async def close(self) -> None:
        """Answer what was accepted, then let everything go. A load under way is waited for."""
        self._stopping = True
        if self._state != "failed":
            self._state = "stopping"
        if self._starting is not None:
            await self._starting
        if self._serving is not None:
            await self._serving[1].close()
        self._engine_threads.shutdown(wait=False)
        await self._decoders.close()
        self._held.close()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold one of the places for requests under way. Raises: NotReady, Overloaded."""
        self._require_ready()
        if self._under_way >= self.settings.max_requests:
            raise Overloaded(f"{self._under_way} requests are under way, as many as allowed; try again in a moment.")
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def predict(self, body: bytes, content_type: str | None) -> tuple[Batched[Prediction], float]:
        """Decode, crop and resize, then predict in a batch.

        Returns: the batched prediction, and the milliseconds that decoding took.
        Raises: RequestError, Unavailable, ImageError.
        """
        classifier, batcher = self._require_ready()
        started_s = time.perf_counter()
        image = await self._decoders.decode(payload_of(body, content_type), classifier.side_px)
        decode_ms = (time.perf_counter() - started_s) * 1000
        return await batcher.submit(image), decode_ms

    def _require_ready(self) -> tuple[Classifier, Batcher[RgbImage, Prediction]]:
        # Requests accepted before a stop are still answered: the batcher refuses when it closes.
        if self._serving is None or self._state not in ("ready", "stopping"):
            raise NotReady(f"The service is not ready (state: {self.state}); GET /ping tells when it is.")
        return self._serving

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            if self._given is not None:
                classifier = self._given
            else:
                classifier = await loop.run_in_executor(self._engine_threads, self._load)
            if self._stopping:
                return
            self._state = "warming_up"
            lanes = range(classifier.engine.lanes)
            await asyncio.gather(
                *[loop.run_in_executor(self._engine_threads, self._warm_up, classifier) for _ in lanes]
            )
        except Exception as exc:  # whatever it is, the service cannot serve: told, then ended
            self._state = "failed"
            trace = None if isinstance(exc, ArtifactError | EngineUnavailable) else exc
            log.error("The model cannot be served. %s", exc, exc_info=trace)
            if self._on_failure is not None:
                self._on_failure()
            return
        batcher: Batcher[RgbImage, Prediction] = Batcher(
            lambda images: predict_fn(images, classifier),
            self._engine_threads,
            lanes=classifier.engine.lanes,
            max_batch=self._max_batch(classifier),
            max_queue=self.settings.max_requests,
            max_wait_ms=self.settings.max_wait_ms,
        )
        batcher.open()
        self._serving = (classifier, batcher)
        if not self._stopping:
            self._state = "ready"
            self._decoders.open()  # not before: starting takes a core for a quarter of a second
            if self._worker is not None and self._states is not None:
                self._states.tell_ready(self._worker.index)
            self._log_ready(classifier)

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

    def _warm_up(self, classifier: Classifier) -> None:
        """Decode an image, run the smallest and the largest batch: so that the first client does not pay for it."""
        if classifier.example is not None:
            predict_fn(input_fn(classifier.example.path.read_bytes(), classifier.example.media_type), classifier)
        blank = np.zeros((classifier.side_px, classifier.side_px, 3), np.uint8)
        for size in {1, self._max_batch(classifier)}:
            classifier.classify([blank] * size)

    def _max_batch(self, classifier: Classifier) -> int:
        return min(self.settings.max_batch, classifier.engine.best_batch)

    def _log_ready(self, classifier: Classifier) -> None:
        host = "127.0.0.1" if self.settings.host == "0.0.0.0" else self.settings.host  # noqa: S104  # compared
        url = f"http://{f'[{host}]' if ':' in host else host}:{self.settings.port}/invocations"
        log.info("ready: %s", url)
        if self._worker is not None and self._worker.index:
            return  # the first worker says the rest
        if classifier.example is not None:
            example = classifier.example
            command = ["curl", "-H", f"Content-Type: {example.media_type}", "--data-binary", f"@{example.path}", url]
            log.info("an image of class %r to try: %s", example.label, shlex.join(command))
