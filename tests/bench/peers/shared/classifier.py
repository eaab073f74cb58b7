"""What every peer's server calls: the same two models, written as a user of the peer's documentation would.

Runs in the peers' environments, so it imports nothing of ours. `TorchClassifier` is torchvision's resnet34 in float32
with torchvision's transforms, on the GPU where torch finds one; `OpenVinoClassifier` the int8 file that our service's
engine has, too, with Pillow.
"""

import io
import json
import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MODEL_DIR = Path(os.environ.get("BENCH_MODEL_DIR", "."))
WHICH = os.environ.get("BENCH_MODEL", "torch")
PORT = int(os.environ.get("BENCH_PORT", "8080"))
THREADS = int(os.environ.get("BENCH_THREADS", "1"))
"""Of one worker."""
WORKERS = int(os.environ.get("BENCH_WORKERS", "1"))


class TorchClassifier:
    """Eager PyTorch: JPEG bytes -> float32 `[3, S, S]` -> batches -> the five likeliest classes of each."""

    def __init__(self, folder=MODEL_DIR, threads=THREADS):
        import torch
        from torchvision import models, transforms

        torch.set_num_threads(threads)
        facts = json.loads((folder / "facts.json").read_text())
        self.torch, self.classes = torch, facts["classes"]
        self.model = models.resnet34(weights=None)
        self.model.fc = torch.nn.Sequential(
            OrderedDict(
                hidden=torch.nn.Linear(512, facts["hidden_units"]),
                activation=torch.nn.ReLU(inplace=True),
                classes=torch.nn.Linear(facts["hidden_units"], len(self.classes)),
            )
        )
        self.model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.eval().to(self.device)
        self.transform = transforms.Compose(
            [
                transforms.Resize(facts["side"]),
                transforms.CenterCrop(facts["side"]),
                transforms.ToTensor(),
                transforms.Normalize(facts["mean"], facts["std"]),
            ]
        )

    def decode(self, payload):
        return self.prepare(Image.open(io.BytesIO(payload)))

    def prepare(self, image):
        return self.transform(image.convert("RGB"))

    def predict(self, inputs):
        with self.torch.inference_mode():
            probs = self.model(self.torch.stack(list(inputs)).to(self.device)).softmax(dim=1)
            top = probs.topk(5)
        return [
            [{"label": self.classes[i], "probability": p} for i, p in zip(indices, values, strict=True)]
            for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]


class OpenVinoClassifier:
    """OpenVINO int8: JPEG bytes -> uint8 `[S, S, 3]` -> batches -> the five likeliest classes of each."""

    def __init__(self, folder=MODEL_DIR, threads=THREADS):
        import openvino

        facts = json.loads((folder / "facts.json").read_text())
        self.classes, self.side = facts["classes"], facts["side"]
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self.compiled = openvino.Core().compile_model(folder / "int8.xml", "CPU", hints)
        self.local = threading.local()  # an infer request serves one thread at a time, and some servers have many

    def decode(self, payload):
        return self.prepare(Image.open(io.BytesIO(payload)))

    def prepare(self, image):
        return np.asarray(ImageOps.fit(image.convert("RGB"), (self.side, self.side), Image.Resampling.BILINEAR))

    def predict(self, inputs):
        if not hasattr(self.local, "request"):
            self.local.request = self.compiled.create_infer_request()
        logits = self.local.request.infer(np.stack(list(inputs)))[0]
        exps = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs = exps / exps.sum(axis=1, keepdims=True)
        top = np.argsort(-probs, axis=1)[:, :5]
        return [
            [{"label": self.classes[i], "probability": float(row[i])} for i in indices]
            for row, indices in zip(probs, top, strict=True)
        ]


def load(folder=MODEL_DIR, which=WHICH, threads=THREADS):
    """The model that the bench names."""
    return (TorchClassifier if which == "torch" else OpenVinoClassifier)(folder, threads)
