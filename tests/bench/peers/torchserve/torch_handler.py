"""TorchServe's own image classifier (https://pytorch.org/serve/default_handlers.html) at our side.

Its documented input is an RGB image, and it does not convert: one grey photograph fails its whole batch, with 503. So
that is done here, in the transforms that the handler lets be replaced, as the other peers do it in `classifier`.
"""

import json
from pathlib import Path

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier

FACTS = json.loads((Path(__file__).parent / "facts.json").read_text())


class Handler(ImageClassifier):
    image_processing = transforms.Compose(
        [
            transforms.Lambda(lambda image: image.convert("RGB")),
            transforms.Resize(FACTS["side"]),
            transforms.CenterCrop(FACTS["side"]),
            transforms.ToTensor(),
            transforms.Normalize(FACTS["mean"], FACTS["std"]),
        ]
    )
