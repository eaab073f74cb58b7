"""What must be known to rebuild the network. No torch here: engines without torch read it too."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Block = Literal["stem", "layer1", "layer2", "layer3", "layer4"]
BLOCKS: tuple[Block, ...] = get_args(Block)
"""The stem and the four residual blocks, by torchvision's names (residual block 1 is `layer1`)."""


MAX_HIDDEN_UNITS = 65536
"""Bounds what a manifest can make a reader allocate: 128 MiB for this layer."""


class Architecture(BaseModel):
    """ResNet-34 with an additional fully connected layer; travels in the artifact's manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["resnet34"] = "resnet34"
    num_classes: int = Field(ge=2)
    hidden_units: int = Field(ge=1, le=MAX_HIDDEN_UNITS, default=512)
    frozen: tuple[Block, ...] = ("stem", "layer1", "layer2", "layer3")

    @field_validator("frozen")
    @classmethod
    def _in_order(cls, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        return tuple(block for block in BLOCKS if block in blocks)
