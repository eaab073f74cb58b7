"""What the profiler costs a step: ResNet-34 with and without it, in turns, so that both meet the same neighbours.

    python tests/bench/profiling.py --side 32 --batch 32 --rounds 10 --threads 1

Prints the median step of each, in seconds of the clock and of the processor (which neighbours disturb less), the
spread, and what writing the trace costs.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.model.architecture import Architecture
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.callbacks import Callback, RunContext, Step, tell
from training.config import TrainingConfig
from training.data.dataset import ArrayImages, Dataset
from training.profiling.profiler import Profiler

STEPS = 10
"""Of a round."""


class Bench:
    def __init__(self, side_px: int, batch: int) -> None:
        torch.manual_seed(0)
        self.side_px = side_px
        architecture = Architecture(num_classes=100, hidden_units=512, frozen=("stem", "layer1", "layer2", "layer3"))
        self.network = Network(architecture, Preprocessing(side_px=side_px))
        pixels = np.random.default_rng(0).integers(0, 256, (batch, side_px, side_px, 3), dtype=np.uint8)
        self.images = ArrayImages(pixels, np.zeros(batch, np.int64))
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
        self.criterion = nn.CrossEntropyLoss()

    def round(self, callbacks: Sequence[Callback], folder: Path) -> list[tuple[float, float]]:
        """Milliseconds of each of STEPS steps, callbacks included: of the clock, and of the processor."""
        dataset = Dataset("bench", tuple(map(str, range(100))), self.images, self.images, {})
        config = TrainingConfig(data=folder, output=folder)
        context = RunContext(
            config, self.network, self.criterion, dataset, folder, torch.device("cpu"), STEPS, STEPS, 1
        )  # fmt: skip
        tell(callbacks, "on_run_start", context)
        times_ms = []
        for number in range(1, STEPS + 1):
            started_s, started_cpu_s = time.perf_counter(), time.process_time()
            batch, labels = torch.from_numpy(self.images.pixels), torch.from_numpy(self.images.labels)
            wait_s = time.perf_counter() - started_s
            tell(callbacks, "on_step_start", number)
            logits = self.network(batch)
            loss = self.criterion(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            hits = (logits.argmax(1) == labels).sum()
            step = Step(number, 1, 0.01, labels, loss.detach(), hits, wait_s, time.perf_counter() - started_s)
            tell(callbacks, "on_step_end", step)
            times_ms.append((1000 * (time.perf_counter() - started_s), 1000 * (time.process_time() - started_cpu_s)))
        tell(callbacks, "on_run_end", None)
        return times_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("side", 32), ("batch", 32), ("rounds", 10), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(options.threads)
    bench = Bench(options.side, options.batch)
    times_ms: dict[str, list[tuple[float, float]]] = {"without": [], "timed and sampled": [], "traced": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench.round([], folder)  # burn in
        bench.round([Profiler((3, 4))], folder)
        for _ in range(options.rounds):
            times_ms["without"] += bench.round([], folder)
            times_ms["timed and sampled"] += bench.round([Profiler(None)], folder)
            traced = bench.round([Profiler((2, STEPS))], folder)
            times_ms["traced"] += traced[1:-1]
            write_ms = traced[-1][0] - statistics.median(wall for wall, _ in traced[1:-1])
        size_kb = (folder / "trace.json.gz").stat().st_size / 1000
    threads = torch.get_num_threads()
    print(f"ResNet-34, {options.side} px, batch {options.batch}, {threads} threads, CPU, torch {torch.__version__}")
    for place, clock in enumerate(("clock", "processor")):
        base_ms = statistics.median(times[place] for times in times_ms["without"])
        for what, values in times_ms.items():
            low, middle, high = statistics.quantiles([times[place] for times in values], n=4)
            print(
                f"{clock:9} {what:17} median {middle:7.2f} ms ({middle / base_ms - 1:+.1%}), "
                f"quartiles {low:.2f} to {high:.2f}, n={len(values)} steps"
            )
    print(f"writing the trace of {STEPS - 1} steps: {write_ms:.0f} ms once, {size_kb:.0f} kB")


if __name__ == "__main__":
    main()
