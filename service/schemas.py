"""The JSON shapes of the answers, for the OpenAPI document."""

from typing import Literal

from pydantic import BaseModel, Field


class ModelInfo(BaseModel):
    """The model that answered."""

    name: str = Field(examples=["resnet34"])
    version: str = Field(examples=["3f2a9c41d7e0"], description="First 12 hex digits of the weights' sha256.")


class RankedLabel(BaseModel):
    """One class and its probability."""

    label: str = Field(examples=["apple"])
    index: int = Field(ge=0, examples=[0])
    probability: float = Field(ge=0, le=1, examples=[0.987654])


class PredictionResponse(BaseModel):
    """The answer to one image: the likeliest classes, likeliest first."""

    model: ModelInfo
    predictions: list[RankedLabel]


class ImageError(BaseModel):
    """Why one image among several could not be read; codes as in `ErrorDetail`."""

    code: str = Field(examples=["unreadable_image"])
    message: str


class ImagePredictions(BaseModel):
    """The result of one image among several: the likeliest classes, likeliest first."""

    predictions: list[RankedLabel]


class ImageFailure(BaseModel):
    """The result of one image among several that could not be read."""

    error: ImageError


class SeveralPredictionsResponse(BaseModel):
    """The answer to several images: a result for each, in order."""

    model: ModelInfo
    results: list[ImagePredictions | ImageFailure]


class ExecutionParameters(BaseModel):
    """What SageMaker's batch transform asks for, by its names."""

    MaxConcurrentTransforms: int = Field(ge=1)
    BatchStrategy: Literal["SINGLE_RECORD"] = "SINGLE_RECORD"
    MaxPayloadInMB: int = Field(ge=1)


class ErrorDetail(BaseModel):
    """What went wrong, for programs (`code`) and for people (`message`)."""

    code: str = Field(examples=["unreadable_image"])
    message: str
    request_id: str
    retry_after_s: int | None = Field(None, ge=0, description="With 429 and 503: seconds after which to try again.")


class ErrorResponse(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


class PingResponse(BaseModel):
    """The state of the service."""

    status: str = Field(examples=["ready", "loading"])
    message: str | None = Field(None, description="With 503: the state in a sentence.")
