"""Laws of placing: what the manifest asks for, on the device at hand, for every network that declares its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from services.common.manifest import ModelEntry, Part
from services.decoder.models.autoencoder_kl import AutoencoderKL, AutoencoderKLParams, LatentScale
from services.denoiser.models.flux_dit import FluxDiT
from services.denoiser.models.flux_dit_params import FluxDiTParams
from services.denoiser.models.sd_unet import SDUNet
from services.denoiser.models.sd_unet_params import SDUNetParams
from services.encoder.models.sd15 import SD15Encoder
from services.encoder.models.t5 import T5TextEncoder
from services.modeling.float8 import FLOAT8, store_as_float8
from services.modeling.placement import Placement, place, placement_of
from services.modeling.residency import RESIDENT, Residency
from services.modeling.weight_streaming import OffloadedWeights, WeightBlock
from services.modeling.weight_transfer import SynchronousTransfer

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


@pytest.mark.parametrize(
    ("part", "residency"),
    [
        (Part(), RESIDENT),
        (Part(offload="none"), RESIDENT),
        (Part(offload="cpu_offload"), Residency(leaves_when_idle=True)),
        (Part(offload="sequential_cpu_offload"), Residency(budget_bytes=0, leaves_when_idle=True)),
        (Part(memory_budget=12 * GIB), Residency(budget_bytes=12 * GIB)),
        (Part(memory_budget=0), Residency(budget_bytes=0)),
        (
            Part(offload="cpu_offload", memory_budget=GIB),
            Residency(budget_bytes=GIB, leaves_when_idle=True),
        ),
    ],
)
def test_the_modes_are_points_of_one_scale(part: Part, residency: Residency) -> None:
    assert placement_of(part, GPU).residency == residency


def test_on_a_cpu_nothing_is_offloaded_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert placement_of(Part(offload="cpu_offload"), CPU).residency == RESIDENT
    assert "on a CPU there is nothing to offload" in caplog.text


def test_what_does_not_stay_as_it_is_loaded_is_loaded_into_host_memory() -> None:
    assert placement_of(Part(), GPU).loading_device == GPU
    for part in (Part(memory_budget=GIB), Part(offload="cpu_offload"), Part(dtype="float8_e4m3fn")):
        assert placement_of(part, GPU).loading_device == CPU


def test_float8_computes_in_bfloat16() -> None:
    placement = placement_of(Part(dtype="float8_e4m3fn"), GPU)
    assert (placement.float8, placement.dtype) == (True, torch.bfloat16)


def test_a_weight_that_is_in_no_block_is_named() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Sequential: 1\.weight and 1 more are in no block"):
        place(network, Placement(device=CPU, dtype=torch.float32), [WeightBlock("first", (network[0],))])


def test_resident_weights_are_counted() -> None:
    network = nn.Linear(4, 4)
    placed = place(network, Placement(device=CPU, dtype=torch.float32), [WeightBlock("all", (network,))])
    assert placed.weights.account.resident_bytes == placed.weights.account.peak_bytes == 80


def test_exempt_modules_keep_the_dtype() -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    placement = Placement(device=CPU, dtype=torch.bfloat16, float8=True)
    place(network, placement, [WeightBlock("all", (network,))], full_precision=[network[0]])
    assert [parameter.dtype for parameter in network[0].parameters()] == [torch.bfloat16] * 2
    assert FLOAT8 in {parameter.dtype for parameter in network[1].parameters()}


def tiny_unet() -> SDUNet:
    torch.manual_seed(0)
    params = SDUNetParams(
        in_channels=4,
        out_channels=4,
        widths=(32, 64),
        blocks_per_level=1,
        layers=(1, 0),
        middle_layers=1,
        heads=(2, 2),
        cross_attention_dim=24,
        norm_groups=8,
    )
    return SDUNet(params).requires_grad_(False)


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    params = AutoencoderKLParams(
        block_channels=(16, 32),
        resnets_per_level=1,
        latent_channels=4,
        norm_groups=4,
        quant_conv=True,
        latent_scale=LatentScale(factor=0.18215),
    )
    return AutoencoderKL(params).requires_grad_(False)


def offload(network: nn.Module, blocks: list[WeightBlock], budget: int) -> OffloadedWeights:
    residency = Residency(budget_bytes=budget, leaves_when_idle=True)
    return OffloadedWeights(blocks, residency, SynchronousTransfer(CPU))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_unet_predicts_the_same_whatever_streams(share: float) -> None:
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([981.0, 3.5])
    context = torch.randn(2, 7, 24)
    unet, expected = tiny_unet(), tiny_unet()
    budget = int(share * sum(parameter.nbytes for parameter in unet.parameters()))
    weights = offload(unet, unet.weight_blocks(), budget)
    with torch.inference_mode():
        for _ in range(2):
            predicted = unet(latents, timesteps, unet.project_context(context))
            assert torch.equal(predicted, expected(latents, timesteps, expected.project_context(context)))
            weights.leave()
    assert weights.account.peak_bytes == weights.plan.peak_bytes


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_vae_decodes_and_encodes_the_same_whatever_streams(share: float) -> None:
    vae, expected = tiny_vae(), tiny_vae()
    budget = int(share * sum(parameter.nbytes for parameter in vae.parameters()))
    offload(vae, vae.weight_blocks(), budget)
    latents = torch.randn(1, 4, 8, 8)
    for _ in range(2):
        assert torch.equal(vae.decode(latents), expected.decode(latents))
        assert torch.equal(vae.encode(vae.decode(latents)), expected.encode(expected.decode(latents)))


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_the_text_encoder_encodes_the_same_whatever_streams(tiny_sd15: Path, clip_skip: int) -> None:
    encoder, expected = (SD15Encoder.load(ModelEntry(name="tiny", path=str(tiny_sd15)), CPU) for _ in range(2))
    clip = encoder._clip
    offload(clip, clip.weight_blocks(), 0)
    prompts = [encoder.tokenize("a cat"), encoder.tokenize("")]
    for _ in range(2):
        encoded = zip(encoder.encode(prompts, clip_skip), expected.encode(prompts, clip_skip), strict=True)
        assert all(torch.equal(one["prompt_embeds"], other["prompt_embeds"]) for one, other in encoded)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("float8", [False, True])
def test_flux_s_transformer_predicts_the_same_whatever_streams(share: float, float8: bool) -> None:
    dit, expected = tiny_dit(), tiny_dit()
    if float8:
        for each in (dit, expected):
            store_as_float8(each, torch.float32, each.full_precision())
    budget = int(share * sum(parameter.nbytes for parameter in dit.parameters()))
    weights = offload(dit, dit.weight_blocks(), budget)
    latents, embeds, pooled, one = torch.randn(1, 4, 4, 6), torch.randn(1, 5, 24), torch.randn(1, 12), torch.ones(1)
    with torch.inference_mode():
        for _ in range(2):
            ours, theirs = (each(latents, one, each.prepare(embeds, pooled, one, (4, 6))) for each in (dit, expected))
            assert torch.equal(ours, theirs)
            weights.leave()


@pytest.mark.parametrize("float8", [False, True])
def test_t5_encodes_the_same_whatever_streams(float8: bool) -> None:
    t5, expected = tiny_t5(), tiny_t5()
    if float8:
        for each in (t5, expected):
            store_as_float8(each, torch.float32)
    offload(t5, t5.weight_blocks(), 0)
    ids = torch.arange(14).view(2, 7)
    for _ in range(2):
        assert torch.equal(t5(ids), expected(ids))


def tiny_dit() -> FluxDiT:
    params = FluxDiTParams(
        in_channels=16,
        width=64,
        heads=2,
        double_blocks=2,
        single_blocks=3,
        context_width=24,
        pooled_width=12,
        distilled_guidance=True,
        rope_channels=(8, 12, 12),
    )
    return seeded(FluxDiT(params))


def tiny_t5() -> T5TextEncoder:
    config = T5Config(
        vocab_size=32, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return seeded(T5TextEncoder(T5EncoderModel(config).encoder.eval()))


def seeded(network: AnyNetwork) -> AnyNetwork:
    """The network with weights of which none is zero or one."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.requires_grad_(False).parameters():
        parameter.uniform_(-0.3, 0.3, generator=generator)
    return network


def test_the_modulation_and_the_ends_of_the_unet_are_exempt() -> None:
    unet = tiny_unet()
    placement = Placement(device=CPU, dtype=torch.float32, float8=True)
    place(unet, placement, unet.weight_blocks(), unet.full_precision())
    stored = {name for name, parameter in unet.named_parameters() if parameter.dtype == FLOAT8}
    assert stored
    assert not {name for name in stored if {"time", "conv_in", "conv_out"} & set(name.split("."))}
