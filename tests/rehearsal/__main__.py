"""`make rehearse`: the journey to SageMaker without an account. Exit status 0 when every step passed.

Runs the product's image where a container engine answers and the image is there (--train-image, --serve-image), else
the same code as processes, which take four to six minutes on 2 idle cores. The report lies in
artifacts/rehearsal/report.md, and beside it transcript.md: each command as it is typed, and what it wrote.
"""

import argparse
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

log = logging.getLogger("rehearsal")


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=__doc__)
    parser.add_argument("--train-image", default="resnet34-sagemaker:train", help="default: %(default)s")
    parser.add_argument("--serve-image", default="resnet34-sagemaker:serve-cpu", help="default: %(default)s")
    parser.add_argument("--processes", action="store_true", help="no containers, even where there is an engine")
    parser.add_argument(
        "--report", type=Path, default=Path("artifacts/rehearsal/report.md"), help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    from tests.rehearsal import pictures, report  # torch and moto: seconds, and not for --help
    from tests.rehearsal.journey import Journey
    from tests.rehearsal.start import rehearsal

    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    flags, engine = _engine(options)
    log.info("jobs and endpoints run as %s", engine)
    with TemporaryDirectory(prefix="journey-") as scratch, rehearsal(*flags) as cloud:
        data, asked = pictures.write(Path(scratch))
        images = (options.train_image, options.serve_image) if flags else None
        journey = Journey(cloud, Path(scratch), data, asked, images)
        steps = journey.walk()
        report.write(options.report, steps, engine, cloud.ask("/rehearsal/answers"))
        if any(step.result == "FAIL" for step in steps):
            log.info("the cloud's log ends with:\n%s", "".join(cloud.log.read_text().splitlines(True)[-40:]))
    log.info(
        "the journey:\n%s\nreport: %s\neach command and what it wrote: %s",
        report.text(steps), options.report, options.report.with_name(report.TRANSCRIPT),
    )  # fmt: skip
    return 1 if any(step.result == "FAIL" for step in steps) else 0


def _engine(options: argparse.Namespace) -> tuple[list[str], str]:
    if options.processes:
        return [], "processes of this checkout, as asked"
    from tests.rehearsal.containers import has_docker

    if not has_docker():
        return [], "processes of this checkout (no container engine answers)"
    images = (options.train_image, options.serve_image)
    missing = [image for image in images if not _has_image(image)]
    if missing:
        return [], f"processes of this checkout (no image {', '.join(missing)}; make image builds them)"
    return ["--train-image", images[0], "--serve-image", images[1]], f"containers of {' and '.join(images)}"


def _has_image(name: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
