"""Coverage-guided fuzzing by atheris (libFuzzer) of the two parsers that read clients' bytes.

    python -m tests.hostile.fuzz images|multipart CORPUS [-max_total_time=600] [-runs=100000]

`images`: decode_resized, Pillow's plugins instrumented; `multipart`: the form parser. Anything but a result or the
errors that are documented stops it and is written to the current folder as crash-*; so does an input that takes ten
seconds or two gigabytes. CORPUS is filled with real files first.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "python_multipart", "service"]):
    from service.errors import MalformedRequest
    from service.model.errors import ImageError
    from service.model.resize import decode_resized
    from service.multipart import files_of

from tests.hostile.mutations import seeds

FORM = b'--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nbytes\r\n--b--\r\n'


def images(data: bytes) -> None:
    """Pixels of the right shape, or an image error with a sentence."""
    try:
        assert decode_resized(data, 32, 2**20).shape == (32, 32, 3)
    except ImageError as exc:
        assert str(exc).startswith("The ")


def multipart(data: bytes) -> None:
    """Files, or a sentence. The first line is the header's."""
    head, _, body = data.partition(b"\n")
    try:
        files_of(body, head.decode("latin-1"))
    except MalformedRequest as exc:
        assert str(exc).endswith(".")


def main(target: str, corpus: str, *options: str) -> None:
    """Fuzz until an option or a finding ends it."""
    folder = Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    forms = [b"multipart/form-data; boundary=b\n" + FORM, b'multipart/form-data; boundary="b"\n' + FORM * 2]
    for number, seed in enumerate(seeds() if target == "images" else forms):
        (folder / f"seed-{number}").write_bytes(seed)
    limits = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=16384", "-verbosity=0"]
    atheris.Setup([sys.argv[0], str(folder), *limits, *options], {"images": images, "multipart": multipart}[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
