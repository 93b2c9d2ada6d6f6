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
    DeadlineUnreachableError,
    DownloadError,
    FieldViolation,
    FingerprintMismatchError,
    InternalError,
    InvalidRequestError,
    LeaseExpiredError,
    ModelRestartingError,
    NonFiniteError,
    OutOfMemoryError,
    OverloadedError,
    RequestCancelledError,
    SafelightError,
    StageDrainingError,
    StageUnavailableError,
    TensorCorruptError,
    UnknownAdapterError,
    UnknownModelError,
    UnsupportedError,
)
from safelight.hub import fetch_model
from safelight.options import GenerationOptions
from safelight.pipelines import (
    FluxImagePipeline,
    FluxPipelineConfig,
    LoraConfig,
    SDImagePipeline,
    SDPipelineConfig,
    SDXLImagePipeline,
    SDXLPipelineConfig,
    WanPipelineConfig,
    WanVideoPipeline,
)
from safelight.receipt import Receipt, StageSeconds
from safelight.retry import RetryPolicy
from safelight.sync import Client
from safelight.types import (
    Accepted,
    Adapter,
    AdapterReport,
    Event,
    GeneratedImage,
    GenerationResult,
    Model,
    Preview,
    Progress,
    Queued,
)
from safelight.video import VideoReader, load_video, save_video

__all__ = [
    "Accepted",
    "Adapter",
    "AdapterReport",
    "AsyncClient",
    "CheckpointError",
    "Client",
    "DeadlineExceededError",
    "DeadlineUnreachableError",
    "DownloadError",
    "EmbeddedStack",
    "Event",
    "FieldViolation",
    "FingerprintMismatchError",
    "FluxImagePipeline",
    "FluxPipelineConfig",
    "GeneratedImage",
    "GenerationOptions",
    "GenerationResult",
    "InternalError",
    "InvalidRequestError",
    "LeaseExpiredError",
    "LoraConfig",
    "Model",
    "ModelRestartingError",
    "NonFiniteError",
    "OutOfMemoryError",
    "OverloadedError",
    "Preview",
    "Progress",
    "Queued",
    "Receipt",
    "RequestCancelledError",
    "RetryPolicy",
    "SDImagePipeline",
    "SDPipelineConfig",
    "SDXLImagePipeline",
    "SDXLPipelineConfig",
    "SafelightError",
    "StageDrainingError",
    "StageSeconds",
    "StageUnavailableError",
    "TensorCorruptError",
    "UnknownAdapterError",
    "UnknownModelError",
    "UnsupportedError",
    "VideoReader",
    "WanPipelineConfig",
    "WanVideoPipeline",
    "fetch_model",
    "load_video",
    "save_video",
]
