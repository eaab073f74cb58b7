"""A data set: labelled images to train on, others to validate on, and the names of the classes.

Every source gives decoded images (uint8 `[H, W, 3]`) and, for trying a served model, the bytes of a file.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.model.errors import ImageError
from service.model.images import RgbImage, decode
from service.model.machine import cores
from service.model.resize import crop_resize, decode_resized
from training.errors import DataError

Labels = npt.NDArray[np.int64]


class LabelledImages(Protocol):
    """N images and their classes."""

    @property
    def labels(self) -> Labels:
        """int64 `[N]`, indices into the data set's classes."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def image(self, index: int) -> RgbImage:
        """The decoded image, uint8 `[H, W, 3]`. Raises: DataError."""
        ...

    def resized(self, index: int, side_px: int) -> RgbImage:
        """The image as the service would feed it to the network, uint8 `[side_px, side_px, 3]`. Raises: DataError."""
        ...

    def payload(self, index: int) -> bytes:
        """The image as the bytes of a file, as a client would send it."""
        ...

    def file_name(self, index: int) -> str:
        """A file name for the payload; its ending tells the format."""
        ...

    def digest(self) -> bytes:
        """sha256 of all images' bytes, in order: other images give another. Raises: DataError."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Train and validation images of the same classes."""

    name: str
    classes: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages
    facts: dict[str, object]
    """What else the manifest should say: where it came from, how it was split."""

    def described(self) -> dict[str, object]:
        """What a manifest says of it, and what tells it from others."""
        return {
            "name": self.name, "train_images": len(self.train), "validation_images": len(self.validation), **self.facts
        }  # fmt: skip


@dataclass(frozen=True)
class ArrayImages:
    """Images held as one array, as CIFAR's files hold them."""

    pixels: npt.NDArray[np.uint8]
    """uint8 `[N, H, W, 3]`."""
    labels: Labels

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> RgbImage:
        """See `LabelledImages.image`."""
        pixels: RgbImage = self.pixels[index]
        return pixels

    def resized(self, index: int, side_px: int) -> RgbImage:
        """See `LabelledImages.resized`."""
        return crop_resize(self.pixels[index], side_px)

    def payload(self, index: int) -> bytes:
        """The image as PNG, which keeps every pixel."""
        buffer = BytesIO()
        Image.fromarray(self.pixels[index]).save(buffer, "PNG")
        return buffer.getvalue()

    def file_name(self, index: int) -> str:
        """See `LabelledImages.file_name`."""
        return f"{index}.png"

    def digest(self) -> bytes:
        """See `LabelledImages.digest`."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.digest()


@dataclass(frozen=True)
class FileImages:
    """Images held as files."""

    paths: tuple[Path, ...]
    labels: Labels

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> RgbImage:
        """See `LabelledImages.image`."""
        try:
            return decode(self.payload(index))
        except ImageError as exc:
            raise DataError(f"{self.paths[index]}: {exc}") from exc

    def resized(self, index: int, side_px: int) -> RgbImage:
        """See `LabelledImages.resized`."""
        try:
            return decode_resized(self.payload(index), side_px)
        except ImageError as exc:
            raise DataError(f"{self.paths[index]}: {exc}") from exc

    def payload(self, index: int) -> bytes:
        """The file as it is. Raises: DataError."""
        try:
            return self.paths[index].read_bytes()
        except OSError as exc:
            raise DataError(f"{self.paths[index]} cannot be read: {exc.strerror}.") from exc

    def file_name(self, index: int) -> str:
        """See `LabelledImages.file_name`."""
        return self.paths[index].name

    def digest(self) -> bytes:
        """See `LabelledImages.digest`."""
        with ThreadPoolExecutor(cores()) as threads:
            each = threads.map(lambda i: hashlib.sha256(self.payload(i)).digest(), range(len(self)))
            return hashlib.sha256(b"".join(each)).digest()
