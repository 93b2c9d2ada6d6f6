from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from safelight.errors import CheckpointError
from services.common.manifest import Component, ModelEntry
from services.decoder.models.causal_conv import Past
from services.decoder.models.wan import WanDecoder
from services.decoder.models.wan_vae import WanVAE, decode_film, encode_film, film_pieces, load_wan_vae
from services.decoder.models.wan_vae_keys import DIFFUSERS, ORIGINAL, Layout
from services.modeling.placement import Placement, place
from services.modeling.weights import open_checkpoint
from tests.support.wan_layout import BLOCKS_PER_LEVEL, save_original_vae

CPU = torch.device("cpu")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference() -> AutoencoderKLWan:
    """diffusers' VAE of small random weights; like the real one it halves the frames at two of three levels."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=BLOCKS_PER_LEVEL).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return vae


@pytest.fixture(scope="module")
def folder(reference: AutoencoderKLWan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "vae"
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(reference: AutoencoderKLWan, folder: Path) -> WanVAE:
    return _load(folder, dict(reference.config))


def _load(path: Path, config: dict[str, object] | None) -> WanVAE:
    vae = load_wan_vae(open_checkpoint(path), config, device=CPU, dtype=torch.float32)
    return place(vae, Placement(device=CPU, dtype=torch.float32), vae.weight_blocks()).network


def _film(frames: int, height: int = 32, width: int = 48) -> Tensor:
    """[T, 3, H, W] in [-1, 1]."""
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def _latents(count: int, height: int = 4, width: int = 6) -> Tensor:
    return torch.randn(count, 16, height, width, generator=torch.Generator().manual_seed(count))


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@torch.inference_mode()
def _reference_latents(reference: AutoencoderKLWan, film: Tensor) -> Tensor:
    mean = reference.encode(film.permute(1, 0, 2, 3)[None]).latent_dist.mode()[0].permute(1, 0, 2, 3)
    shift, scale = (mean.new_tensor(reference.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    latents: Tensor = (mean - shift) / scale
    return latents


@torch.inference_mode()
def _reference_film(reference: AutoencoderKLWan, latents: Tensor) -> Tensor:
    shift, scale = (
        latents.new_tensor(reference.config[name])[:, None, None] for name in ("latents_mean", "latents_std")
    )
    film: Tensor = reference.decode((latents * scale + shift).permute(1, 0, 2, 3)[None]).sample
    return film[0].permute(1, 0, 2, 3)


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_films_are_encoded_as_diffusers_encodes_them(reference: AutoencoderKLWan, vae: WanVAE, frames: int) -> None:
    film = _film(frames)
    latents = encode_film(vae, film_pieces(film))
    assert latents.shape == (1 + (frames - 1) // 4, 16, 4, 6)
    _assert_close(latents, _reference_latents(reference, film))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_latents_are_decoded_as_diffusers_decodes_them(reference: AutoencoderKLWan, vae: WanVAE, count: int) -> None:
    latents = _latents(count)
    pieces = list(decode_film(vae, latents))
    assert [len(piece) for piece in pieces] == [1] + [4] * (count - 1)
    _assert_close(torch.cat(pieces).clamp(-1, 1), _reference_film(reference, latents))


def test_where_a_film_is_cut_makes_no_difference(vae: WanVAE) -> None:
    mean, film, past = vae.denormalize(_latents(4)), _film(13), Past()
    whole = torch.cat([vae.decode(mean[:1], past), vae.decode(mean[1:], past)])
    _assert_close(whole, torch.cat(list(decode_film(vae, _latents(4)))))
    past = Past()
    encoded = vae.normalize(torch.cat([vae.encode(film[:1], past), vae.encode(film[1:], past)]))
    _assert_close(encoded, encode_film(vae, film_pieces(film)))


def test_a_frame_does_not_know_what_comes_after_it(vae: WanVAE) -> None:
    latents, others = _latents(3), _latents(3).clone()
    others[2] += 1
    made, made_of_others = (list(decode_film(vae, each)) for each in (latents, others))
    assert torch.equal(torch.cat(made[:2]), torch.cat(made_of_others[:2]))
    assert not torch.equal(made[2], made_of_others[2])


def test_the_original_layout_loads_without_a_config(folder: Path, vae: WanVAE, tmp_path: Path) -> None:
    original = _load(save_original_vae(folder, vae.state_dict(), tmp_path / "vae.safetensors"), None)
    assert original.params == vae.params
    weights = {name: weight.to_dense() for name, weight in vae.state_dict().items()}
    assert all(torch.equal(weight.to_dense(), weights[name]) for name, weight in original.state_dict().items())


def test_the_official_pth_file_loads_where_that_is_allowed(folder: Path, vae: WanVAE, tmp_path: Path) -> None:
    torch.save(load_file(save_original_vae(folder, vae.state_dict(), tmp_path / "vae.tmp")), tmp_path / "vae.pth")
    part = Component(path=str(tmp_path / "vae.pth"), allow_pickle=True)
    decoder = WanDecoder.load(ModelEntry(name="tiny", family="wan", decoder=part), CPU)
    latents = _latents(2)
    ours, theirs = (torch.cat(list(decode_film(each, latents))) for each in (decoder._vae, vae))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", [DIFFUSERS, ORIGINAL], ids=["diffusers", "original"])
def test_every_weight_has_a_name_of_its_own_in_each_layout(vae: WanVAE, layout: Layout) -> None:
    names = [layout.source(name, BLOCKS_PER_LEVEL) for name in vae.state_dict()]
    assert len(set(names)) == len(names)


def test_a_file_that_lacks_a_tensor_is_refused_by_its_name(folder: Path, vae: WanVAE, tmp_path: Path) -> None:
    missing = "decoder.upsamples.3.time_conv.weight"
    with pytest.raises(CheckpointError, match=missing):
        _load(save_original_vae(folder, vae.state_dict(), tmp_path / "vae.safetensors", leave_out=missing), None)


def test_an_option_that_would_change_the_film_is_refused_by_its_name(reference: AutoencoderKLWan, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is_residual"):
        _load(folder, dict(reference.config) | {"is_residual": True})


def test_wide_convolutions_equal_diffusers_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = AutoencoderKLWan(base_dim=192, z_dim=16, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    reference.eval().save_pretrained(tmp_path)
    latents = _latents(3)
    vae = _load(tmp_path, dict(reference.config))
    film = torch.cat(list(decode_film(vae, latents)))
    _assert_close(film.clamp(-1, 1), _reference_film(reference, latents))
