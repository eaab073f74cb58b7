"""Ray Serve: one deployment, dynamic batching (https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html).

After the documentation's image model (https://docs.ray.io/en/latest/serve/tutorials/serve-ml-models.html): the body is
read in `__call__`, decoding and the forward pass run in the batched method; `max_ongoing_requests` leaves room for
batches.
"""

import time

import ray
from classifier import PORT, THREADS, WORKERS, load
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=WORKERS, ray_actor_options={"num_cpus": THREADS}, max_ongoing_requests=64)
class ImageModel:
    def __init__(self):
        self.classifier = load()

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)
    async def predict(self, payloads: list[bytes]):
        return self.classifier.predict([self.classifier.decode(payload) for payload in payloads])

    async def __call__(self, request: Request):
        return {"predictions": await self.predict(await request.body())}


if __name__ == "__main__":
    # The replicas take all cores by the documentation's rule of one per CPU; the proxy and controller ask for none.
    ray.init(num_cpus=WORKERS * THREADS, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(ImageModel.bind(), route_prefix="/predict")
    while True:
        time.sleep(3600)
