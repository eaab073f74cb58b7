"""TorchServe's own image classifier (https://pytorch.org/serve/default_handlers.html) at our side."""

import json
from pathlib import Path

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier

FACTS = json.loads((Path(__file__).parent / "facts.json").read_text())


class Handler(ImageClassifier):
    image_processing = transforms.Compose(
        [
            transforms.Resize(FACTS["side"]),
            transforms.CenterCrop(FACTS["side"]),
            transforms.ToTensor(),
            transforms.Normalize(FACTS["mean"], FACTS["std"]),
        ]
    )
