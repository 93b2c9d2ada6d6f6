"""Tiled decoding and encoding against one pass."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.decoder.models.autoencoder_kl import AutoencoderKL, AutoencoderKLParams, LatentScale
from services.decoder.tiling import Tiles, Tiling, tiled_decode, tiled_encode

SMALL = Tiling(tile=12, overlap=4, untiled_area=0)


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    params = AutoencoderKLParams(
        block_channels=(8, 8, 8, 8),
        resnets_per_level=1,
        latent_channels=4,
        norm_groups=2,
        quant_conv=True,
        latent_scale=LatentScale(factor=1.0),
    )
    return AutoencoderKL(params)


class LocalDecoder(nn.Module):
    """A decoder without global layers, whose outputs depend on inputs up to one latent pixel away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        return F.interpolate(self.conv(latents), scale_factor=8.0).tanh()


@pytest.mark.parametrize("length", [1, 12, 13, 17, 20, 29, 50, 97])
def test_tiles_cover_a_side_and_their_weights_sum_to_one(length: int) -> None:
    tiles = Tiles(length, SMALL)
    total = torch.zeros(length * 8)
    for where, weight in zip(tiles.slices(8), tiles.weights(8), strict=True):
        total[where] += weight
    torch.testing.assert_close(total, torch.ones(length * 8))
    assert tiles.size <= max(SMALL.tile, 1)
    assert all(
        0 < after - before <= tiles.size - 4 for before, after in zip(tiles.starts, tiles.starts[1:], strict=False)
    )


def test_the_ramps_of_neighbours_are_linear() -> None:
    first, second = Tiles(20, SMALL).weights(1)
    torch.testing.assert_close(first[-4:], torch.tensor([0.875, 0.625, 0.375, 0.125]))
    torch.testing.assert_close(second[:4], torch.tensor([0.125, 0.375, 0.625, 0.875]))


@torch.inference_mode()
def test_a_local_decoder_is_exact_away_from_the_seams() -> None:
    decode, latents = LocalDecoder(), torch.randn(1, 4, 20, 20)
    whole, tiled = decode(latents), tiled_decode(decode, latents, 8, SMALL)
    seam = slice(8 * 8, 12 * 8)
    differs = (tiled - whole).abs().amax(dim=(0, 1)) > 1e-6
    differs[seam, :] = differs[:, seam] = False
    assert not differs.any()


@torch.inference_mode()
def test_a_constant_stays_constant_across_the_seams() -> None:
    def decode(latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=8.0)

    constant = torch.full((2, 3, 37, 21), 0.7)
    torch.testing.assert_close(tiled_decode(decode, constant, 8, SMALL), torch.full((2, 3, 296, 168), 0.7))


@torch.inference_mode()
def test_seams_are_no_steeper_than_the_picture() -> None:
    smooth = torch.linspace(-1, 1, 48).expand(1, 4, 48, 48)
    decode, tiling = small_vae().decode, Tiling(tile=24, overlap=8, untiled_area=0)
    whole, tiled = decode(smooth), tiled_decode(decode, smooth, 8, tiling)
    inside = slice(16, -16)  # the picture's own border is steep in both

    def steepest(image: Tensor) -> Tensor:
        return image[..., inside, inside].diff(dim=-1).abs().max()

    assert steepest(tiled) <= 1.25 * steepest(whole)


def psnr(x: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the peak being the range of the reference."""
    peak = reference.max() - reference.min()
    return float(10 * torch.log10(peak**2 / (x - reference).square().mean()))


@torch.inference_mode()
def test_tiled_is_close_to_one_pass() -> None:
    vae, tiling = small_vae(), Tiling(tile=32, overlap=16, untiled_area=0)
    latents = torch.randn(1, 4, 64, 48)
    image = F.interpolate(torch.rand(1, 3, 16, 16) * 2 - 1, size=(512, 384), mode="bicubic")
    assert psnr(tiled_decode(vae.decode, latents, 8, tiling), vae.decode(latents)) > 35
    assert psnr(tiled_encode(vae.encode, image, 8, tiling), vae.encode(image)) > 30


@torch.inference_mode()
def test_only_large_pictures_are_tiled() -> None:
    sizes: list[tuple[int, ...]] = []

    def decode(latents: Tensor) -> Tensor:
        sizes.append(tuple(latents.shape[-2:]))
        return latents

    tiling = Tiling(tile=12, overlap=4, untiled_area=400)
    tiled_decode(decode, torch.zeros(1, 4, 20, 20), 1, tiling)
    assert sizes == [(20, 20)]
    tiled_decode(decode, torch.zeros(1, 4, 20, 21), 1, tiling)
    assert sizes[1:] == [(12, 10)] * 6  # two rows of three
    tiled_encode(decode, torch.zeros(1, 3, 20, 20), 1, tiling)
    assert sizes[7:] == [(20, 20)]


@pytest.mark.parametrize("options", [{"tile": 0, "overlap": 0}, {"overlap": 33}, {"overlap": -1}])
def test_impossible_tilings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="overlap"):
        Tiling(**options)


def test_a_side_that_is_no_whole_number_of_latents_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        tiled_encode(lambda image: image, torch.zeros(1, 3, 801, 800), 8, SMALL)
