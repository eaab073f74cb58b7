"""How large a data set's images are, so that nobody has photographs looked at as stamps without being told."""

from statistics import median

from service.model.jpeg import plain_size
from training.data.dataset import FileImages, LabelledImages

SAMPLED = 64
"""Images looked at, spread evenly: enough to tell photographs from icons."""
FAR = 3.0
"""So many times the side that they are looked at: from there on what they show is lost."""


def median_px(images: LabelledImages) -> int:
    """The median of the shorter sides of some of the images. Raises: DataError."""
    return int(median(_shorter_px(images, index) for index in range(0, len(images), -(-len(images) // SAMPLED))))


def hint(images: LabelledImages, side_px: int) -> str | None:
    """What to say where the images are far larger than what the training looks at; else None. Raises: DataError."""
    found_px = median_px(images)
    if found_px <= FAR * side_px:
        return None
    return (
        f"the pictures are about {found_px} px, and the training looks at them at {side_px} px: --side 224 suits "
        "photographs"
    )


def _shorter_px(images: LabelledImages, index: int) -> int:
    size = plain_size(images.payload(index)) if isinstance(images, FileImages) else None  # of its header alone
    return min(size or images.image(index).shape[:2])
