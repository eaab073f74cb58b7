"""What schemathesis sends where the OpenAPI document asks for an image: loaded by its SCHEMATHESIS_HOOKS.

CHECKED_IMAGES=valid: images of every format; broken: anything, mostly what was an image once.
"""

import base64
import io
import os

import schemathesis
from hypothesis import strategies as st
from PIL import Image

from service.openapi import RAW_TYPES

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


@st.composite
def valid(draw: st.DrawFn) -> bytes:
    """A whole image, of any format and mode, from 1 x 1 up."""
    size = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    image = Image.new("RGB", size, draw(st.sampled_from(["red", "#123456", "white"])))
    buffer = io.BytesIO()
    image.convert(draw(st.sampled_from(["RGB", "L"]))).save(buffer, draw(st.sampled_from(FORMATS)))
    return buffer.getvalue()


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """An image with bytes changed, cut off or added, or no image at all."""
    content = bytearray(draw(valid()))
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    end = draw(st.integers(0, len(content)))
    return draw(
        st.sampled_from([bytes(content), bytes(content[:end]), bytes(content) + b"\0" * 9, b"", b"{}", b"\xff"])
    )


images = valid() if os.environ["CHECKED_IMAGES"] == "valid" else broken()
for media_type in RAW_TYPES:
    schemathesis.openapi.media_type(media_type, images)
schemathesis.openapi.format("binary", images)
schemathesis.openapi.format("byte", images.map(lambda content: base64.b64encode(content).decode()))
