"""Decode: image bytes -> uint8 `[H, W, 3]`. First stage of the flow, shared by training and serving.

Pillow is the decoder. simplejpeg stands before it for plain JPEGs, which are most: the same library (libjpeg-turbo)
with less around it, whose pixels are Pillow's, bit by bit (tests/model/test_images.py). The limits below hold for both
sides: what training accepts, serving accepts.
"""

from io import BytesIO

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from service.model.errors import ImageTooLarge, UnreadableImage

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

MAX_PIXELS = 89_478_485
"""Width x height above which an image is refused before decoding.

It is the size at which Pillow warns of a decompression bomb (`PIL.Image.MAX_IMAGE_PIXELS`, a quarter of
a GiB of RGB); Pillow itself refuses only above twice that.
"""

JPEG = b"\xff\xd8\xff"
"""How a JPEG begins."""

TURNING = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
"""Begin the blocks that may say how a JPEG is to be turned: Exif and XMP."""

RgbImage = npt.NDArray[np.uint8]
"""uint8 `[H, W, 3]`, RGB."""


def decode(payload: bytes, enough_px: int | None = None, max_pixels: int | None = None) -> RgbImage:
    """Decode one image, upright (EXIF orientation applied), transparency laid over white.

    Animated images give their first frame; 16-bit grey is scaled to 8 bits. With `enough_px`, a JPEG may come at a
    half, a quarter or an eighth of its size as long as both sides have that many pixels: the decoder then leaves out
    the high frequencies (`PIL.Image.Image.draft`; libjpeg, scale_denom). `max_pixels`: instead of MAX_PIXELS.

    Returns: uint8 `[H, W, 3]`, RGB.
    Raises: UnreadableImage, ImageTooLarge.
    """
    if not payload:
        raise UnreadableImage(f"The image is empty (0 bytes); send the bytes of a {allowed_formats()} file.")
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    plain = _decode_plain_jpeg(payload, enough_px, limit)
    return plain if plain is not None else _decode_any(payload, enough_px, limit)


def _decode_plain_jpeg(payload: bytes, enough_px: int | None, max_pixels: int) -> RgbImage | None:
    """The image, or None where it is for Pillow to say: anything but an upright, whole, unscaled YCbCr or grey JPEG."""
    if payload[:3] != JPEG or any(block in payload for block in TURNING):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(payload)
        scaled = enough_px is not None and min(height, width) >= 2 * enough_px
        if colorspace not in ("YCbCr", "Gray") or height * width > max_pixels or scaled:
            return None
        image: RgbImage = simplejpeg.decode_jpeg(payload, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:  # damaged, or only unusual
        return None
    return image


def _decode_any(payload: bytes, enough_px: int | None, max_pixels: int) -> RgbImage:
    try:
        with Image.open(BytesIO(payload), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _too_large(f"{width} x {height} = {width * height:,} pixels", max_pixels)
            if enough_px is not None and image.format == "JPEG":
                image.draft(None, (enough_px, enough_px))  # no mode: it stays
            image.load()
            return np.asarray(_to_rgb(image))
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


def _to_rgb(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode.startswith("I"):  # 16-bit grey ("I;16") or its 32-bit form ("I"): keep the high byte
        deep = np.asarray(upright).astype(np.int64)  # [H, W]
        grey = np.clip(deep >> 8, 0, 255).astype(np.uint8)
        grey[deep == upright.info.get("transparency", -1)] = 255  # white
        upright = Image.fromarray(grey)
    elif upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


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
