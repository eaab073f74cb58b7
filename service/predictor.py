"""What answers the images of one request: each decoded, then predicted in batches with what else is there."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from service.admission import Places
from service.answers import Outcome
from service.batcher import Batched, Batcher
from service.classifier import Classifier, ModelCard, Prediction
from service.decoding import Decoders
from service.errors import without_frames
from service.model.errors import ImageError
from service.model.images import RgbImage
from service.payloads import Payloads

DECODER_WAIT_S = 2.0
"""A request of one image that finds no decoder process free for so long is refused: hostile files hold them for seconds
each. With the 7.5 s by the clock that decoding may take (`CLASSIFIER_DECODE_LIMIT_S` 5), it is answered within 10 s.
The images of a request of several wait as long as the deadline allows, and share 5 s of processor time."""


@dataclass
class Answered:
    """What became of the images of one request."""

    card: ModelCard
    several: bool
    outcomes: list[Outcome]
    """One for each image, in order."""
    decode_ms: float | None = None
    queue_ms: float | None = None
    infer_ms: float | None = None
    batch_size: int | None = None
    """Of several images, each the longest, and the largest batch; but for the first, None where none could be read."""

    def note_decode(self, decode_ms: float) -> None:
        """Take in how long one of the images took to decode, readable or not."""
        self.decode_ms = max(self.decode_ms or 0.0, decode_ms)

    def note(self, batched: Batched[Prediction]) -> None:
        """Take the other times of one of the images in."""
        self.queue_ms = max(self.queue_ms or 0.0, batched.queue_ms)
        self.infer_ms = max(self.infer_ms or 0.0, batched.infer_ms)
        self.batch_size = max(self.batch_size or 0, batched.batch_size)


@dataclass(frozen=True)
class Predictor:
    """A loaded model with what decodes and batches for it."""

    classifier: Classifier
    batcher: Batcher[RgbImage, Prediction]
    decoders: Decoders
    at_once: int
    """Of the images of one request, so many are under way together."""

    async def predict(
        self, payloads: Payloads, places: Places, require_client: Callable[[], None] = lambda: None
    ) -> Answered:
        """Decode, crop and resize, then predict in batches with what else is there.

        `require_client` raises where the client has left: the engine does not work for it.
        Raises: Unavailable, ImageError.
        """
        answered = Answered(self.classifier.card, payloads.several, [])
        patience_s = None if payloads.several else DECODER_WAIT_S
        allowance = self.decoders.allowance(payloads.several)

        async def outcome(payload: bytes) -> Outcome:
            started_s = time.perf_counter()
            try:
                image = await self.decoders.decode(payload, self.classifier.side_px, patience_s, allowance)
            except ImageError as exc:
                return without_frames(exc)
            finally:
                answered.note_decode((time.perf_counter() - started_s) * 1000)
            require_client()
            batched = await self.batcher.submit(image)
            answered.note(batched)
            return batched.value

        if payloads.several:
            places.images = len(payloads.images)
            places.take_more(min(len(payloads.images), self.at_once) - places.held)
            answered.outcomes += await _gather(outcome, payloads.images, places.held)
        else:
            answered.outcomes.append(await outcome(payloads.images[0]))
        return answered


async def _gather(
    outcome: Callable[[bytes], Awaitable[Outcome]], payloads: Sequence[bytes], at_once: int
) -> list[Outcome]:
    """The outcomes of `payloads`, `at_once` under way; a failure ends them all."""
    outcomes: dict[int, Outcome] = {}
    left = iter(enumerate(payloads))

    async def work() -> None:
        for index, payload in left:
            outcomes[index] = await outcome(payload)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    except BaseExceptionGroup as exc:
        raise exc.exceptions[0] from exc
    return [outcomes[index] for index in range(len(payloads))]
