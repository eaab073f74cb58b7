"""What the manifest says of preprocessing: the side, and the numbers with which the network normalises.

The second stage of the flow itself is `service.model.resize`. The network normalises (`service.model.network`), so that
what travels between the stages stays small uint8.
"""

from pydantic import BaseModel, ConfigDict, Field

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Per-channel mean of ImageNet in 0..1, as ResNet34_Weights.IMAGENET1K_V1 expects (torchvision, its `transforms`)."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per-channel standard deviation of ImageNet in 0..1, from the same place."""


class Preprocessing(BaseModel):
    """How an image becomes the network's input; travels in the artifact's manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    side_px: int = Field(ge=1, le=1024)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
