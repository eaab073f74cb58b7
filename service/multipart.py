"""Take the files out of a multipart/form-data body that is already in memory."""

import re
from itertools import count

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from service.errors import MalformedRequest

MAX_PARTS = 100
"""Files and fields in one form; a body of 25 MB could otherwise hold hundreds of thousands of them."""

_BEGINNING = re.compile(rb"--([0-9A-Za-z'()+_,\-./:=?]{1,70})\r\nContent-(?:Disposition|Type):", re.IGNORECASE)
"""RFC 2046, 5.1.1: the boundary, then the header of the first part."""


def boundary_of(body: bytes) -> bytes | None:
    """With what a body separates its parts that begins as a form does, without a doubt; None for others."""
    beginning = _BEGINNING.match(body)
    return beginning[1] if beginning else None


def files_of(body: bytes, content_type: str) -> list[bytes]:
    """The contents of the form's files, in order; other fields are ignored.

    `content_type`: names the boundary; where it does not, the body's first line does.
    Raises: MalformedRequest when the body is not the complete form that `content_type` announces.
    """
    files: list[bytes] = []
    parts = count(1)
    ended: list[bool] = []

    def on_part() -> None:
        if next(parts) > MAX_PARTS:
            raise MalformedRequest(f"The form may hold at most {MAX_PARTS} parts; send fewer.")

    def on_field(_: Field) -> None:
        on_part()

    def on_file(file: File) -> None:
        on_part()
        file.file_object.seek(0)
        files.append(file.file_object.read())
        file.close()

    _, options = parse_options_header(content_type)
    try:
        parser = FormParser(
            "multipart/form-data",
            on_field,
            on_file,
            on_end=lambda: ended.append(True),
            boundary=options.get(b"boundary") or boundary_of(body),
            # The body is in memory and bounded: never a temporary file.
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1, "MAX_BODY_SIZE": len(body) + 1},
        )
        parser.write(body)
        parser.finalize()
        if not ended:
            raise MalformedRequest("The multipart/form-data body ends before its closing boundary; send it whole.")
        return files.copy()
    except FormParserError as exc:
        raise MalformedRequest(f"The body is not valid multipart/form-data: {exc}.") from exc
    finally:
        files.clear()  # the parser and its callbacks keep each other, and this list, until garbage is looked for
