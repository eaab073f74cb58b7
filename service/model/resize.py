"""Resize: uint8 `[H, W, 3]` -> uint8 `[S, S, 3]`. Second stage of the flow, shared by training and serving.

Apart from `preprocess`, which gives these on, so that a decoder process starts without pydantic: in half the time.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.model.images import RgbImage, decode_in_place

PixelBatch = npt.NDArray[np.uint8]
"""uint8 `[N, S, S, 3]`."""


def decode_resized(payload: bytes, side_px: int, max_pixels: int | None = None) -> RgbImage:
    """Image bytes -> uint8 `[side_px, side_px, 3]`: what training and the service both feed the network.

    The same as `crop_resize(decode(payload), side_px)` but for JPEGs of at least four times `side_px`, of which no
    more is decoded than twice the pixels wanted (Pillow's own choice in `thumbnail`, its `reducing_gap`).
    Raises: UnreadableImage, ImageTooLarge, ImageTooCostly.
    """
    return crop_resize(decode_in_place(payload, enough_px(side_px), max_pixels), side_px)


def enough_px(side_px: int) -> int:
    """How many pixels a side of a JPEG must keep that is scaled while it is decoded."""
    return 2 * side_px


def crop_resize(image: RgbImage | Image.Image, side_px: int) -> RgbImage:
    """Cut the centre square out of `image` and resize it to `[side_px, side_px, 3]` (bilinear, antialiased).

    Idempotent: an image of that size comes back unchanged. A Pillow image must be of mode RGB.
    """
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    if height == width == side_px:
        return np.asarray(image)
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return np.asarray(picture.resize((side_px, side_px), Image.Resampling.BILINEAR, box=box))


def crop_resize_all(images: Sequence[RgbImage], side_px: int) -> PixelBatch:
    """Crop and resize each image and stack them: uint8 `[N, S, S, 3]`."""
    return np.stack([crop_resize(image, side_px) for image in images])
