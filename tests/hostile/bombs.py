"""Files made to hurt a decoder: small to send, and long, large or contradictory to decode. Each is made here, by hand.

None of them is an image that must be shown; what matters is how they are refused.
"""

import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, ImageDraw

HUGE = 65_535


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def picture(width: int = 96, height: int = 64, mode: str = "RGB") -> Image.Image:
    """Something with edges and slopes in it."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 4, height // 4, width // 2, height // 2), fill=(200, 30, 60))
    draw.line((0, height, width, 0), fill=(20, 220, 90), width=3)
    return image.convert(mode)


# JPEG: ITU-T T.81


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def after_soi(jpeg: bytes, inserted: bytes) -> bytes:
    return jpeg[:2] + inserted + jpeg[2:]


def behind_jfif(jpeg: bytes, inserted: bytes) -> bytes:
    """What begins with rubbish must not stand first: it would be no JPEG."""
    end = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:end] + inserted + jpeg[end:]


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan is there `count` times more: a few bytes each, and a walk over the picture."""
    jpeg = encoded(Image.new("L", (side, side), 77), "JPEG", progressive=True)
    last, end = jpeg.rindex(b"\xff\xda"), jpeg.rindex(b"\xff\xd9")
    return jpeg[:end] + jpeg[last:end] * count + b"\xff\xd9"


def jpeg_of_size(height: int, width: int, progressive: bool = False) -> bytes:
    jpeg = bytearray(encoded(picture(), "JPEG", progressive=progressive))
    at = jpeg.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(jpeg)


def jpegs() -> Iterator[tuple[str, bytes]]:
    plain, progressive = encoded(picture(), "JPEG"), encoded(picture(), "JPEG", progressive=True)
    scan = plain.index(b"\xff\xda")
    yield "jpeg of 5,000 scans", many_scans(3000, 5000)
    yield "jpeg of 91 scans of 36 million pixels", many_scans(6000, 85)
    yield "jpeg of 300,000 empty APP1", after_soi(plain, segment(0xE1, b"") * 300_000)
    yield "jpeg of 300,000 Exif", after_soi(plain, segment(0xE1, b"Exif\0\0xx") * 300_000)
    yield "jpeg of 1,900 Exif of 12 KB", after_soi(plain, segment(0xE1, b"Exif\0\0" + bytes(12_000)) * 1_900)
    yield "jpeg of 300,000 ICC profiles", after_soi(plain, segment(0xE2, b"ICC_PROFILE\0\1\1") * 300_000)
    yield "jpeg of 300,000 APP1 behind rubbish", behind_jfif(plain, b"\0" + segment(0xE1, b"") * 300_000)
    yield (
        "jpeg of 25 million pixels, 3 million APP1 behind rubbish",
        behind_jfif(jpeg_of_size(5000, 5000), b"\0" + segment(0xE1, b"") * 3_000_000),
    )
    yield "jpeg of 100,000 comments after its scan", plain[:-2] + segment(0xFE, b"c") * 100_000 + b"\xff\xd9"
    yield "jpeg of 4 million empty APP2 after its scan", plain[:-2] + segment(0xE2, b"") * 4_000_000 + b"\xff\xd9"
    yield "jpeg of 50,000 DHT", plain[:scan] + segment(0xC4, b"\0" + bytes(16)) * 50_000 + plain[scan:]
    yield "jpeg of 50,000 DQT", plain[:scan] + segment(0xDB, b"\0" + bytes(64)) * 50_000 + plain[scan:]
    yield "jpeg of 5,000 SOF", plain[:scan] + plain[plain.index(b"\xff\xc0") :][:19] * 5_000 + plain[scan:]
    yield "jpeg of restart markers", plain[: scan + 14] + b"\xff\xd0\xff\xd3" * 2_000_000 + b"\xff\xd9"
    yield "jpeg of fill bytes", plain[:2] + b"\xff" * 20_000_000 + plain[2:]
    yield "jpeg whose height comes later (DNL)", jpeg_of_size(0, 96)[:-2] + segment(0xDC, b"\0\x40") + b"\xff\xd9"
    yield "jpeg of 65,535 x 65,535", jpeg_of_size(HUGE, HUGE)
    yield "jpeg of 65,500 x 1,300 and no data", jpeg_of_size(HUGE, 1300)
    yield "progressive jpeg of 65,500 x 1,300 and no data", jpeg_of_size(HUGE, 1300, progressive=True)
    yield "jpeg of 1 x 65,500", jpeg_of_size(HUGE, 1)
    yield "arithmetic jpeg header on Huffman data", plain.replace(b"\xff\xc0", b"\xff\xc9", 1)
    yield "lossless jpeg header", plain.replace(b"\xff\xc0", b"\xff\xc3", 1)
    yield "segment of length 0", after_soi(plain, b"\xff\xe1\0\0")
    yield "segment longer than the file", plain[:2] + b"\xff\xe1\xff\xff" + plain[2:]
    yield "nothing but SOI", b"\xff\xd8\xff"
    yield "SOI a million times", b"\xff\xd8" * 1_000_000
    yield (
        "Exif whose directory is itself",
        after_soi(
            plain, segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + b"\x08\0\0\0")
        ),
    )
    entries = b"".join(struct.pack("<HHII", 0x9000 + k, 1, 60_000, 8) for k in range(5000))
    yield (
        "Exif of 5,000 entries of the same 60 KB",
        after_soi(progressive, segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + entries)),
    )
    yield (
        "multi-picture jpeg of absurd offsets",
        after_soi(
            plain, segment(0xE2, b"MPF\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0xB001, 4, 1, 2**31) + bytes(4))
        ),
    )


# PNG: W3C, third edition


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, *chunks: bytes, data: bytes = b"", depth: int = 8, colour: int = 2, lace: int = 0
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, lace)
    end = chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + end


