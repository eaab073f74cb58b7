"""TorchServe's model file, as in its image_classifier example: one class, whose state_dict is the serialized file."""

import json
from collections import OrderedDict
from pathlib import Path

import torch
from torchvision.models import resnet

FACTS = json.loads((Path(__file__).parent / "facts.json").read_text())


class ImageClassifier(resnet.ResNet):
    def __init__(self):
        super().__init__(resnet.BasicBlock, [3, 4, 6, 3])
        self.fc = torch.nn.Sequential(
            OrderedDict(
                hidden=torch.nn.Linear(512, FACTS["hidden_units"]),
                activation=torch.nn.ReLU(inplace=True),
                classes=torch.nn.Linear(FACTS["hidden_units"], len(FACTS["classes"])),
            )
        )
