"""What users give and get: plain frozen dataclasses, no protobuf."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What to make; everything but the prompt has a default, which is the model's own where it says None.

    Args:
        prompt: what the picture shall show.
        negative_prompt: what it shall not show.
        model: name of the model; None if the gateway serves just one.
        width: pixels; a multiple of the model's scale factor (8).
        height: pixels.
        steps: denoising steps.
        sampler: "euler", "euler_ancestral", "ddim" or "dpmpp_2m".
        sampler_parameters: e.g. {"eta": 0.5}.
        schedule: "scaled_linear", "karras" or "exponential".
        schedule_parameters: e.g. {"rho": 7.0}.
        guidance_scale: of classifier-free guidance; at or below 1 the negative prompt is not used.
        clip_skip: CLIP layer to take, counted from the end; 1 is the last.
        seed: of the first picture; the others count up from it. None draws one, told in the result.
        num_images: how many pictures.
        format: "png", "jpeg", "webp" or "latents" (a safetensors file).
        quality: 1 to 100 for JPEG and WebP.
        metadata: embed the parameters in the file.
        tenant: whose share of the device the work counts against.
        priority: higher runs first; -100 to 100.
    """

    prompt: str
    negative_prompt: str = ""
    model: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    sampler: str | None = None
    sampler_parameters: Mapping[str, float] = field(default_factory=dict)
    schedule: str | None = None
    schedule_parameters: Mapping[str, float] = field(default_factory=dict)
    guidance_scale: float | None = None
    clip_skip: int | None = None
    seed: int | None = None
    num_images: int = 1
    format: str = "png"
    quality: int | None = None
    metadata: bool = True
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True)
class Accepted:
    """The request is valid and admitted; `seeds` are those of its pictures."""

    request_id: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Queued:
    """A picture waits for a stage; `position` requests were there before it."""

    image_index: int
    stage: str
    position: int


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` of a stage ("encoder", "denoiser", "decoder") are done for a picture."""

    image_index: int
    stage: str
    step: int
    steps: int


@dataclass(frozen=True)
class StageSeconds:
    """What one stage spent on a picture, and which replica it was."""

    stage: str
    replica: str
    queue_seconds: float
    compute_seconds: float


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A finished picture.

    Args:
        data: the file.
        media_type: of the file, e.g. "image/png".
        seed: of its noise.
        model: that made it.
        width: pixels.
        height: pixels.
        steps: denoising steps computed.
        stages: what each stage spent.
        token_count: tokens of the prompt, start and end included.
        truncated_prompt: the end of the prompt that did not fit the model's context and was left out.
        truncated_negative_prompt: the same of the negative prompt.
        fingerprints: of the weights, by stage.
    """

    data: bytes
    media_type: str
    seed: int
    model: str
    width: int
    height: int
    steps: int
    stages: tuple[StageSeconds, ...]
    token_count: int
    truncated_prompt: str
    truncated_negative_prompt: str
    fingerprints: Mapping[str, str]

    @property
    def image(self) -> Image.Image:
        """The picture, decoded by Pillow."""
        picture = Image.open(io.BytesIO(self.data))
        picture.load()
        return picture


@dataclass(frozen=True)
class GenerationResult:
    """Everything a request made; the last event of its stream."""

    request_id: str
    images: tuple[GeneratedImage, ...]


Event = Accepted | Queued | Progress | GenerationResult


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that a gateway serves.

    Args:
        name: what requests call it.
        family: e.g. "sd15".
        width: default pixels.
        height: default pixels.
        size_multiple: width and height must be multiples of it.
        steps: default number of steps.
        guidance_scale: default.
        samplers: the first is the default.
        schedules: the first is the default.
        max_tokens: of a prompt; the rest is cut and reported.
        fingerprints: of the weights, by stage.
    """

    name: str
    family: str
    width: int
    height: int
    size_multiple: int
    steps: int
    guidance_scale: float
    samplers: tuple[str, ...]
    schedules: tuple[str, ...]
    max_tokens: int
    fingerprints: Mapping[str, str]
