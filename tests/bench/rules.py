"""`python -m tests.bench.rules`: the debugging rules on real pictures: silent on a healthy run, loud on sick ones.

Weights are pretrained here on 5 classes of CIFAR-10, from torchvision's initial values, as ImageNet's were; the runs
fine-tune on the other 5, 400 training images of each, blocks 1 to 3 frozen, with the rules' default parameters unless
the table says otherwise. Each sick run differs from the healthy one by the disease that is named (settings, data, or a
network changed before the first step), by having no augmentation and a constant learning rate, and in epochs.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from service.model.network import Network
from tests.bench.pictures import selection, unpacked
from tests.bench.table import save
from tests.bench.transfer import FINE_TUNING, PRETRAINING, pretrain
from training.callbacks import Callback, RunContext
from training.command_line import configure_logging
from training.config import TrainingConfig
from training.debugging.configuration import RULES, create_rules
from training.debugging.observer import Observer
from training.debugging.verdicts import FILE
from training.errors import DivergedError
from training.run import fit, prepare

log = logging.getLogger("bench")

OBSERVE_EVERY = 10
"""Steps between observations: the runs are short."""
HEALTHY: dict[str, Any] = {
    "epochs": 5, "batch_size": 32, "learning_rate": 0.01, "schedule": "constant", "augment": "rand",
    "precision": "auto",
}  # fmt: skip
SICK: dict[str, Any] = {"augment": "none"}
"""What all sick runs have beside their disease, for the sake of time: they train from cached features."""


@dataclass(frozen=True)
class Case:
    """A run, and the rules that must fire on it; the healthy one has none, and none may fire."""

    name: str
    wanted: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Network], None] | None = None
    """What is done to the network before its first step."""
    per_class: tuple[float, ...] = (1, 1, 1, 1, 1)
    """Share of the images of each class that is trained on."""
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Parameters of rules that are not the defaults."""
    stall_s: float = 0
    """How long one step hangs."""


def saturate(network: Network) -> None:
    """A tanh in place of the head's ReLU, its inputs so far above zero that it has no slope there."""
    network.fc.activation = nn.Tanh()
    network.fc.hidden.bias.fill_(100)


def zero(network: Network) -> None:
    """A head of zeros, in which every unit stays what all others are."""
    for parameter in network.fc.parameters():
        parameter.zero_()


def sink_biases(network: Network) -> None:
    """Biases so far below zero that no input lifts a unit of the head's ReLU above it."""
    network.fc.hidden.bias.fill_(-100)


CASES = (
    # Overtraining judges from the seventh epoch on. At a constant learning rate the loss would stand still by then and
    # half of the head's ReLUs be dead, which the rules say, rightly (seeds 0 and 1, commit 92ecd27).
    Case("healthy", settings={"epochs": 8, "schedule": "one-cycle"}),
    Case("a saturated tanh in the head", ("VanishingGradient",), {"epochs": 2}, saturate),
    Case("learning rate 1e6", ("ExplodingTensor",), {"epochs": 1, "learning_rate": 1e6}),
    Case("a head of zeros", ("PoorWeightInitialization", "AllZero"), {"epochs": 2}, zero),
    Case("the head's biases at -100", ("DeadRelu",), {"epochs": 1}, sink_biases),
    Case(
        "learning rate 1e-10", ("UnchangedTensor", "WeightUpdateRatio", "LossNotDecreasing"),
        {"epochs": 5, "learning_rate": 1e-10},
    ),
    Case(
        "a twentieth of the images, 50 epochs", ("Overfit", "Overtraining"), {"epochs": 50}, per_class=(0.05,) * 5,
    ),
    Case("four classes with a fiftieth of their images", ("ClassImbalance",), {"epochs": 3},
         per_class=(1, 0.02, 0.02, 0.02, 0.02)),
    Case(
        "a step that hangs for 5 s", ("StalledTrainingRule",), {"epochs": 1}, stall_s=5,
        parameters={"StalledTrainingRule": {"threshold": 2}},
    ),
)  # fmt: skip


class WholeBranches(Callback):
    """Residual branches start at one, as torchvision's do where ImageNet's weights come from, and not at zero as ours.

    With few epochs of pretraining, some would stay near zero, and what stands before them would hardly learn.
    """

    def on_run_start(self, context: RunContext) -> None:
        """See `Callback`."""
        for module in context.network.modules():
            if isinstance(module, BasicBlock):
                nn.init.ones_(module.bn2.weight)


