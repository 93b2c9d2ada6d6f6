"""Picture files as Pillow and other tools see them, and uploads of every kind, whole and broken."""

import io
import json
import random
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from services.common.picture_files import PictureError, PictureLimits
from services.decoder.generation_parameters import GenerationParameters
from services.decoder.images import (
    PictureFormat,
    read_parameters,
    read_picture,
    to_pixels,
    write_picture,
)

PARAMETERS = GenerationParameters(
    prompt="a lighthouse at dusk,\noil on canvas, 灯台",
    negative_prompt="fog",
    steps=20,
    sampler="Euler",
    guidance_scale=7.5,
    seed=42,
    width=512,
    height=768,
    model="sd15, pruned: v2",
    details={"Clip skip": 2},
)
TEXT = """a lighthouse at dusk,
oil on canvas, 灯台
Negative prompt: fog
Steps: 20, Sampler: Euler, CFG scale: 7.5, Seed: 42, Size: 512x768, Model: "sd15, pruned: v2", Clip skip: 2"""


def gradient() -> NDArray[np.uint8]:
    """A smooth picture of 40 rows and 64 columns."""
    rows, columns = np.mgrid[0:40, 0:64]
    return np.stack([rows * 6, columns * 4, 255 - columns * 3], axis=-1).astype(np.uint8)


def file_of(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def levels(data: bytes) -> NDArray[np.uint8]:
    """What was read, as levels [H, W, 3]."""
    return to_pixels(read_picture(data)[0])


def test_levels_are_clamped_and_rounded() -> None:
    image = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 9.0]).expand(3, 1, 7)
    assert to_pixels(image)[0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_png_is_lossless() -> None:
    data = write_picture(gradient(), PictureFormat.PNG)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), gradient())
    np.testing.assert_array_equal(levels(data), gradient())
    assert read_picture(data).shape == (1, 3, 40, 64)


@pytest.mark.parametrize("file_format", [PictureFormat.JPEG, PictureFormat.WEBP])
def test_quality_trades_size_for_error(file_format: PictureFormat) -> None:
    noisy = np.random.default_rng(0).normal(gradient(), 8).clip(0, 255).astype(np.uint8)
    low, high = (write_picture(noisy, file_format, quality=quality) for quality in (30, 95))
    assert len(low) < len(high) / 2
    assert Image.open(io.BytesIO(high)).format == file_format.value
    error_low, error_high = (np.abs(levels(data).astype(int) - noisy).mean() for data in (low, high))
    assert error_high < error_low


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_a_quality_out_of_range_is_refused(quality: int) -> None:
    with pytest.raises(PictureError, match="from 1 to 100"):
        write_picture(gradient(), PictureFormat.JPEG, quality=quality)


def test_a_png_takes_no_quality() -> None:
    with pytest.raises(PictureError, match="lossless"):
        write_picture(gradient(), PictureFormat.PNG, quality=90)


def test_a_picture_too_large_for_its_format_is_refused() -> None:
    with pytest.raises(PictureError, match="16383"):
        write_picture(np.zeros((1, 16384, 3), np.uint8), PictureFormat.WEBP)


def test_plain_pillow_reads_the_parameters_of_a_png() -> None:
    image = Image.open(io.BytesIO(write_picture(gradient(), PictureFormat.PNG, parameters=PARAMETERS)))
    assert image.info["parameters"] == TEXT
    assert json.loads(image.info["safelight"])["details"] == {"Clip skip": 2}


@pytest.mark.parametrize("file_format", [PictureFormat.JPEG, PictureFormat.WEBP])
def test_plain_pillow_reads_the_parameters_of_jpeg_and_webp(file_format: PictureFormat) -> None:
    image = Image.open(io.BytesIO(write_picture(gradient(), file_format, parameters=PARAMETERS)))
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment == b"UNICODE\0" + TEXT.encode("utf-16-be")


@pytest.mark.parametrize("file_format", PictureFormat)
def test_parameters_come_back(file_format: PictureFormat) -> None:
    found = read_parameters(write_picture(gradient(), file_format, parameters=PARAMETERS))
    assert found is not None
    assert found.pop("details") in ({"Clip skip": 2}, {"Clip skip": "2"})  # JSON knows numbers, the text form does not
    assert found == {name: value for name, value in vars(PARAMETERS).items() if name != "details"}


