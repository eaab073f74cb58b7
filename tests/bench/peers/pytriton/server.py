"""Triton Inference Server through PyTriton: dynamic batching in Triton, decoding and the model in the callable.

As in https://triton-inference-server.github.io/pytriton/latest/binding_models/; several callables are its documented
way to several workers. The image is Triton's raw binary request (extension_binary_data): the body is the JPEG file.
"""

import json

import numpy as np
from classifier import PORT, WORKERS, load
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def worker():
    classifier = load()

    @batch
    def infer(image):  # bytes [N, 1]
        answers = classifier.predict([classifier.decode(row[0]) for row in image])
        return {"predictions": np.array([[json.dumps(answer).encode()] for answer in answers], dtype=np.bytes_)}

    return infer


if __name__ == "__main__":
    config = TritonConfig(
        http_address="127.0.0.1", http_port=PORT, grpc_port=PORT + 1, metrics_port=PORT + 2, log_verbose=0
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="Classifier",
            infer_func=[worker() for _ in range(WORKERS)],
            inputs=[Tensor(name="image", dtype=np.bytes_, shape=(1,))],
            outputs=[Tensor(name="predictions", dtype=np.bytes_, shape=(1,))],
            config=ModelConfig(max_batch_size=8, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()
