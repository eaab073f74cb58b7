"""Preprocess: uint8 `[H, W, 3]` -> uint8 `[S, S, 3]`, and the numbers that normalise it.

Second stage of the flow. Training's evaluation and serving both call `decode_resized`; the network normalises
(`service.model.network`), so what travels between the stages stays small uint8.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from service.model.images import RgbImage, decode

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Per-channel mean of ImageNet in 0..1, as ResNet34_Weights.IMAGENET1K_V1 expects (torchvision, its `transforms`)."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per-channel standard deviation of ImageNet in 0..1, from the same place."""

PixelBatch = npt.NDArray[np.uint8]
"""uint8 `[N, S, S, 3]`."""


class Preprocessing(BaseModel):
    """How an image becomes the network's input; travels in the artifact's manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    side_px: int = Field(ge=1, le=1024)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def decode_resized(payload: bytes, side_px: int, max_pixels: int | None = None) -> RgbImage:
    """Image bytes -> uint8 `[side_px, side_px, 3]`: what training and the service both feed the network.

    The same as `crop_resize(decode(payload), side_px)` but for JPEGs of at least four times `side_px`, of which no
    more is decoded than twice the pixels wanted (Pillow's own choice in `thumbnail`, its `reducing_gap`).
    Raises: UnreadableImage, ImageTooLarge.
    """
    return crop_resize(decode(payload, 2 * side_px, max_pixels), side_px)


def crop_resize(image: RgbImage, side_px: int) -> RgbImage:
    """Cut the centre square out of `image` and resize it to `[side_px, side_px, 3]` (bilinear, antialiased).

    Idempotent: an image of that size comes back unchanged.
    """
    height, width = image.shape[:2]
    if height == width == side_px:
        return image
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    resized = Image.fromarray(image).resize((side_px, side_px), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def crop_resize_all(images: Sequence[RgbImage], side_px: int) -> PixelBatch:
    """Crop and resize each image and stack them: uint8 `[N, S, S, 3]`."""
    return np.stack([crop_resize(image, side_px) for image in images])
