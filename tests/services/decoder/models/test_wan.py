"""Wan's decoder as the engine sees it: tiles of large frames, and the dtypes that it computes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.decoder.models.wan import WanDecoder
from services.decoder.models.wan_vae import film_pieces, load_wan_vae
from services.decoder.tiling import DEFAULT_TILING, Tiling
from services.modeling.placement import Placement, place
from services.modeling.weights import open_checkpoint
from tests.support.tiny_wan import tiny_wan_vae

CPU = torch.device("cpu")
IN_TILES = Tiling(tile=40, overlap=8, untiled_area=0)  # of 72 latent pixels two tiles, which share those from 32 to 40
WIDTH, REACH = 72, 20  # what a latent pixel sees to each side, without attention, rounded up

Load = Callable[[torch.dtype], WanDecoder]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A decoder whose attention, which sees a whole frame, adds nothing."""
    torch.manual_seed(0)
    reference, folder = tiny_wan_vae(), tmp_path_factory.mktemp("wan")
    for half in (reference.encoder, reference.decoder):
        for parameter in half.mid_block.attentions[0].proj.parameters():
            parameter.zero_()
    reference.save_pretrained(folder)

    def load_decoder(dtype: torch.dtype) -> WanDecoder:
        vae = load_wan_vae(open_checkpoint(Path(folder)), dict(reference.config), device=CPU, dtype=dtype)
        return WanDecoder(place(vae, Placement(device=CPU, dtype=dtype), vae.weight_blocks()), fingerprint="")

    return load_decoder


def latents(width: int = WIDTH) -> Tensor:
    """Of a film of five frames."""
    return torch.randn(1, 16, 2, 4, width, generator=torch.Generator().manual_seed(0))


def film_of(decoder: WanDecoder, tiling: Tiling = DEFAULT_TILING, width: int = WIDTH) -> Tensor:
    """[5, 3, H, W]."""
    return torch.cat(list(decoder.decode_film(latents(width), tiling)))


def latents_of(decoder: WanDecoder, tiling: Tiling = DEFAULT_TILING) -> Tensor:
    """[1, 16, 2, h, w]."""
    film = torch.rand(5, 3, 32, 8 * WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat(list(decoder.encode_film(film_pieces(film), tiling)), dim=2)


@pytest.mark.parametrize(("work", "scale"), [(film_of, 8), (latents_of, 1)], ids=["decoded", "encoded"])
def test_away_from_their_seams_tiles_are_the_whole_frame(
    work: Callable[[WanDecoder, Tiling], Tensor], scale: int, load: Load
) -> None:
    decoder = load(torch.float32)
    difference = (work(decoder, IN_TILES) - work(decoder, DEFAULT_TILING)).abs()
    left, right = (40 - REACH) * scale, (32 + REACH) * scale
    largest = work(decoder, DEFAULT_TILING).abs().max()
    assert max(difference[..., :left].max(), difference[..., right:].max()) <= 1e-5 * largest
    assert difference[..., left:right].max() > 1e-5 * largest


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_a_film_in_half_precision_is_near_that_in_float32(dtype: torch.dtype, tolerance: float, load: Load) -> None:
    exact, rounded = film_of(load(torch.float32), width=6), film_of(load(dtype), width=6)
    assert rounded.dtype == dtype
    assert (rounded.float() - exact).abs().max() <= tolerance * exact.abs().max()