class Disease(Callback):
    """Changes the network before the first step, and lets one step hang."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def on_run_start(self, context: RunContext) -> None:
        """See `Callback`."""
        if self._case.change is not None:
            assert isinstance(context.network, Network)
            with torch.no_grad():
                self._case.change(context.network)

    def on_step_start(self, number: int) -> None:
        """See `Callback`."""
        if number == 2:
            time.sleep(self._case.stall_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases and write the table; returns the exit status: 1 when a rule is silent or loud where it must not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=400, help="of each class to train on, and to validate on")
    parser.add_argument("--weights", type=Path, help="pretrained weights; default: they are made here (minutes)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws its own images, weights and runs"
    )
    parser.add_argument("--only", choices=[case.name for case in CASES], action="append", help="writes no table")
    options = parser.parse_args(arguments)
    configure_logging()
    train = unpacked(Path(tempfile.gettempdir()) / "resnet34-bench")
    if train is None:
        log.error("The CIFAR-10 JPEG files are not at hand (../shared/data): nothing is measured.")
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        rows: list[list[object]] = []
        right = True
        for seed in options.seeds:
            folder = Path(scratch) / f"seed{seed}"
            of_seed, as_wanted = measure(train, folder, options.images, options.weights, options.only, seed)
            rows += of_seed
            right = right and as_wanted
    if not options.only:
        write(rows, options.images)
    return 0 if right else 1


def measure(
    train: Path, scratch: Path, images: int, weights: Path | None, only: Sequence[str] | None, seed: int
) -> tuple[list[list[object]], bool]:
    """Pretrain, run the cases with one seed; see `main`. Returns: their rows, and whether all are as wanted."""
    rows: list[list[object]] = []
    right = True
    if weights is None:
        pictures = selection(train, scratch / "first", PRETRAINING, 2000, seed=seed)
        weights = pretrain(pictures, scratch / "pretrained", epochs=4, callbacks=[WholeBranches()], seed=seed)
    validation = selection(train, scratch / "validation", FINE_TUNING, images, skip=images, seed=seed)
    for number, case in enumerate(CASES):
        if only and case.name not in only:
            continue
        data = scratch / f"data{number}"
        for name, share in zip(FINE_TUNING, case.per_class, strict=True):
            selection(train, data, (name,), max(2, round(share * images)), seed=seed)
        started_s = time.monotonic()
        verdicts, state = run_case(case, data, validation, weights, scratch / f"run{number}", seed)
        fired = {verdict["rule"]: verdict["firings"][0] for verdict in verdicts if verdict["count"]}
        unjudged = [verdict["rule"] for verdict in verdicts if not verdict["judged"] or verdict["message"]]
        as_wanted = fired.keys() >= set(case.wanted) if case.wanted else not fired and not unjudged
        right = right and as_wanted
        seen = "; ".join(
            f"{rule} (step {firing['step']}, {firing['tensor'] or 'no tensor'}: {firing['value']} against "
            f"{firing['threshold']})"
            for rule, firing in fired.items()
        )  # fmt: skip
        also = ", ".join(f"{rule} {values}" for rule, values in case.parameters.items())
        count = sum(1 for _ in data.rglob("*.jpg"))
        rows.append(
            [
                case.name + (f" ({also})" if also else ""), seed, count, ", ".join(case.wanted) or "none",
                seen or "none",
                "yes" if as_wanted else f"no{': not judged by ' + ', '.join(unjudged) if unjudged else ''}", state,
                f"{time.monotonic() - started_s:.0f}",
            ]
        )  # fmt: skip
        log.info("seed %d, %s: wanted %s; fired %s; %s", seed, case.name, rows[-1][3], rows[-1][4], state)
    return rows, right


def run_case(
    case: Case, data: Path, validation: Path, weights: Path, folder: Path, seed: int
) -> tuple[list[dict[str, Any]], str]:
    """Train once. Returns: the entries of `rules.json`, and how the run ended."""
    config = TrainingConfig.create(
        {
            **HEALTHY, **(SICK if case.wanted else {}), **case.settings, "data": data, "validation": validation,
            "weights": str(weights), "output": folder, "run_folder": folder, "cache_folder": folder.parent / "features",
            "seed": seed,
        }
    )  # fmt: skip
    rules = create_rules([{"rule": name, "parameters": case.parameters.get(name, {})} for name in RULES])
    folder.mkdir()
    try:
        # The disease first: the observer's clock must run while a step hangs.
        history = fit(config, prepare(config), [Observer(OBSERVE_EVERY, rules), Disease(case)]).history
        last = history[-1]
        state = (
            f"after {last.epoch} epochs: loss {last.train_loss:.3f} training, {last.validation_loss:.3f} validation; "
            f"accuracy {100 * last.validation_accuracy:.1f} %"
        )
    except DivergedError as exc:
        state = f"diverged: {exc}"
    entries: list[dict[str, Any]] = json.loads((folder / FILE).read_text())["rules"]
    return entries, state


def write(rows: list[list[object]], images: int) -> None:
    """The table."""
    save(
        "rules", "Debugging rules on real pictures: a healthy run, and one with each disease",
        ["run", "seed", "trained on", "must fire", "fired (first of each rule)", "as wanted", "state", "seconds"],
        rows,
        [
            f"CIFAR-10 training images as JPEG, 32 px, {images} of each of 5 classes to train on unless the name says "
            f"otherwise, {images} others of each to validate on (n = {5 * images}); a seed draws images and weights.",
            "Stem and blocks 1 to 3 frozen, all pretrained here on the other 5 classes, from torchvision's initial "
            "values; settings of the healthy run: "
            + ", ".join(f"{name} {value}" for name, value in {**HEALTHY, **CASES[0].settings}.items())
            + "; the sick ones have no augmentation, a constant learning rate, and epochs as their state tells.",
            f"All twelve rules watch every run with their defaults, which are AWS's; observed every {OBSERVE_EVERY} "
            "steps. The healthy run must be judged by every rule and found ill by none.",
            f"torch threads {torch.get_num_threads()}, load {os.getloadavg()[0]:.1f} at the end.",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
