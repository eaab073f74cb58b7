"""BentoML: a service whose API takes images and is batched adaptively.

As in https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html: `batchable=True`, one image a request, sent
as a file of a form; the dispatcher chooses batch sizes up to 8 by the times it has seen.
"""

import bentoml
from classifier import WORKERS, load
from PIL.Image import Image as PILImage


@bentoml.service(workers=WORKERS, traffic={"timeout": 60})
class Classifier:
    def __init__(self) -> None:
        self.classifier = load()

    @bentoml.api(batchable=True, max_batch_size=8, max_latency_ms=1000)
    def predict(self, images: list[PILImage]) -> list[list[dict]]:
        return self.classifier.predict([self.classifier.prepare(image) for image in images])
