"""What can be wrong with an image or with an artifact.

    ModelError
    ├── ImageError           the bytes are the sender's to mend
    │   ├── UnreadableImage  not an image of an allowed format, or a damaged one
    │   ├── ImageTooLarge    more pixels than MAX_PIXELS
    │   └── ImageTooCostly   few pixels or bytes may be, but more time or memory to decode than an image gets
    └── ArtifactError        the model cannot be trusted or read: the service does not start
        └── ArtifactDamaged  a file holds something else than its sha256 says

Every message is one sentence for a person: what was given, what is allowed, what to do.
"""


class ModelError(Exception):
    """Root of the errors of this package."""


class ImageError(ModelError):
    """The image cannot be used."""


class UnreadableImage(ImageError):
    """The bytes are no complete image of an allowed format."""


class ImageTooLarge(ImageError):
    """The image has more pixels than are decoded."""


class ImageTooCostly(ImageError):
    """Decoding the image takes more time or memory than one image is given."""


class ArtifactError(ModelError):
    """The artifact is missing, incomplete, damaged or of another format version."""


class ArtifactDamaged(ArtifactError):
    """A file of the artifact is not what the manifest says: no engine may run what is left of it."""