@pytest.mark.parametrize("file_format", PictureFormat)
def test_a_picture_may_hold_no_parameters(file_format: PictureFormat) -> None:
    assert read_parameters(write_picture(gradient(), file_format)) is None


def test_parameters_longer_than_exif_are_refused() -> None:
    long = GenerationParameters(**{**vars(PARAMETERS), "prompt": "a" * 40_000})
    assert read_parameters(write_picture(gradient(), PictureFormat.PNG, parameters=long)) is not None
    with pytest.raises(PictureError, match="choose PNG"):
        write_picture(gradient(), PictureFormat.JPEG, parameters=long)


def test_malformed_parameters_are_refused() -> None:
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: many")
    with pytest.raises(PictureError, match="parameters of the picture"):
        read_parameters(file_of(Image.new("RGB", (2, 2)), "PNG", pnginfo=info))


def test_transparent_parts_are_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    for data in (file_of(image, "PNG"), file_of(image, "WEBP", lossless=True)):
        assert levels(data)[0].tolist() == [[255, 255, 255], [200, 0, 0]]


def test_half_transparent_grey_is_blended() -> None:
    assert levels(file_of(Image.new("LA", (1, 1), (0, 128)), "PNG"))[0, 0].tolist() == [127, 127, 127]


def test_palettes_are_looked_up() -> None:
    image = Image.new("P", (2, 1), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    assert levels(file_of(image, "PNG"))[0, 0].tolist() == [10, 20, 30]
    assert levels(file_of(image, "PNG", transparency=1))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("mode", "white"), [("1", 1), ("L", 255)])
def test_greys_are_grey(mode: str, white: int) -> None:
    assert levels(file_of(Image.new(mode, (1, 1), white), "PNG"))[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_to_eight() -> None:
    greys = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert levels(file_of(Image.fromarray(greys), "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_becomes_rgb() -> None:
    red = levels(file_of(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))[8, 8]
    assert np.abs(red.astype(int) - [255, 0, 0]).max() < 30


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_upright_as_their_exif_says(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = file_of(Image.fromarray(gradient()), file_format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(levels(data), np.asarray(expected))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_stretched_to_a_size_after_it_was_turned(file_format: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = file_of(Image.fromarray(gradient()), file_format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    expected = np.asarray(upright.resize((24, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(to_pixels(read_picture(data, size=(24, 16))[0]), expected)


def test_a_picture_of_the_size_asked_for_keeps_every_bit() -> None:
    data = write_picture(gradient(), PictureFormat.PNG)
    np.testing.assert_array_equal(to_pixels(read_picture(data, size=(64, 40))[0]), gradient())


def test_a_file_over_the_byte_limit_is_refused() -> None:
    data = write_picture(gradient(), PictureFormat.PNG)
    with pytest.raises(PictureError, match="bytes"):
        read_picture(data, PictureLimits(max_bytes=len(data) - 1))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims to be `side` pixels wide and high."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 12_000, 40_000, 2**31 - 1])
def test_a_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    with pytest.raises(PictureError, match="pixels"):
        read_picture(png_bomb(side))


def test_a_text_bomb_is_refused() -> None:
    text = png_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(200 * 2**20)))
    whole = write_picture(gradient(), PictureFormat.PNG)
    with pytest.raises(PictureError, match="cannot be read"):
        read_picture(whole[:33] + text + whole[33:])


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"not a picture"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(PictureError):
        read_picture(data)


@pytest.mark.parametrize("file_format", PictureFormat)
def test_a_truncated_file_is_refused(file_format: PictureFormat) -> None:
    data = write_picture(gradient(), file_format, parameters=PARAMETERS)
    for length in range(0, len(data) - 20, max(len(data) // 60, 1)):
        with pytest.raises(PictureError):
            read_picture(data[:length])


@pytest.mark.parametrize("file_format", PictureFormat)
def test_a_damaged_file_is_read_or_refused(file_format: PictureFormat) -> None:
    chance, data = random.Random(0), write_picture(gradient(), file_format, parameters=PARAMETERS)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        with suppress(PictureError):
            read_picture(bytes(damaged))
        with suppress(PictureError):
            read_parameters(bytes(damaged))
