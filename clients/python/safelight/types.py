"""What users get: plain frozen dataclasses, no protobuf."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from safelight.errors import InvalidRequestError
from safelight.receipt import Receipt, StageSeconds

_FRAMES_MEDIA_TYPE = "application/zip"


@dataclass(frozen=True)
class Accepted:
    """The request is valid and admitted.

    It comes again, and everything after it anew, when the gateway has lost the request and begins it once more.

    Args:
        request_id: names the request in the logs of every stage.
        seeds: of its pictures.
        estimated_seconds: until the result, as the gateway expects; None: it has no figures yet.
    """

    request_id: str
    seeds: tuple[int, ...]
    estimated_seconds: float | None


@dataclass(frozen=True)
class Queued:
    """A picture waits for a stage; `position` requests were there before it."""

    image_index: int
    stage: str
    position: int


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` of a stage ("encoder", "denoiser", "decoder") are done for a picture; a film's decoder has one
    step for each latent frame."""

    image_index: int
    stage: str
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """A small picture of the work in progress, after `step` denoising steps; `data` is its file."""

    image_index: int
    step: int
    data: bytes
    media_type: str

    @property
    def image(self) -> Image.Image:
        """The picture, decoded by Pillow."""
        return _decoded(self.data)


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A finished picture, or film.

    Args:
        data: the file.
        media_type: of the file, e.g. "image/png".
        seed: of its noise.
        model: that made it.
        width: pixels.
        height: pixels.
        steps: denoising steps computed, on all replicas together.
        steps_recomputed: those among them that were computed twice, because a replica was lost.
        steps_saved: steps that were asked for and left out under load, as `min_steps` allowed.
        determinism: how equal another run will be: "exact" bit for bit, "default" up to rounding.
        stages: what each replica spent, in order.
        token_count: tokens of the prompt, start and end included.
        truncated_prompt: the end of the prompt that did not fit the model's context and was left out.
        truncated_negative_prompt: the same of the negative prompt.
        fingerprints: of the weights, by stage.
        receipt: all that it takes to make the picture again.
    """

    data: bytes
    media_type: str
    seed: int
    model: str
    width: int
    height: int
    steps: int
    steps_recomputed: int
    steps_saved: int
    determinism: str
    stages: tuple[StageSeconds, ...]
    token_count: int
    truncated_prompt: str
    truncated_negative_prompt: str
    fingerprints: Mapping[str, str]
    receipt: Receipt

    @property
    def image(self) -> Image.Image:
        """The picture, decoded by Pillow."""
        return _decoded(self.data)

    def frames(self) -> list[Image.Image]:
        """The frames of a film, which must have been made as "png_frames".

        Raises:
            InvalidRequestError: it was not.
        """
        if self.media_type != _FRAMES_MEDIA_TYPE:
            raise InvalidRequestError.of("format", f'is {self.media_type}; frames come with format="png_frames"')
        with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
            return [_decoded(archive.read(name)) for name in sorted(archive.namelist()) if name.endswith(".png")]


@dataclass(frozen=True)
class GenerationResult:
    """Everything a request made; the last event of its stream."""

    request_id: str
    images: tuple[GeneratedImage, ...]


Event = Accepted | Queued | Progress | Preview | GenerationResult


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What one replica made of a LoRA's file.

    Args:
        stage: "encoder" or "denoiser".
        replica: its address.
        layout: that was recognised, e.g. "kohya".
        matched_keys: tensors that belong to the stage's networks.
        unmatched_keys: the first of those that belong to nothing.
        unmatched_count: how many of them there are.
        bytes: that it takes on the device.
    """

    stage: str
    replica: str
    layout: str
    matched_keys: int
    unmatched_keys: tuple[str, ...]
    unmatched_count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA that is loaded.

    Args:
        name: what requests call it.
        path: of its file, as the servers see it.
        fingerprint: of the file.
        reports: what each replica made of it.
    """

    name: str
    path: str
    fingerprint: str
    reports: tuple[AdapterReport, ...]


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
        num_frames: default of a film; None: it makes pictures.
        fps: default of a film; None: it makes pictures.
        distilled_guidance_scale: default; None: the model takes none.
        samplers: the first is the default.
        schedules: the first is the default.
        max_tokens: of a prompt; the rest is cut and reported.
        inputs: what it takes to start from beside noise: "image", "mask", "video".
        adapters: names of the LoRAs that are loaded.
        fingerprints: of the weights, by stage.
    """

    name: str
    family: str
    width: int
    height: int
    size_multiple: int
    steps: int
    guidance_scale: float
    distilled_guidance_scale: float | None
    num_frames: int | None
    fps: float | None
    samplers: tuple[str, ...]
    schedules: tuple[str, ...]
    max_tokens: int
    inputs: tuple[str, ...]
    adapters: tuple[str, ...]
    fingerprints: Mapping[str, str]


def _decoded(file: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(file))
    picture.load()
    return picture