def zeros(count: int) -> bytes:
    """`count` zeros, squeezed a thousandfold."""
    squeezer = zlib.compressobj(9)
    piece = bytes(2**20)
    return (
        b"".join(squeezer.compress(piece[: min(2**20, count - at)]) for at in range(0, count, 2**20)) + squeezer.flush()
    )


def pngs() -> Iterator[tuple[str, bytes]]:
    whole = zeros(8 * (8 * 3 + 1))
    bomb = zeros(2**28)
    yield "png of 8 x 8 with a quarter of a GiB of data", png(8, 8, data=bomb)
    yield "png of 9,000 x 9,000 from 300 KB", png(9000, 9000, data=zeros(9000 * 27001))
    yield "interlaced rgba png of 9,400 x 9,400, all zeros", png(9400, 9400, data=zeros(2**28), colour=6, lace=1)
    yield "16-bit rgba png of 9,400 x 9,400", png(9400, 9400, data=zeros(2**28), colour=6, depth=16)
    yield "png of 2^31 x 2^31", png(2**31 - 1, 2**31 - 1, data=whole)
    yield "png of 4 billion x 1", png(2**32 - 1, 1, data=whole)
    yield "png of 0 x 0", png(0, 0, data=whole)
    yield "png with a bomb as colour profile", png(8, 8, chunk(b"iCCP", b"x\0\0" + bomb), data=whole)
    yield "png with a bomb as zTXt", png(8, 8, chunk(b"zTXt", b"x\0\0" + bomb), data=whole)
    yield "png with a bomb as iTXt", png(8, 8, chunk(b"iTXt", b"x\0\1\0\0\0" + bomb), data=whole)
    million = zeros(2**20 - 10)
    yield (
        "png with 2,000 zTXt of 1 MB",
        png(8, 8, *[chunk(b"zTXt", b"k%d\0\0" % k + million) for k in range(2000)], data=whole),
    )
    yield (
        "png with a bomb after its picture",
        png(8, 8, data=whole)[:-12] + chunk(b"zTXt", b"x\0\0" + bomb) + chunk(b"IEND", b""),
    )
    yield "png with 20 MB of tEXt", png(8, 8, chunk(b"tEXt", b"k\0" + b"t" * 20_000_000), data=whole)
    yield "png with 1.5 million chunks", png(8, 8, chunk(b"abCd", b"") * 1_500_000, data=whole)
    yield "png with 1.5 million empty IDAT", png(8, 8, chunk(b"IDAT", b"") * 1_500_000, data=whole)
    frames = [picture(16, 16).rotate(k % 360) for k in range(500)]
    yield "apng of 500 frames", encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    control = struct.pack(">IIIIIHHBB", 0, 2**31 - 1, 2**31 - 1, 0, 0, 1, 1, 0, 0)
    yield (
        "apng of a frame larger than itself",
        png(8, 8, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), chunk(b"fcTL", control), data=whole),
    )
    yield "png whose chunk is 2 GiB long", png(8, 8, data=whole)[:33] + b"\x7f\xff\xff\xffIDATx"
    yield "png palette without colours", png(8, 8, data=whole, colour=3)
    yield "png Exif of garbage", png(8, 8, chunk(b"eXIf", b"II*\0" + b"\xff" * 5000), data=whole)


