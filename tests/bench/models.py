"""The models that are served: one network of random but sane weights a side, in every form that a subject takes.

    <folder>/artifact/            our service's
    <folder>/model.pt             state_dict of torchvision's resnet34 with the additional layer
    <folder>/int8.xml, int8.bin   OpenVINO's: uint8 [?, S, S, 3] -> float32 logits [?, K], normalisation inside
    <folder>/float.xml, ...       the same before quantization, for the in-process limits in float32 and bfloat16
    <folder>/facts.json           classes, side, hidden units, mean, std

    python -m tests.bench.models --side 224 --output FOLDER --cache FOLDER

makes them in a process of its own, so that the one that measures stays small.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from service.model.architecture import Architecture
from service.model.artifact import Int8Network, SelfCheck, add_int8, write_artifact
from service.model.images import decode
from service.model.manifest import Quantization
from service.model.network import Network
from service.model.openvino_graph import build, core
from service.model.preprocess import Preprocessing
from service.model.resize import crop_resize_all
from training.quantization import quantized

CLASSES = 100
HIDDEN_UNITS = 512
SEED = 34
FILES = ("float.xml", "int8.xml")


def network(side_px: int, batches: Sequence[np.ndarray]) -> Network:
    """Random weights, batch norms that have seen the pictures: logits spread out as a trained network's."""
    torch.manual_seed(SEED)
    architecture = Architecture(num_classes=CLASSES, hidden_units=HIDDEN_UNITS, frozen=())
    model = Network(architecture, Preprocessing(side_px=side_px))
    for module in model.modules():
        if isinstance(module, BasicBlock):
            nn.init.constant_(module.bn2.weight, 0.05)  # branches count, yet round-off does not grow with depth
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # plain averages over the batches below
    with torch.no_grad():
        for batch in batches:
            model.train()(torch.from_numpy(batch))
        model.eval()
        # Spread over the classes like a trained network's. Not over the pictures: of random features they differ by
        # little, and spreading that little out would spread out what 8 bits round off with it.
        scale = 3 / model(torch.from_numpy(batches[0])).std(1).mean()
        for parameter in model.fc[2].parameters():
            parameter *= scale
    return model


def float_model(model: Network, side_px: int) -> Any:
    """An openvino.Model: uint8 `[?, S, S, 3]` -> float32 logits `[?, K]`, normalisation inside."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return build(model.architecture, Preprocessing(side_px=side_px), weights)


def agreement(folder: Path, pixels: np.ndarray, check: SelfCheck) -> Quantization:
    """How well the two networks agree on the pictures; the labels being random, accuracy says nothing."""
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    exact, int8 = (core().compile_model(folder / name, "CPU", hints) for name in FILES)
    same = float((exact(pixels)[0].argmax(1) == int8(pixels)[0].argmax(1)).mean())
    return Quantization(
        method="as in training, for the benchmark", calibration_images=len(pixels), n=len(pixels), top1_agreement=same,
        accuracy=0, accuracy_float32=0, self_check_difference=check.difference(int8(check.inputs)[0]),
    )  # fmt: skip


def write(folder: Path, side_px: int, payloads: Sequence[bytes]) -> None:
    """Write every form into `folder`."""
    import openvino

    folder.mkdir(parents=True, exist_ok=True)
    pixels = crop_resize_all([decode(payload) for payload in payloads[:128]], side_px)
    batches = [pixels[i : i + 32] for i in range(0, len(pixels), 32) if len(pixels[i : i + 32]) > 1]
    model = network(side_px, batches)
    with torch.inference_mode():
        logits = model(torch.from_numpy(batches[0][:4])).numpy()
    assert np.isfinite(logits).all()
    names = tuple(f"class {number:02d}" for number in range(CLASSES))
    preprocessing = Preprocessing(side_px=side_px)
    facts = {
        "name": "resnet34-bench", "architecture": model.architecture, "classes": names,
        "preprocessing": preprocessing, "example": {"label": names[0], "media_type": "image/jpeg"},
        "hyperparameters": {}, "dataset": {"name": "bench"}, "metrics": {},
        "packages": {"python": platform.python_version(), "torch": metadata.version("torch")},
    }  # fmt: skip
    check = SelfCheck(batches[0][:4], logits)
    weights = {name: tensor.contiguous().numpy() for name, tensor in model.state_dict().items()}
    torch.save(model.state_dict(), folder / "model.pt")
    openvino.save_model(float_model(model, side_px), folder / "float.xml", compress_to_fp16=False)
    openvino.save_model(quantized(float_model(model, side_px), batches)[1], folder / "int8.xml")
    int8 = Int8Network(
        (folder / "int8.xml").read_bytes(),
        (folder / "int8.bin").read_bytes(),
        agreement(folder, pixels, check),
    )
    artifact = write_artifact(folder / "artifact", facts, weights, check, (".jpg", payloads[0]))
    add_int8(artifact, int8, {})
    shared = {
        "classes": names, "side": side_px, "hidden_units": HIDDEN_UNITS,
        "mean": preprocessing.mean, "std": preprocessing.std,
    }  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(shared, indent=1))  # last: its presence says that all is there


def main() -> None:
    from tests.bench.inputs import payloads

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    options = parser.parse_args()
    write(options.output, options.side, payloads(options.side, options.cache)[0])


if __name__ == "__main__":
    main()
