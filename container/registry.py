"""What lies in a registry under a tag: asked over the registry's own protocol, which ECR speaks like every other.

https://distribution.github.io/distribution/spec/api/, with the user and password that docker logs in with.
"""

import base64
import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass

from container.engine import ContainerError

SCHEMA_2 = "application/vnd.docker.distribution.manifest.v2+json"
"""The media type that SageMaker's CreateModel takes."""
OTHERS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
TIMEOUT_S = 60


@dataclass(frozen=True)
class Pushed:
    """What is there."""

    digest: str
    media_type: str
    platform: str | None
    """Such as linux/amd64; None for an index of several images."""
    compressed_bytes: int
    """Of the layers, as they are sent."""

    def problem(self, platform: str = "linux/amd64") -> str | None:
        """Why SageMaker would refuse it, as a sentence; None when it would not."""
        if self.media_type != SCHEMA_2:
            return (
                f"The pushed manifest is {self.media_type}, and SageMaker takes {SCHEMA_2} alone: build with 'make "
                "image', which turns attestations and OCI media types off, and push again."
            )
        if self.platform != platform:
            return f"The pushed image is for {self.platform}, SageMaker's are {platform}: build with 'make image'."
        return None


def look(registry: str, repository: str, reference: str, user: str, password: str) -> Pushed | None:
    """What `reference`, a tag or digest, names; None where nothing has that name. Raises: ContainerError."""
    base = f"https://{registry}/v2/{repository}"
    secret = base64.b64encode(f"{user}:{password}".encode()).decode()
    answer = _get(f"{base}/manifests/{reference}", secret, ", ".join((SCHEMA_2, *OTHERS)))
    if answer is None:
        return None
    try:
        body, headers = answer
        manifest = json.loads(body)
        media_type = manifest.get("mediaType") or headers.get("Content-Type", "").partition(";")[0]
        digest = headers.get("Docker-Content-Digest", reference)
        if "config" not in manifest:
            return Pushed(digest, media_type, None, 0)
        config_answer = _get(f"{base}/blobs/{manifest['config']['digest']}", secret, "*/*")
        if config_answer is None:
            raise ContainerError(
                f"{registry} has the manifest of {repository}:{reference} and not what it names; push again."
            )
        config = json.loads(config_answer[0])
        size = sum(layer["size"] for layer in manifest["layers"])
        return Pushed(digest, media_type, f"{config.get('os')}/{config.get('architecture')}", size)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:  # a proxy's page, JSON of another shape
        raise ContainerError(
            f"What {registry} has as {repository}:{reference} cannot be read as an image's manifest "
            f"({type(exc).__name__}: {exc}); what answers there?"
        ) from exc


def _get(url: str, secret: str, accept: str) -> tuple[bytes, dict[str, str]] | None:
    request = urllib.request.Request(url, headers={"Accept": accept})  # noqa: S310  # https, see `look`
    # ECR sends on to S3, which refuses a second kind of authorization.
    request.add_unredirected_header("Authorization", f"Basic {secret}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
            return response.read(), dict(response.headers)
    except urllib.error.HTTPError as exc:
        if exc.code == 404:
            return None
        if exc.code in (401, 403):
            raise ContainerError(
                f"The registry refused {url} ({exc.code}): allow ecr:BatchGetImage and ecr:GetDownloadUrlForLayer."
            ) from exc
        raise ContainerError(f"The registry answered {exc.code} to {url}; try again.") from exc
    except http.client.HTTPException as exc:
        raise ContainerError(f"The registry's answer to {url} broke off ({exc!r}); try again.") from exc
    except OSError as exc:
        raise ContainerError(f"The registry does not answer ({url}: {exc}).") from exc