# GIF89a


def gif(width: int, height: int, *blocks: bytes) -> bytes:
    return (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + b"".join(blocks) + b";"
    )


def gif_frame(width: int, height: int, codes: bytes, left: int = 0, top: int = 0, bits: int = 2) -> bytes:
    blocks = b"".join(bytes([len(codes[at : at + 255])]) + codes[at : at + 255] for at in range(0, len(codes), 255))
    return b"," + struct.pack("<HHHHB", left, top, width, height, 0) + bytes([bits]) + blocks + b"\0"


def gifs() -> Iterator[tuple[str, bytes]]:
    longest = encoded(Image.new("P", (9000, 9000)), "GIF")
    tiny = gif_frame(1, 1, b"\x44\x01")
    yield "gif of 81 million pixels in runs", longest
    yield "gif of 200,000 frames", gif(1, 1, *[tiny] * 200_000)
    yield "gif of frames without size", gif(0, 0, gif_frame(0, 0, b"\x44\x01"))
    yield "gif of 65,535 x 65,535", gif(HUGE, HUGE, tiny)
    yield "gif of a frame larger than its canvas", gif(1, 1, gif_frame(HUGE, HUGE, b"\x44\x01"))
    yield "gif of a frame outside its canvas", gif(10, 10, gif_frame(10, 10, b"\x44\x01", left=60_000, top=60_000))
    yield "gif of clear codes", gif(1000, 1000, gif_frame(1000, 1000, b"\x24\x49\x92" * 5_000_000))
    yield "gif of codes of 13 bits", gif(10, 10, gif_frame(10, 10, b"\x44\x01", bits=13))
    yield "gif of 5 million extensions", gif(1, 1, b"!\xfe\0" * 5_000_000, tiny)
    yield "gif of a 20 MB comment", gif(1, 1, b"!\xfe" + (b"\xff" + b"c" * 255) * 80_000 + b"\0", tiny)
    yield "gif without an end", gif(10, 10)[:-1] + b"," + bytes(4)


# WebP: RFC 9649


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_canvas(width: int, height: int, flags: int) -> tuple[bytes, bytes]:
    return b"VP8X", struct.pack("<I", flags) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]


def webps() -> Iterator[tuple[str, bytes]]:
    frames = [Image.new("RGB", (16, 16), (k % 256, 0, 0)) for k in range(500)]
    yield (
        "lossless webp of 81 million pixels from 100 bytes",
        encoded(Image.new("RGB", (9000, 9000)), "WEBP", lossless=True, quality=0, method=0),
    )
    yield "animated webp of 500 frames", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], method=0)
    frame = encoded(picture(16, 16), "WEBP")[12:]
    size = struct.pack("<I", 15)[:3] * 2
    animation = bytes(6) + size + bytes(4) + frame
    yield (
        "webp of 16 million x 5 in one small frame",
        riff(webp_canvas(2**24, 5, 2), (b"ANIM", bytes(6)), (b"ANMF", animation)),
    )
    yield "webp of 2^24 x 2^24", riff(webp_canvas(2**24, 2**24, 2), (b"ANIM", bytes(6)), (b"ANMF", animation))
    yield (
        "webp of 9,400 x 9,400 in one small frame",
        riff(webp_canvas(9400, 9400, 2), (b"ANIM", bytes(6)), (b"ANMF", animation)),
    )
    yield "webp of 100,000 frames", riff(webp_canvas(16, 16, 2), (b"ANIM", bytes(6)), *[(b"ANMF", animation)] * 100_000)
    yield "webp of a million unknown chunks", riff(webp_canvas(16, 16, 0), *[(b"abcd", b"")] * 1_000_000)
    yield "lossless webp of 16,384 x 16,384 without data", riff((b"VP8L", b"\x2f" + b"\xff" * 4 + bytes(20)))
    yield (
        "lossless webp of random bits",
        riff((b"VP8L", b"\x2f" + struct.pack("<I", 4000 | 4000 << 14) + random.Random(1).randbytes(2**20))),
    )
    yield "webp shorter than it says", riff((b"VP8 ", b"\0" * 10))[:-4]


