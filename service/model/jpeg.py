"""What a JPEG's header says of its cost, read without decoding: microseconds, whatever the file.

Stands before the decoders: `images` refuses by it what would take minutes, `service.decoding` keeps by it what is
cheap for certain in the service's own process. Markers are those of ITU-T T.81, table B.1.
"""

from typing import NamedTuple

from service.model.errors import ImageTooCostly

JPEG = b"\xff\xd8\xff"
"""How a JPEG begins."""

TURNING = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
"""Begin the blocks (APP1) that may say how a JPEG is to be turned: Exif and XMP."""

MAX_SCANS = 100
"""Encoders write 1 to 12. A decoder goes over the whole picture for each, so that 0.8 MB can take minutes; for such
files libjpeg-turbo's djpeg has its switch `-maxscans` (its manual page)."""

MAX_SEGMENTS = 2_000
"""Before the first scan: a file of 25 MB whose Exif, XMP and colour profile fill their 64 KB segments has 400."""

_SOF0, _SOF1, _DAC, _EOI, _SOS, _APP0, _APP1, _APP14 = 0xC0, 0xC1, 0xCC, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, _DAC}


class Size(NamedTuple):
    """What a frame header states, in pixels."""

    height: int
    width: int


def plain_size(payload: bytes) -> Size | None:
    """The size of a plain JPEG: one baseline scan of YCbCr or grey, 8 bits deep, nothing in it that may turn it.

    None for everything else. Such a scan is gone over once, whatever comes after it (libjpeg, jdapimin.c: a second one
    is an error), so that its pixels and bytes bound the time it takes. Whether it is whole is not looked at.
    Raises: ImageTooCostly when there are more scans or segments than are decoded.
    """
    if payload[:3] != JPEG:
        return None
    size: Size | None = None
    plain, jfif, adobe, colours = True, False, False, b""
    at = 2
    try:
        for _ in range(MAX_SEGMENTS):
            marker, length = payload[at + 1], payload[at + 2] << 8 | payload[at + 3]
            if payload[at] != 0xFF or marker < _SOF0 or length < 2:
                return None  # rubbish between segments: Pillow's to skip
            if marker == _SOS:
                break
            if marker in _FRAMES:
                plain = plain and marker in (_SOF0, _SOF1) and payload[at + 4] == 8 and size is None
                size = Size(payload[at + 5] << 8 | payload[at + 6], payload[at + 7] << 8 | payload[at + 8])
                colours = payload[at + 10 : at + 2 + length : 3]
            elif marker == _APP0:
                jfif = jfif or (length >= 16 and payload.startswith(b"JFIF\0", at + 4))
            elif marker == _APP1:
                plain = plain and not payload.startswith(TURNING, at + 4)
            elif marker == _APP14:
                adobe = True
            elif marker == _DAC:
                plain = False
            at += 2 + length
        else:
            raise ImageTooCostly(
                f"The JPEG has more than {MAX_SEGMENTS:,} segments before its picture; save it anew without metadata."
            )
        together = payload[at + 4] == len(colours)
    except IndexError:  # ends within its header
        return None
    # What three colours are is libjpeg's rule (jdapimin.c, default_decompress_parms), where it leaves no doubt.
    known = len(colours) == 1 or (len(colours) == 3 and (jfif or (not adobe and colours == b"\1\2\3")))
    if plain and together and known:
        return size
    _require_few_scans(payload, at)
    return None


def _require_few_scans(payload: bytes, first: int) -> None:
    """Count from the `first` scan on. Within one, 0xFF is followed by 0 or a restart: what is found are markers."""
    end = payload.find(bytes([0xFF, _EOI]), first)
    scans = payload.count(bytes([0xFF, _SOS]), first, len(payload) if end < 0 else end)
    if scans > MAX_SCANS:
        raise ImageTooCostly(
            f"The JPEG may have at most {MAX_SCANS} scans, given: {scans:,}; save it anew as a baseline JPEG."
        )
