"""What can stop a training run; every message is one sentence that says what to do.

TrainingError
├── ConfigError      a hyperparameter is unknown or not allowed
├── DataError        no data there, damaged data, a class without images
├── WeightsError     pretrained weights cannot be had or do not fit
├── DivergedError    the loss is no longer a number
├── PeerError        another process that trains along is gone
├── CheckpointError  a checkpoint cannot be written, read, or is of another run
├── ExportError      the artifact, or the result of a tuning, cannot be written
└── QuantizationError    no int8 network can be made; the float32 one is there
"""


class TrainingError(Exception):
    """Root of the errors that end a run with a sentence instead of a trace."""


class ConfigError(TrainingError):
    """A hyperparameter is unknown or its value is not allowed."""


class DataError(TrainingError):
    """The images cannot be used."""


class WeightsError(TrainingError):
    """The pretrained weights cannot be used."""


class DivergedError(TrainingError):
    """The loss is not finite."""


class PeerError(TrainingError):
    """The processes that train together have lost one of them, or never came together."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, read, or belongs to another run."""


class QuantizationError(TrainingError):
    """The int8 network cannot be made; the artifact holds the float32 network all the same."""


class ExportError(TrainingError):
    """The artifact, or the result of a tuning, cannot be written: disk full, no permission."""