# BMP: Windows and OS/2 headers


def bmp(
    width: int, height: int, bits: int, data: bytes = b"", compression: int = 0, colours: int = 0, head: int = 40
) -> bytes:
    if head == 12:
        info = struct.pack("<IHHHH", 12, width & 0xFFFF, height & 0xFFFF, 1, bits)
    else:
        info = struct.pack("<IiiHHIIiiII", head, width, height, 1, bits, compression, 0, 0, 0, colours, 0)
        info += bytes(max(0, head - len(info)))
    palette = bytes(4 * 256) if bits == 8 else b""
    offset = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + palette + data


def bmps() -> Iterator[tuple[str, bytes]]:
    yield "bmp of 2^31 x 2^31", bmp(2**31 - 1, 2**31 - 1, 24)
    yield "bmp of negative width", bmp(-8, 8, 24, bytes(200))
    yield "bmp of the most negative height", bmp(8, -(2**31), 24, bytes(200))
    yield "bmp of 9,000 x 9,000 without data", bmp(9000, 9000, 24)
    yield "bmp of runs", bmp(9000, 9000, 8, b"\xff\x01" * 320_000 + b"\0\1", compression=1)
    yield "bmp of 6 million runs of nothing", bmp(9000, 9000, 8, b"\0\0" * 6_000_000, compression=1)
    yield "bmp of 12 million one-pixel runs", bmp(9000, 9000, 8, b"\1\1" * 12_000_000, compression=1)
    yield "bmp of 6 million moves", bmp(9000, 9000, 8, b"\0\2\0\0" * 6_000_000, compression=1)
    yield "bmp of 6 million moves by 255 x 255", bmp(9000, 9000, 8, b"\0\2\xff\xff" * 6_000_000, compression=1)
    yield "bmp of runs of 4 bits", bmp(9000, 9000, 4, b"\xff\x01" * 320_000, compression=2, colours=16)
    yield "bmp of OS/2, 65,535 x 65,535", bmp(HUGE, HUGE, 24, head=12)
    yield "bmp of 4 billion colours", bmp(8, 8, 8, bytes(64), colours=2**32 - 1)
    yield "bmp of a header of 2 GiB", bmp(8, 8, 24).replace(struct.pack("<I", 40), struct.pack("<I", 2**31 - 1), 1)
    yield "bmp of 17 bits", bmp(8, 8, 17, bytes(200))
    yield "bmp with a jpeg inside", bmp(96, 64, 24, encoded(picture(), "JPEG"), compression=4)
    yield "bmp of odd bit fields", bmp(8, 8, 32, bytes(256), compression=3, head=108)


def others() -> Iterator[tuple[str, bytes]]:
    yield "a program in PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n"
    yield "a pdf", b"%PDF-1.7\n1 0 obj<<>>endobj trailer<<>>"
    yield (
        "a billion laughs as svg",
        b"<?xml version='1.0'?><!DOCTYPE l [<!ENTITY a 'ha'><!ENTITY b '&a;&a;'>]><svg>&b;</svg>",
    )
    yield "24 MB of zeros", bytes(24 * 2**20)
    yield "24 MB of 0xff", b"\xff" * (24 * 2**20)
    yield "noise", random.Random(0).randbytes(2**20)
    yield "a tiff", encoded(picture(), "TIFF")
    yield "nothing", b""


def bombs() -> Iterator[tuple[str, bytes]]:
    """Every file of this module with its name, made when it is asked for; each of at most 25 MB."""
    for family in (jpegs, pngs, gifs, webps, bmps, others):
        yield from family()
