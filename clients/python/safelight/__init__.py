"""Safelight: image and video diffusion models, served as gRPC stages.

>>> import safelight
>>> with safelight.Client("localhost:7000") as client:
...     client.generate("a cat").images[0].image.save("cat.png")
"""

from safelight.client import AsyncClient
from safelight.embedded import EmbeddedStack
from safelight.errors import (
    CheckpointError,
    DeadlineExceededError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    LeaseExpiredError,
    NonFiniteError,
    OutOfMemoryError,
    OverloadedError,
    SafelightError,
    StageUnavailableError,
    TensorCorruptError,
    UnknownModelError,
    UnsupportedError,
)
from safelight.pipelines import SDImagePipeline, SDPipelineConfig
from safelight.sync import Client
from safelight.types import (
    Accepted,
    Event,
    GeneratedImage,
    GenerationOptions,
    GenerationResult,
    Model,
    Progress,
    Queued,
    StageSeconds,
)

__all__ = [
    "Accepted",
    "AsyncClient",
    "CheckpointError",
    "Client",
    "DeadlineExceededError",
    "EmbeddedStack",
    "Event",
    "FieldViolation",
    "GeneratedImage",
    "GenerationOptions",
    "GenerationResult",
    "InternalError",
    "InvalidRequestError",
    "LeaseExpiredError",
    "Model",
    "NonFiniteError",
    "OutOfMemoryError",
    "OverloadedError",
    "Progress",
    "Queued",
    "SDImagePipeline",
    "SDPipelineConfig",
    "SafelightError",
    "StageSeconds",
    "StageUnavailableError",
    "TensorCorruptError",
    "UnknownModelError",
    "UnsupportedError",
]
