"""The in-process limit of an engine: decode, crop and resize, forward, top five over the same JPEG bytes, without HTTP.

    python -m tests.bench.limit --engine openvino-int8 --model FOLDER --cache FOLDER --seconds 6

Several ways to keep all cores, or the GPU, busy are tried and the best one named; what a service adds to it is its own
cost. Prints JSON: throughput, way, p50_ms of a single image (decode included), n; of a GPU also `forward`: images per
second of batches that are decoded already, by the engine and by its captured graph alone, replayed without a copy.
"""

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from service.model.images import decode
from service.model.machine import cores, gpus
from service.model.resize import crop_resize
from service.model.small_maps import flatten_small_maps
from tests.bench.inputs import payloads

ENGINES = ("torch", "openvino-fp32", "openvino-bf16", "openvino-int8")
GPU_ENGINES = ("torch-cuda",)
GPU_BATCH = 32
WARMUP_S = 1.0
Infer = Callable[[np.ndarray], np.ndarray]


def engines() -> tuple[str, ...]:
    """What can be measured on this machine."""
    return (*GPU_ENGINES, *ENGINES) if gpus() else ENGINES


def top_five(logits: np.ndarray) -> list[list[tuple[int, float]]]:
    """Softmax and the five likeliest of each row."""
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs = exps / exps.sum(axis=1, keepdims=True)
    return [[(int(i), float(row[i])) for i in np.argsort(-row)[:5]] for row in probs]


class Images:
    """Decoded and resized pictures from a pool of threads, always some ahead."""

    def __init__(self, bodies: list[bytes], side_px: int, ahead: int) -> None:
        self.bodies, self.side_px = cycle(bodies), side_px
        self.users = ExitStack()
        """What is to be done before they are closed."""
        self.pool = ThreadPoolExecutor(cores())
        self.waiting: deque[Future[np.ndarray]] = deque(self._next() for _ in range(ahead))

    def _next(self) -> Future[np.ndarray]:
        return self.pool.submit(lambda body: crop_resize(decode(body), self.side_px), next(self.bodies))

    def batch(self, size: int) -> np.ndarray:
        """uint8 `[size, S, S, 3]`."""
        taken = []
        for _ in range(size):
            taken.append(self.waiting.popleft().result())
            self.waiting.append(self._next())
        return np.stack(taken)

    def close(self) -> None:
        self.users.close()
        self.pool.shutdown(cancel_futures=True)


def rate(step: Callable[[], int], seconds: float) -> tuple[float, int]:
    """Pictures per second of `step`, which returns how many it finished; after a warm-up."""
    until_s = time.perf_counter() + WARMUP_S
    while time.perf_counter() < until_s:
        step()
    started_s, done = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - started_s) < seconds:
        done += step()
    return done / elapsed_s, done


def synchronous(infer: Infer, images: Images, size: int) -> Callable[[], int]:
    """Batches one after the other; the next is decoded meanwhile."""

    def step() -> int:
        top_five(infer(images.batch(size)))
        return size

    return step


def parallel(infer: Infer, images: Images, size: int) -> Callable[[], int]:
    """As many batches beside each other as there are cores."""
    pool = ThreadPoolExecutor(cores())
    running: deque[Future[Any]] = deque()

    def step() -> int:
        running.append(pool.submit(lambda batch: top_five(infer(batch)), images.batch(size)))
        return len(running.popleft().result()) if len(running) > cores() else 0

    return step


def asynchronous(compiled: Any, images: Images, size: int) -> Callable[[], int]:
    """As many of OpenVINO's infer requests under way as its throughput mode wants, in turn.

    Not its AsyncInferQueue: one that is let go while a callback of its ends waits for itself, after `wait_all` too.
    """
    wanted = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    free = deque(compiled.create_infer_request() for _ in range(wanted))
    running: deque[Any] = deque()

    def finish() -> int:
        request = running.popleft()
        request.wait()
        free.append(request)
        return len(top_five(request.get_output_tensor(0).data))

    def finish_all() -> None:
        while running:
            finish()

    images.users.callback(finish_all)

    def step() -> int:
        batch = images.batch(size)
        count = 0 if free else finish()
        running.append(free.popleft())
        running[-1].start_async({0: batch})
        return count

    return step


def torch_ways(model: Path) -> tuple[Infer, Iterator[tuple[str, Callable[[Images], Callable[[], int]], int]]]:
    """How to run PyTorch: on all cores for one image, and the ways for many."""
    import torch

    from service.model.artifact import open_artifact
    from service.model.network import network_of

    network = network_of(open_artifact(model / "artifact"))
    torch.set_num_threads(cores())

    def infer(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(batch)).numpy()

    def ways() -> Iterator[tuple[str, Callable[[Images], Callable[[], int]], int]]:
        for size in (8, 32):
            yield f"batches of {size}", lambda images, size=size: synchronous(infer, images, size), size
        torch.set_num_threads(1)  # the last way: threads beside each other, none inside an operation
        yield "batches of 8, a thread per core", lambda images: parallel(infer, images, 8), 8 * cores()

    return infer, ways()


