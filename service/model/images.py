"""Decode: image bytes -> uint8 `[H, W, 3]`. First stage of the flow, shared by training and serving.

Pillow is the decoder. simplejpeg stands before it for plain JPEGs, which are most: the same library (libjpeg-turbo)
with less around it, whose pixels are Pillow's, bit by bit (tests/model/test_images.py). The limits here and in `jpeg`
hold for both sides: what training accepts, serving accepts, unless it takes too long there (`service.decoding`).

Memory: nowhere more than BYTES_PER_PIXEL for each pixel, most for WebP. Pillow keeps a pixel of RGB in four bytes;
where it takes a second copy to lay an image over white or turn it, the first is given up or the work done in strips.
"""

from io import BytesIO

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import (
    BmpImagePlugin,  # noqa: F401  # these by name, or Pillow loads all it has when it meets the first WebP
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from service.model.errors import ImageTooLarge, UnreadableImage
from service.model.jpeg import Size, plain_size

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""Pillow's names of the formats that are decoded; nothing else is even tried."""

MEDIA_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
}
"""File name endings of those formats, and the types to send such files with."""
# No TIFF: a container of a dozen codecs (LZW, CCITT, JPEG in two ways, ...) in libtiff, which has had one memory error
# after the other, for files that neither cameras nor browsers make; converting one loses nothing. No EPS or PDF, ever:
# they are programs.

MAX_PIXELS = 89_478_485
"""Width x height above which an image is refused before decoding.

It is the size at which Pillow warns of a decompression bomb (`PIL.Image.MAX_IMAGE_PIXELS`, a quarter of
a GiB of RGB); Pillow itself refuses only above twice that.
"""

BYTES_PER_PIXEL = 16
"""Memory that decoding takes for each pixel, at most (lossless WebP: canvas and its copy, frame, result of 4 bytes
each). Others: 8, a progressive JPEG of four colours 12, where it is not scaled while it is decoded."""

STRIP_PIXELS = 2**20
"""As many pixels are laid over white, or brought from 16 bits to 8, at once."""

RgbImage = npt.NDArray[np.uint8]
"""uint8 `[H, W, 3]`, RGB."""


def decode(payload: bytes, enough_px: int | None = None, max_pixels: int | None = None) -> RgbImage:
    """Decode one image, upright (EXIF orientation applied), transparency laid over white.

    Animated images give their first frame; 16-bit grey is scaled to 8 bits. With `enough_px`, a JPEG may come at a
    half, a quarter or an eighth of its size as long as both sides have that many pixels: the decoder then leaves out
    the high frequencies (`PIL.Image.Image.draft`; libjpeg, scale_denom). `max_pixels`: instead of MAX_PIXELS.

    Returns: uint8 `[H, W, 3]`, RGB.
    Raises: UnreadableImage, ImageTooLarge, ImageTooCostly.
    """
    return np.asarray(decode_in_place(payload, enough_px, max_pixels))


def decode_in_place(
    payload: bytes, enough_px: int | None = None, max_pixels: int | None = None
) -> RgbImage | Image.Image:
    """As `decode`, but the pixels stay where the decoder put them: of a large image, that saves a copy or two.

    Returns: uint8 `[H, W, 3]`, or a Pillow image of mode RGB.
    Raises: UnreadableImage, ImageTooLarge, ImageTooCostly.
    """
    if not payload:
        raise UnreadableImage(f"The image is empty (0 bytes); send the bytes of a {allowed_formats()} file.")
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    size = plain_size(payload)
    plain = None if size is None else decode_plain_jpeg(payload, size, enough_px, limit)
    return plain if plain is not None else _decode_any(payload, enough_px, limit)


def decode_plain_jpeg(payload: bytes, size: Size, enough_px: int | None, max_pixels: int) -> RgbImage | None:
    """The JPEG of which `jpeg.plain_size` told `size`; None where it is Pillow's: to be scaled, too large, damaged."""
    if is_scaled(size, enough_px) or not 0 < size.height * size.width <= max_pixels:
        return None
    try:
        image: RgbImage = simplejpeg.decode_jpeg(payload, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:  # damaged, or only unusual
        return None
    return image


def is_scaled(size: Size, enough_px: int | None) -> bool:
    """Whether a JPEG of this size is scaled while it is decoded, which is Pillow's to do."""
    return enough_px is not None and min(size) >= 2 * enough_px


def _decode_any(payload: bytes, enough_px: int | None, max_pixels: int) -> Image.Image:
    """By Pillow, to mode RGB."""
    _require_webp_size(payload, max_pixels)
    try:
        with Image.open(BytesIO(payload), formats=FORMATS) as image:
            _require_size(*image.size, max_pixels)
            if enough_px is not None and image.format == "JPEG":
                image.draft(None, (enough_px, enough_px))  # no mode: it stays
            image.load()
            return _to_rgb(image)
    except (ImageTooLarge, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise _too_large("more than that", max_pixels) from exc
    except UnidentifiedImageError as exc:
        start = payload[:8].hex(" ")
        raise UnreadableImage(
            f"The {len(payload):,} bytes given (starting {start}) are not a {allowed_formats()} image; "
            "convert the image to one of these formats."
        ) from exc
    except Exception as exc:  # Pillow's plugins raise anything on damaged files: all of it is the file's fault
        reason = str(exc).rstrip(".") or type(exc).__name__
        raise UnreadableImage(
            f"The image is damaged or incomplete ({reason}); send the whole file ({len(payload):,} bytes arrived)."
        ) from exc


def allowed_formats() -> str:
    """The allowed formats as part of a sentence: "JPEG, PNG, WEBP, BMP or GIF"."""
    return f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


def _too_large(given: str, allowed: int) -> ImageTooLarge:
    return ImageTooLarge(f"The image may have at most {allowed:,} pixels, given: {given}; send a smaller one.")


def _require_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _too_large(f"{width} x {height} = {width * height:,} pixels", max_pixels)


def _require_webp_size(payload: bytes, max_pixels: int) -> None:
    """Before Pillow opens it, which allocates the whole canvas. Headers: RFC 9649; VP8: RFC 6386, 9.1."""
    if payload[:4] != b"RIFF" or payload[8:12] != b"WEBP" or len(payload) < 30:
        return
    kind = payload[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(payload[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(payload[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(payload[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    _require_size(width, height, max_pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright, over white, of mode RGB. `image` may be closed by it."""
    turn = _UPRIGHT.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    if upright is not image:
        image.close()  # its pixels are given up
    if upright.mode.startswith("I") or upright.has_transparency_data:
        return _in_strips(upright)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _in_strips(image: Image.Image) -> Image.Image:
    """16-bit grey or transparent -> RGB, a few rows at a time: the steps between take several bytes a pixel."""
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    if rows >= height:
        return _opaque(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        whole.paste(_opaque(strip), (0, top))
    return whole


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey ("I;16") or its 32-bit form ("I"): keep the high byte
        deep = np.asarray(image).astype(np.int64)  # [H, W]
        grey = np.clip(deep >> 8, 0, 255).astype(np.uint8)
        grey[deep == image.info.get("transparency", -1)] = 255  # white
        return Image.fromarray(grey).convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes each EXIF orientation upright (EXIF 2.32, tag 0x0112; the same table as in `PIL.ImageOps`)."""


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  # a damaged EXIF block says nothing of the picture, which is whole
        return 1
