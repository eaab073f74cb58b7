"""The JSON shapes of the answers, for the OpenAPI document."""

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


class ErrorDetail(BaseModel):
    """What went wrong, for programs (`code`) and for people (`message`)."""

    code: str = Field(examples=["unreadable_image"])
    message: str
    request_id: str


class ErrorResponse(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


class PingResponse(BaseModel):
    """The state of the service."""

    status: str = Field(examples=["ready", "loading"])
