"""LitServe: batching on, as in https://lightning.ai/docs/litserve/features/batching.

Batches of 8 and a pool that decodes in `batch`, as in LitServe's own benchmark of an image classifier on a CPU (its
repository, tests/perf_test); the image arrives as a file of a form, as in its documentation of file uploads.
"""

from concurrent.futures import ThreadPoolExecutor

import litserve as ls
from classifier import PORT, THREADS, WORKERS, load
from fastapi import UploadFile


class ImageClassifier(ls.LitAPI):
    def setup(self, device):
        self.classifier = load()
        self.pool = ThreadPoolExecutor(THREADS)

    def decode_request(self, request: UploadFile):
        return request.file.read()

    def batch(self, inputs):
        return list(self.pool.map(self.classifier.decode, inputs))

    def predict(self, batch):
        return self.classifier.predict(batch)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return {"predictions": output}


if __name__ == "__main__":
    api = ImageClassifier(max_batch_size=8, batch_timeout=0.0)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=WORKERS, fast_queue=True)
    server.run(host="127.0.0.1", port=PORT, num_api_servers=1, log_level="warning", generate_client_file=False)
