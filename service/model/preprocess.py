"""Preprocess: uint8 `[H, W, 3]` -> uint8 `[S, S, 3]` (`resize`), and the numbers that normalise it.

Second stage of the flow. Training's evaluation and serving both call `decode_resized`; the network normalises
(`service.model.network`), so what travels between the stages stays small uint8.
"""

from pydantic import BaseModel, ConfigDict, Field

from service.model.resize import PixelBatch, crop_resize, crop_resize_all, decode_resized

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PixelBatch",
    "Preprocessing",
    "crop_resize",
    "crop_resize_all",
    "decode_resized",
]

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
