"""Our FLUX.1 transformer against diffusers' with the same random weights, from every layout of checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import gguf
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from services.denoiser.models.dit_layout import Layout
from services.denoiser.models.flux_dit import FluxDiT, load_flux_dit, stack_context, to_latents, to_tokens
from services.denoiser.models.flux_dit_keys import DIFFUSERS, ORIGINAL
from services.denoiser.models.flux_dit_params import params_from_config
from services.modeling.placement import Placement, place
from services.modeling.weights import CheckpointError, open_checkpoint
from tests.support.flux_layout import original_flux_tensors
from tests.support.gguf_layout import save_gguf
from tests.support.scaled_layout import scaled, unscaled
from tests.support.tiny_flux import CONTEXT_WIDTH, LATENT_CHANNELS, POOLED_WIDTH, tiny_flux_dit

TIMESTEPS, SCALES = torch.tensor([750.0, 33.5]), torch.tensor([3.5, 2.0])
SIZES = [(8, 12), (2, 2), (6, 4)]
PREFIX = "model.diffusion_model."


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=["dev", "schnell"])
def reference(request: pytest.FixtureRequest) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return tiny_flux_dit(distilled_guidance=request.param == "dev")


@pytest.fixture(scope="module")
def dev() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return tiny_flux_dit()


def load(path: Path, reference: FluxTransformer2DModel | None, dtype: torch.dtype = torch.float32) -> FluxDiT:
    config = None if reference is None else reference.config
    placement = Placement(device=torch.device("cpu"), dtype=dtype)
    dit = load_flux_dit(open_checkpoint(path), config, device=placement.device, dtype=dtype)
    return place(dit, placement, dit.weight_blocks()).network


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def inputs(size: tuple[int, int] = SIZES[0]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, T5's and CLIP's embeddings of two requests."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, LATENT_CHANNELS, *size, generator=generator),
        torch.randn(2, 7, CONTEXT_WIDTH, generator=generator),
        torch.randn(2, POOLED_WIDTH, generator=generator),
    )


def expected(
    reference: FluxTransformer2DModel, latents: Tensor, embeds: Tensor, pooled: Tensor, timesteps: Tensor = TIMESTEPS
) -> Tensor:
    height, width = latents.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    guidance = SCALES if reference.config.guidance_embeds else None
    text = torch.zeros(embeds.shape[1], 3)
    # in the dtypes of diffusers' pipeline
    times = timesteps.to(latents.dtype) / 1000
    out = reference(to_tokens(latents), embeds, pooled, times, positions, text, guidance).sample
    return to_latents(out, (height, width))


def predict(dit: FluxDiT, latents: Tensor, embeds: Tensor, pooled: Tensor, timesteps: Tensor = TIMESTEPS) -> Tensor:
    return dit(latents, timesteps, dit.prepare(embeds, pooled, SCALES, latents.shape[-2:]))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", SIZES)
def test_equals_diffusers(tmp_path: Path, reference: FluxTransformer2DModel, size: tuple[int, int]) -> None:
    reference.save_pretrained(tmp_path)
    actual = predict(load(tmp_path, reference), *inputs(size))
    assert relative_error(actual, expected(reference, *inputs(size))) < 1e-5


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_the_original_layout_gives_the_same_bits_as_the_folder(
    tmp_path: Path, reference: FluxTransformer2DModel, prefix: str
) -> None:
    reference.save_pretrained(tmp_path / "transformer")
    tensors = original_flux_tensors(reference.state_dict(), prefix)
    others = {"vae.decoder.conv_in.weight": torch.zeros(1)} if prefix else {}
    file = saved(tmp_path / "flux.safetensors", tensors | others)
    folder, single = load(tmp_path / "transformer", reference), load(file, None)
    assert single.params == folder.params
    assert torch.equal(predict(single, *inputs()), predict(folder, *inputs()))


def test_diffusers_names_need_no_config(tmp_path: Path, reference: FluxTransformer2DModel) -> None:
    file = saved(tmp_path / "flux.safetensors", reference.state_dict())
    assert load(file, None).params == params_from_config(reference.config)


@pytest.mark.parametrize("layout", [DIFFUSERS, ORIGINAL])
def test_every_layout_covers_the_full_size_once(layout: Layout) -> None:
    with torch.device("meta"):
        reference = FluxTransformer2DModel(guidance_embeds=True)
        dit = FluxDiT(params_from_config(reference.config))
    theirs = reference.state_dict() if layout is DIFFUSERS else original_flux_tensors(reference.state_dict())
    used = dict.fromkeys(theirs, Fraction(0))
    for source in itertools.chain(*layout.sources(dit.state_dict().keys()).values()):
        name, part = (source, Fraction(1)) if isinstance(source, str) else (source.name, Fraction(1, source.parts))
        used[name] += part
    assert set(used.values()) == {1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_in_few_bits_are_cast_on_load(tmp_path: Path, dev: FluxTransformer2DModel, dtype: torch.dtype) -> None:
    rounded = {name: tensor.to(dtype) for name, tensor in original_flux_tensors(dev.state_dict()).items()}
    few = load(saved(tmp_path / "few.safetensors", rounded), None)
    full = load(saved(tmp_path / "full.safetensors", {name: t.float() for name, t in rounded.items()}), None)
    assert {parameter.dtype for parameter in few.parameters()} == {torch.float32}
    assert torch.equal(predict(few, *inputs()), predict(full, *inputs()))


def test_a_scaled_file_is_the_products_with_its_scales(tmp_path: Path, dev: FluxTransformer2DModel) -> None:
    stored = scaled(original_flux_tensors(dev.state_dict()))
    file, plain = (
        saved(tmp_path / f"{name}.safetensors", tensors)
        for name, tensors in {"scaled": stored, "plain": unscaled(stored)}.items()
    )
    assert torch.equal(predict(load(file, None), *inputs()), predict(load(plain, None), *inputs()))


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_a_gguf_file_is_dequantized_on_load(tmp_path: Path, dev: FluxTransformer2DModel, quantization: str) -> None:
    quantized = gguf.GGMLQuantizationType[quantization]
    tensors = original_flux_tensors(dev.state_dict())
    dequantized = save_gguf(tmp_path / "flux.gguf", tensors, quantized)
    plain = saved(tmp_path / "flux.safetensors", dequantized)
    assert torch.equal(predict(load(tmp_path / "flux.gguf", None), *inputs()), predict(load(plain, None), *inputs()))


def test_rows_of_a_batch_have_their_own_timestep_guidance_and_text(
    tmp_path: Path, reference: FluxTransformer2DModel
) -> None:
    reference.save_pretrained(tmp_path)
    dit, (latents, embeds, pooled) = load(tmp_path, reference), inputs()
    rows = [
        dit.prepare(embeds[row : row + 1], pooled[row : row + 1], SCALES[row : row + 1], latents.shape[-2:])
        for row in range(2)
    ]
    together = dit(latents, TIMESTEPS, stack_context(rows))
    alone = torch.cat([dit(latents[row : row + 1], TIMESTEPS[row : row + 1], rows[row]) for row in range(2)])
    assert relative_error(together, alone) < 1e-5


def test_bfloat16_is_no_worse_than_diffusers(tmp_path: Path, dev: FluxTransformer2DModel) -> None:
    """Against float32 with the times and guidance scales that bfloat16 makes of them."""
    dev.save_pretrained(tmp_path)
    rounded = {name: tensor.bfloat16() for name, tensor in dev.state_dict().items()}
    half_reference = tiny_flux_dit().to(torch.bfloat16)
    half_reference.load_state_dict(rounded)
    exact_dit = load(saved(tmp_path / "rounded.safetensors", {k: t.float() for k, t in rounded.items()}), dev)
    latents, embeds, pooled = (tensor.bfloat16() for tensor in inputs())
    as_embedded = exact_dit.prepare(embeds.float(), pooled.float(), torch.tensor([3.504, 2.0]), latents.shape[-2:])
    exact = exact_dit(latents.float(), torch.tensor([752.0, 33.5]), as_embedded)
    theirs = expected(half_reference, latents, embeds, pooled).float()
    ours = predict(load(tmp_path, dev, torch.bfloat16), latents, embeds, pooled).float()
    assert relative_error(ours, exact) < 1.2 * relative_error(theirs, exact) < 0.05


def test_float16_saturates_where_the_text_overflows(tmp_path: Path, dev: FluxTransformer2DModel) -> None:
    tensors = dict(dev.state_dict())
    tensors["transformer_blocks.0.ff_context.net.2.bias"] = torch.full((64,), 60000.0)
    tensors["transformer_blocks.0.norm1_context.linear.bias"] = torch.full((384,), 2.0)
    dit = load(saved(tmp_path / "flux.safetensors", tensors), dev, torch.float16)
    assert predict(dit, *(tensor.half() for tensor in inputs())).isfinite().all()


def test_times_and_guidance_scales_are_exact_in_float32_and_rounded_in_bfloat16(
    tmp_path: Path, dev: FluxTransformer2DModel
) -> None:
    dev.save_pretrained(tmp_path)
    latents, embeds, pooled = inputs()
    exact, half = (load(tmp_path, dev, dtype) for dtype in (torch.float32, torch.bfloat16))
    scales, rounded = torch.tensor([3.5, 3.5]), torch.tensor([3.504, 3.504])
    size = latents.shape[-2:]
    vectors = [exact.prepare(embeds, pooled, guidance, size).vector for guidance in (scales, rounded)]
    in_half = half.prepare(embeds.bfloat16(), pooled.bfloat16(), scales, size).vector.float()
    assert relative_error(in_half, vectors[1]) < 0.02 < relative_error(in_half, vectors[0])


def test_packing_is_diffusers_and_unpacks() -> None:
    from diffusers import FluxPipeline

    latents = inputs((8, 12))[0]
    assert torch.equal(to_tokens(latents), FluxPipeline._pack_latents(latents, 2, LATENT_CHANNELS, 8, 12))
    assert torch.equal(to_latents(to_tokens(latents), (8, 12)), latents)


@pytest.mark.parametrize("name", ["single_blocks.1.linear1.bias", "double_blocks.0.img_attn.norm.key_norm.scale"])
def test_a_faulty_key_is_named(tmp_path: Path, dev: FluxTransformer2DModel, name: str) -> None:
    tensors = original_flux_tensors(dev.state_dict())
    for fault, message in (
        ({name: None}, f"missing: {name}"),
        ({name: torch.zeros(3)}, f"mis-shaped: .*{name}"),
        ({f"{name}_more": torch.zeros(3)}, f"unexpected: {name}_more"),
    ):
        faulty = {key: tensor for key, tensor in {**tensors, **fault}.items() if tensor is not None}
        with pytest.raises(CheckpointError, match=message):
            load(saved(tmp_path / "flux.safetensors", faulty), None)


@pytest.mark.parametrize(
    "options", [{"patch_size": 2}, {"out_channels": 8}, {"a_new_option": 3}, {"axes_dims_rope": (4, 4, 4)}]
)
def test_an_option_of_another_architecture_is_named(dev: FluxTransformer2DModel, options: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(options))):
        params_from_config({**dev.config, **options})


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no FLUX\.1 transformer"):
        load(saved(tmp_path / "sd.safetensors", {f"{PREFIX}input_blocks.0.0.weight": torch.zeros(1)}), None)
