"""Small pictures inside the page: an image as the network sees it, as a data URI."""

import base64
import logging
from io import BytesIO

from PIL import Image

from service.model.resize import crop_resize
from training.data.dataset import LabelledImages
from training.errors import DataError

log = logging.getLogger(__name__)

SIDE_PX = 96
"""Largest side; smaller images keep theirs and the page enlarges them."""
PNG_UP_TO_PX = 40
"""Up to this side a PNG, which keeps every pixel, is as small as a JPEG."""


def thumbnail(images: LabelledImages, index: int) -> str | None:
    """The centre square of image `index` as a `data:` URI; None where the image can no longer be read."""
    try:
        image = images.image(index)
    except DataError as exc:
        log.warning("no picture in the report: %s", exc)
        return None
    side = min(SIDE_PX, *image.shape[:2])
    picture = Image.fromarray(crop_resize(image, side))
    kind = "png" if side <= PNG_UP_TO_PX else "jpeg"
    buffer = BytesIO()
    if kind == "png":
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
