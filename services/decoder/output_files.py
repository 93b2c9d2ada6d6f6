"""From a decoded tensor to the file that the request asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from torch import Tensor

from safelight.errors import InvalidRequestError
from safelight.v1 import work_pb2 as pb
from services.common.picture_files import PictureError
from services.decoder.generation_parameters import GenerationParameters, ParameterValue
from services.decoder.images import PictureFormat, write_picture

PICTURE_FORMATS: Mapping[pb.OutputFormat.ValueType, PictureFormat] = {
    pb.OUTPUT_FORMAT_PNG: PictureFormat.PNG,
    pb.OUTPUT_FORMAT_JPEG: PictureFormat.JPEG,
    pb.OUTPUT_FORMAT_WEBP: PictureFormat.WEBP,
}
FORMATS = (*PICTURE_FORMATS, pb.OUTPUT_FORMAT_LATENTS)
_LATENTS_MEDIA_TYPE = "application/vnd.safetensors"


@dataclass(frozen=True)
class OutputFile:
    """A finished file, at its beginning; width, height and frames are 0 when there is nothing to see in it."""

    content: BinaryIO
    media_type: str
    width: int = 0
    height: int = 0
    frames: int = 0


def picture_file(
    pixels: NDArray[np.uint8], output: pb.OutputOptions, parameters: pb.GenerationParameters
) -> OutputFile:
    """The picture file of levels [H, W, 3].

    Raises:
        InvalidRequestError: the format does not take the quality, the size or the parameters.
    """
    picture_format = PICTURE_FORMATS[output.format or pb.OUTPUT_FORMAT_PNG]
    embedded = None if output.omit_metadata else embedded_parameters(parameters)
    try:
        data = write_picture(pixels, picture_format, quality=output.quality or None, parameters=embedded)
    except PictureError as error:
        raise InvalidRequestError.of("output", str(error)) from error
    height, width = pixels.shape[:2]
    return OutputFile(io.BytesIO(data), f"image/{picture_format.value.lower()}", width, height, frames=1)


def latents_file(latents: Tensor) -> OutputFile:
    """A safetensors file with the one tensor "latents"."""
    data = safetensors.torch.save({"latents": latents.cpu().contiguous()})
    return OutputFile(io.BytesIO(data), _LATENTS_MEDIA_TYPE)


def _distilled_scale(guidance: pb.GuidanceOptions) -> dict[str, ParameterValue]:
    """Under the name that Forge gave it."""
    return {"Distilled CFG Scale": round(guidance.distilled_scale, 6)} if guidance.HasField("distilled_scale") else {}


def embedded_parameters(parameters: pb.GenerationParameters) -> GenerationParameters:
    """What is written into a picture of the parameters it was made with."""
    details: dict[str, ParameterValue] = {
        "Schedule type": parameters.sampling.schedule,
        "Clip skip": parameters.clip_skip,
        **_distilled_scale(parameters.guidance),
        **({"Denoising strength": round(parameters.strength, 6)} if parameters.HasField("strength") else {}),
        **_told_sizes(parameters),
        **{f"{name.capitalize()} hash": value for name, value in sorted(parameters.fingerprints.items())},
    }
    return GenerationParameters(
        prompt=parameters.prompt,
        negative_prompt=parameters.negative_prompt,
        steps=parameters.sampling.steps,
        sampler=parameters.sampling.sampler,
        guidance_scale=round(parameters.guidance.scale, 6),
        seed=parameters.seed,
        width=parameters.width,
        height=parameters.height,
        model=parameters.model,
        details=details,
    )


def _told_sizes(parameters: pb.GenerationParameters) -> dict[str, ParameterValue]:
    """The sizes that SDXL was told, where they are not the picture's own."""
    sizes, own = parameters.size_conditioning, (parameters.width, parameters.height)
    pairs = {
        "Original size": (sizes.original_width, sizes.original_height),
        "Crop": (sizes.crop_left, sizes.crop_top),
        "Target size": (sizes.target_width, sizes.target_height),
    }
    return {name: f"{pair[0]}x{pair[1]}" for name, pair in pairs.items() if pair not in (own, (0, 0))}