def openvino_ways(
    engine: str, model: Path
) -> tuple[Infer, Iterator[tuple[str, Callable[[Images], Callable[[], int]], int]]]:
    """How to run OpenVINO: latency mode for one image, and the ways for many."""
    import openvino

    core = openvino.Core()
    network = core.read_model(model / ("int8.xml" if engine == "openvino-int8" else "float.xml"))
    flatten_small_maps(network)  # as our engine does; peers run the file as it is
    precision = {"INFERENCE_PRECISION_HINT": "bf16" if engine == "openvino-bf16" else "f32"}
    threads = {"INFERENCE_NUM_THREADS": cores()}
    latency = core.compile_model(network, "CPU", {"PERFORMANCE_HINT": "LATENCY", **precision, **threads})

    def infer(batch: np.ndarray) -> np.ndarray:
        return latency(batch)[0]

    def ways() -> Iterator[tuple[str, Callable[[Images], Callable[[], int]], int]]:
        yield "latency mode, batches of 32", lambda images: synchronous(infer, images, 32), 32
        compiled = core.compile_model(network, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT", **precision, **threads})
        for size in (1, 8):
            name = f"throughput mode, batches of {size}"
            yield name, lambda images, size=size: asynchronous(compiled, images, size), 4 * size

    return infer, ways()


def cuda_ways(engine: Any) -> tuple[Infer, Iterator[tuple[str, Callable[[Images], Callable[[], int]], int]]]:
    """How to run the engine of our service for GPUs: batches are decoded on the cores while it computes."""

    def ways() -> Iterator[tuple[str, Callable[[Images], Callable[[], int]], int]]:
        for size in (8, GPU_BATCH):
            yield f"batches of {size}", lambda images, size=size: synchronous(engine.infer, images, size), size

    return engine.infer, ways()


def cuda_forward(engine: Any, side_px: int, seconds: float) -> dict[str, float]:
    """Images per second of one batch again and again: `infer` with its copies, and the bare graph's replays."""
    import torch

    batch = np.zeros((GPU_BATCH, side_px, side_px, 3), np.uint8)
    captured = engine._graphs[GPU_BATCH]  # the graph alone is what the engine keeps to itself

    def replay() -> int:
        with torch.cuda.stream(captured._stream):
            captured._graph.replay()
        captured._stream.synchronize()
        return GPU_BATCH

    return {"infer": rate(lambda: len(engine.infer(batch)), seconds)[0], "bare_graph": rate(replay, seconds)[0]}


def measure(engine: str, model: Path, cache: Path, seconds: float) -> dict[str, Any]:
    """The engine's limit; see the module."""
    side_px = json.loads((model / "facts.json").read_text())["side"]
    bodies, _ = payloads(side_px, cache)
    forward = {}
    if engine in GPU_ENGINES:
        from service.engines.cuda import CudaEngine
        from service.model.artifact import open_artifact

        cuda = CudaEngine(open_artifact(model / "artifact"), 0, GPU_BATCH)
        forward = {"forward": cuda_forward(cuda, side_px, seconds)}
        infer, ways = cuda_ways(cuda)
    else:
        infer, ways = torch_ways(model) if engine == "torch" else openvino_ways(engine, model)

    times_ms: list[float] = []
    until_s = time.perf_counter() + WARMUP_S + seconds
    for body in cycle(bodies):
        started_s = time.perf_counter()
        if started_s > until_s:
            break
        top_five(infer(np.stack([crop_resize(decode(body), side_px)])))
        if started_s > until_s - seconds:
            times_ms.append(1000 * (time.perf_counter() - started_s))

    rates = {}
    for name, make, ahead in ways:
        images = Images(bodies, side_px, 2 * ahead)
        rates[name] = rate(make(images), seconds)
        images.close()
    way, (throughput, n) = max(rates.items(), key=lambda entry: entry[1][0])
    all_ways = {name: value for name, (value, _) in rates.items()}
    p50_ms = statistics.median(times_ms)
    return {"throughput": throughput, "way": way, "n": n, "p50_ms": p50_ms, "ways": all_ways, **forward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=engines(), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=6)
    options = parser.parse_args()
    print(json.dumps(measure(options.engine, options.model, options.cache, options.seconds)))


if __name__ == "__main__":
    main()
