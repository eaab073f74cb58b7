"""The service's parts and their lifecycle: loading -> warming_up -> ready -> stopping, or failed.

Built by `create_app`, opened and closed in the app's lifespan. Routes ask it for answers and see no tensors.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from service.batcher import Batched, Batcher
from service.classifier import Classifier, Prediction
from service.errors import NotReady, Overloaded
from service.inference import input_fn, model_fn, predict_fn
from service.model.archive import unpack
from service.model.artifact import open_artifact
from service.model.errors import ArtifactError
from service.model.images import RgbImage
from service.model.preprocess import fit
from service.settings import Settings

log = logging.getLogger(__name__)

State = Literal["loading", "warming_up", "ready", "stopping", "failed"]


class Runtime:
    """Loads the model in the background, then answers payloads."""

    def __init__(
        self, settings: Settings, classifier: Classifier | None = None, on_failure: Callable[[], None] | None = None
    ) -> None:
        """With a `classifier`, nothing is loaded. `on_failure` is called when the model cannot be served."""
        self.settings = settings
        self.state: State = "loading"
        self._classifier = classifier
        self._on_failure = on_failure
        self._under_way = 0
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._batcher: Batcher[RgbImage, Prediction] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._starting: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to load; `state` tells how far it is."""
        self._starting = asyncio.get_running_loop().create_task(self._start(), name="start")

    async def close(self) -> None:
        """Answer what was accepted, then let everything go."""
        if self.state != "failed":
            self.state = "stopping"
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._batcher is not None:
            await self._batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        if self._scratch is not None:
            self._scratch.cleanup()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold one of the places for requests under way. Raises: NotReady, Overloaded."""
        if self.state != "ready":
            raise NotReady(f"The service is not ready (state: {self.state}); GET /ping tells when it is.")
        if self._under_way >= self.settings.max_requests:
            raise Overloaded(f"{self._under_way} requests are under way, as many as allowed; try again in a moment.")
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def predict(self, payload: bytes, content_type: str | None) -> tuple[Batched[Prediction], float]:
        """Decode and fit in a decoding thread, then predict in a batch.

        Returns: the batched prediction, and the milliseconds that decoding took.
        Raises: RequestError, Unavailable, ImageError.
        """
        if self._batcher is None or self._classifier is None:
            raise NotReady(f"The service is not ready (state: {self.state}); GET /ping tells when it is.")
        side_px = self._classifier.side_px

        def decode() -> tuple[RgbImage, float]:
            started_s = time.perf_counter()
            (image,) = input_fn(payload, content_type)
            fitted = fit(image, side_px)
            return fitted, (time.perf_counter() - started_s) * 1000

        image, decode_ms = await asyncio.get_running_loop().run_in_executor(self._decoders, decode)
        return await self._batcher.submit(image), decode_ms

    async def _start(self) -> None:
        try:
            if self._classifier is None:
                self._classifier = await asyncio.to_thread(self._load)
            self.state = "warming_up"
            await asyncio.to_thread(self._warm_up, self._classifier)
        except Exception as exc:
            self.state = "failed"
            if isinstance(exc, ArtifactError):
                log.error("The model cannot be served. %s", exc)
            else:
                log.exception("The model cannot be served: %s", exc)
            if self._on_failure is not None:
                self._on_failure()
            return
        self._batcher = Batcher(
            self._classify, max_batch=self.settings.max_batch, max_queue=self.settings.max_requests,
            max_wait_ms=self.settings.max_wait_ms,
        )  # fmt: skip
        self._batcher.open()
        self.state = "ready"

    def _load(self) -> Classifier:
        started_s = time.perf_counter()
        source = self.settings.model
        folder = source
        if source.is_file():
            # Removed when the service closes, or at the latest when the interpreter ends.
            self._scratch = tempfile.TemporaryDirectory(prefix="model-", ignore_cleanup_errors=True)
            folder = unpack(source, Path(self._scratch.name))
        classifier = model_fn(folder)
        card = classifier.card
        log.info(
            "model %s version %s: %d classes, %d px, engine %s, loaded and verified in %.1f s from %s",
            card.name, card.version, len(card.classes), classifier.side_px, classifier.engine.name,
            time.perf_counter() - started_s, source,
        )  # fmt: skip
        self._log_example(folder)
        return classifier

    def _log_example(self, folder: Path) -> None:
        artifact = open_artifact(folder)
        example = artifact.manifest.example
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "::") else self.settings.host  # noqa: S104  # compared
        log.info(
            "try: curl -H 'Content-Type: %s' --data-binary @%s http://%s:%d/invocations  (an image of class %s)",
            example.media_type, artifact.path("example"), host, self.settings.port, example.label,
        )  # fmt: skip

    def _warm_up(self, classifier: Classifier) -> None:
        """Run the smallest and the largest batch once, so that the first client does not pay for it."""
        blank = np.zeros((classifier.side_px, classifier.side_px, 3), np.uint8)
        for size in {1, self.settings.max_batch}:
            classifier.classify([blank] * size)

    def _classify(self, images: list[RgbImage]) -> list[Prediction]:
        if self._classifier is None:
            raise RuntimeError("the batcher runs without a model")
        return predict_fn(images, self._classifier)
