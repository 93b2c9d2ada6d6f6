"""LoRAs of every family's denoiser: equal to diffusers', and rows with different ones share a forward pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from safelight.errors import InvalidRequestError
from services.common.manifest import Component, ModelEntry
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.keyframes import Keyframes
from services.denoiser.registry import LOADERS, LocalDenoiser
from services.modeling import components
from services.modeling.float8 import is_stored_as_float8
from services.modeling.lora.adapter import Adapter, Applied
from services.modeling.lora.deltas import Offset
from services.modeling.lora.fusing import fuse
from services.modeling.lora.layouts import DENOISER
from services.modeling.lora.reading import read_adapter
from services.modeling.placement import Placement
from tests.support.lora_files import Tensors, dotted, kohya, of_every_kind, random_tensor, save
from tests.support.tiny_flux import save_tiny_flux
from tests.support.tiny_sd15 import save_tiny_sd15
from tests.support.tiny_sdxl import save_tiny_sdxl
from tests.support.tiny_wan import save_tiny_wan, save_tiny_wan_i2v

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Family:
    """A family's model of a few weights.

    Args:
        save: writes it, in the diffusers layout.
        component: the denoiser's name in diffusers' pipeline.
        pipeline: diffusers' own.
        latent_shape: [C, H, W], or [C, T, H, W].
    """

    save: Callable[[Path], Path]
    component: str
    pipeline: Any
    latent_shape: tuple[int, ...]


class WanTransformerAlone:
    """As much of diffusers' pipeline as LoRAs need."""

    @staticmethod
    def from_pretrained(folder: Path) -> WanPipeline:
        """The pipeline of the folder's transformer."""
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
        return WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer)


FAMILIES = {
    "sd15": Family(save_tiny_sd15, "unet", StableDiffusionPipeline, (4, 8, 10)),
    "sdxl": Family(save_tiny_sdxl, "unet", StableDiffusionXLPipeline, (4, 8, 12)),
    "flux": Family(save_tiny_flux, "transformer", FluxPipeline, (16, 8, 6)),
    "wan": Family(save_tiny_wan, "transformer", WanTransformerAlone, (16, 2, 8, 6)),
    "wan i2v": Family(save_tiny_wan_i2v, "transformer", WanTransformerAlone, (16, 2, 8, 6)),
}


@dataclass(frozen=True)
class Model:
    """A family's model, and where it lies."""

    family: Family
    name: str
    folder: Path
    denoiser: LocalDenoiser

    def layers(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights that a LoRA can change, by diffusers' names."""
        found = getattr(self.theirs(), self.family.component).named_modules()
        return {name: tuple(each.weight.shape) for name, each in found if isinstance(each, nn.Linear | nn.Conv2d)}

    def theirs(self) -> Any:
        return self.family.pipeline.from_pretrained(self.folder)

    def read(self, file: Path) -> Adapter:
        return read_adapter(file.stem, str(file), [self.denoiser.network], [DENOISER])

    def with_weights(self, weights: Mapping[str, Tensor], folder: Path) -> LocalDenoiser:
        """Ours, loaded from other weights of diffusers' denoiser."""
        shutil.copytree(self.folder, folder)
        for shard in (folder / self.family.component).glob("*.safetensors*"):
            shard.unlink()
        file = folder / self.family.component / "diffusion_pytorch_model.safetensors"
        save_file({name: each.contiguous() for name, each in weights.items()}, file)
        return load(self.name, folder)

    def predict(self, denoiser: LocalDenoiser, rows: Sequence[int], adapters: Sequence[tuple[Applied, ...]]) -> Tensor:
        """Of a row for each seed: its latent, timestep and text, with its adapters."""
        prepared = []
        for seed, applied in zip(rows, adapters, strict=True):
            with denoiser.network.with_branches([applied]):
                prepared.append(denoiser.prepare(self._conditioning(denoiser, seed)))
        latents = torch.cat([_random(1, *self.family.latent_shape, seed=seed) for seed in rows])
        with denoiser.network.with_branches(adapters):
            return denoiser.predict(latents, torch.tensor([100.0 + 50 * seed for seed in rows]), prepared)

    def _conditioning(self, denoiser: LocalDenoiser, seed: int) -> PromptConditioning:
        example = denoiser.example_conditioning()
        tensors = {name: _random(*each.shape, seed=seed + 100) for name, each in example.items()}
        shape = self.family.latent_shape
        led = denoiser.describe("tiny").denoiser.max_keyframes > 0
        keyframes = Keyframes(_random(1, *shape, seed=seed + 200), (0, 4)) if led else None
        return PromptConditioning(tensors, "conditioning", shape, keyframes=keyframes)


def load(name: str, folder: Path, **component: Any) -> LocalDenoiser:
    """A model of FAMILIES, whose names begin with the registry's."""
    return LOADERS[name.split()[0]](ModelEntry(name="tiny", path=str(folder), denoiser=Component(**component)), CPU)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, name = FAMILIES[request.param], request.param
    folder = family.save(tmp_path_factory.mktemp(name) / "model")
    return Model(family, name, folder, load(name, folder))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def assert_close(ours: Tensor, expected: Tensor, limit: float = 1e-4) -> None:
    assert float((ours - expected).abs().max() / expected.abs().max()) < limit


def test_a_lora_of_every_layer_equals_diffusers(model: Model, tmp_path: Path) -> None:
    named = {f"{model.family.component}.{name}": shape for name, shape in model.layers().items()}
    file = save(dotted(named, rank=3), tmp_path / "lora.safetensors")
    adapter = model.read(file)
    assert (adapter.match.layout, adapter.match.matched, adapter.match.unmatched) == ("diffusers", 2 * len(named), ())
    theirs = model.theirs()
    with torch.inference_mode(False):
        theirs.load_lora_weights(str(file))
        theirs.fuse_lora(lora_scale=0.5)
        theirs.unload_lora_weights()
    weights = getattr(theirs, model.family.component).state_dict()
    expected = model.predict(model.with_weights(weights, tmp_path / "changed"), [0, 1], [(), ()])
    plain = model.predict(model.denoiser, [0, 1], [(), ()])
    applied = (Applied(adapter, 0.5),)
    assert float((plain - expected).abs().max() / expected.abs().max()) > 0.05
    assert_close(model.predict(model.denoiser, [0, 1], [applied, applied]), expected)
    network = model.denoiser.network.module
    with fuse(network, DENOISER, applied).in_place(network):
        assert_close(model.predict(model.denoiser, [0, 1], [(), ()]), expected)
    assert torch.equal(model.predict(model.denoiser, [0, 1], [(), ()]), plain)


def test_four_rows_with_four_sets_equal_the_four_alone(model: Model, tmp_path: Path) -> None:
    layers = {f"{model.family.component}.{name}": shape for name, shape in model.layers().items()}
    one, other = (model.read(save(dotted(layers, seed=seed), tmp_path / f"{seed}.safetensors")) for seed in (0, 10_000))
    sets: list[tuple[Applied, ...]] = [
        (Applied(one, 0.4),),
        (),
        (Applied(one, 0.2), Applied(other, -0.3)),
        (Applied(other, 0.5),),
    ]
    together = model.predict(model.denoiser, range(4), sets)
    for row, applied in enumerate(sets):
        assert_close(together[row : row + 1], model.predict(model.denoiser, [row], [applied]))
    assert float((together[0] - model.predict(model.denoiser, [0], [()])[0]).abs().max()) > 0.01


def save_every_kind(model: Model, folder: Path) -> Path:
    """A LoRA of every layer, of all kinds."""
    named = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in model.layers().items()}
    return save(of_every_kind(named), folder / "lora.safetensors")


def predict_with(model: Model, denoiser: LocalDenoiser, file: Path) -> Tensor:
    """Of two rows, of which the second applies the LoRA."""
    adapter = read_adapter("a", str(file), [denoiser.network], [DENOISER])
    assert not adapter.match.unmatched
    return model.predict(denoiser, [0, 1], [(), (Applied(adapter, 0.5),)])


def test_a_lora_beside_weights_that_stream_is_what_it_is_beside_others(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_every_kind(model, tmp_path)
    expected = predict_with(model, model.denoiser, file)
    monkeypatch.setattr(Placement, "offloads", True)
    budget = sum(each.nbytes for each in model.denoiser.network.module.parameters()) // 2
    streaming = load(model.name, model.folder, memory_budget=budget)
    assert_close(predict_with(model, streaming, file), expected, 1e-5)
    assert_close(predict_with(model, streaming, file), expected, 1e-5)


def test_a_lora_beside_weights_in_eight_bits_is_what_it_is_beside_what_they_stand_for(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "bfloat16_is_fast", lambda: False)  # so that float32 is computed in
    file = save_every_kind(model, tmp_path)
    stored, plain = (load(model.name, model.folder, dtype="float8_e4m3fn") for _ in range(2))
    layers = [layer for layer in plain.network.module.modules() if is_stored_as_float8(layer)]
    assert len(layers) > 3
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    assert_close(predict_with(model, stored, file), predict_with(model, plain, file), 1e-5)


# A layer by its names: diffusers', and the original checkpoint's, which most LoRAs of the family are trained on.
ORIGINAL_NAMES = {
    "sd15": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "middle_block.1.transformer_blocks.0.attn2.to_k",
    ),
    "sdxl": ("up_blocks.0.resnets.0.conv1", "output_blocks.0.0.in_layers.2"),
    "flux": ("transformer_blocks.1.ff.net.0.proj", "double_blocks.1.img_mlp.0"),
    "wan": ("blocks.1.ffn.net.0.proj", "blocks.1.ffn.0"),
    "wan i2v": ("blocks.1.attn2.add_k_proj", "blocks.1.cross_attn.k_img"),
}
NAMES: dict[str, Callable[[str, str], str]] = {
    "kohya, as in the original": lambda theirs, original: f"lora_unet_{original.replace('.', '_')}",
    "kohya, as in diffusers": lambda theirs, original: f"lora_unet_{theirs.replace('.', '_')}",
}
DOTTED_NAMES: dict[str, Callable[[str, str], str]] = {
    "peft": lambda theirs, original: f"base_model.model.{theirs}",
    "comfyui": lambda theirs, original: f"diffusion_model.{original}",
    "bare": lambda theirs, original: theirs,
}


@pytest.mark.parametrize("layout", [*NAMES, *DOTTED_NAMES])
def test_one_change_is_the_same_by_all_its_names(model: Model, layout: str, tmp_path: Path) -> None:
    theirs, original = ORIGINAL_NAMES[model.name]
    shape = model.layers()[theirs]
    usual = model.read(save(dotted({f"{model.family.component}.{theirs}": shape}), tmp_path / "usual.safetensors"))
    tensors = (
        kohya({NAMES[layout](theirs, original): shape}, alpha=None)
        if layout in NAMES
        else dotted({DOTTED_NAMES[layout](theirs, original): shape})
    )
    adapter = model.read(save(tensors, tmp_path / "lora.safetensors"))
    assert adapter.match.layout == layout.split(",")[0]
    expected = model.predict(model.denoiser, [0], [(Applied(usual, 1.0),)])
    assert torch.equal(model.predict(model.denoiser, [0], [(Applied(adapter, 1.0),)]), expected)


@pytest.mark.parametrize("model", ["sdxl", "flux", "wan"], indirect=True)
def test_a_difference_of_a_bias_is_a_changed_bias(model: Model, tmp_path: Path) -> None:
    theirs, original = ORIGINAL_NAMES[model.name]
    difference = random_tensor(model.layers()[theirs][0], seed=0)
    adapter = model.read(save({f"diffusion_model.{original}.diff_b": difference}, tmp_path / "lora.safetensors"))
    assert (adapter.match.layout, adapter.match.matched) == ("comfyui", 1)
    weights = dict(getattr(model.theirs(), model.family.component).state_dict())
    weights[f"{theirs}.bias"] = weights[f"{theirs}.bias"] + 0.5 * difference
    expected = model.predict(model.with_weights(weights, tmp_path / "changed"), [0], [()])
    assert_close(model.predict(model.denoiser, [0], [(Applied(adapter, 0.5),)]), expected)
    with pytest.raises(InvalidRequestError, match=r"diff_b is \[3\]; must be"):
        model.read(save({f"diffusion_model.{original}.diff_b": torch.ones(3)}, tmp_path / "short.safetensors"))


WIDTH = 64  # of the tiny FLUX.1
# Fused layers of the original by LoRAs' names, and the layers of diffusers that they are the rows of.
FUSED = {
    "lora_unet_double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "lora_unet_single_blocks_1_linear1": [
        *(f"single_transformer_blocks.1.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.1.proj_mlp",
    ],
    "double_blocks.0.processor.qkv_lora2": [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.1.processor.proj_lora1": ["transformer_blocks.1.attn.to_out.0"],
    "single_blocks.0.processor.qkv_lora": [f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "single_blocks.0.processor.proj_lora": ["single_transformer_blocks.0.proj_out"],
}


@pytest.mark.parametrize("model", ["flux"], indirect=True)
@pytest.mark.parametrize("layer", FUSED)
def test_flux_s_fused_layers_are_changed_by_rows(model: Model, layer: str, tmp_path: Path) -> None:
    layers = model.layers()
    parts = FUSED[layer]
    heights = [layers[part][0] for part in parts]
    shape = (sum(heights), layers[parts[0]][1])
    is_xlabs = "processor" in layer
    tensors = dotted({layer: shape}, "down", "up") if is_xlabs else kohya({layer: shape}, alpha=None)
    adapter = model.read(save(tensors, tmp_path / "lora.safetensors"))
    assert adapter.match.layout == ("xlabs" if is_xlabs else "kohya")
    up, down = (next(each for name, each in tensors.items() if f"{kind}.weight" in name) for kind in ("up", "down"))
    weights = dict(model.theirs().transformer.state_dict())
    for part, change in zip(parts, torch.split(up @ down, heights), strict=True):
        weights[f"{part}.weight"] = weights[f"{part}.weight"] + change
    expected = model.predict(model.with_weights(weights, tmp_path / "changed"), [0], [()])
    assert_close(model.predict(model.denoiser, [0], [(Applied(adapter, 1.0),)]), expected)


@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_diffusers_last_modulation_has_its_halves_exchanged(model: Model, tmp_path: Path) -> None:
    shape = model.layers()["norm_out.linear"]
    ours, theirs = (
        kohya({f"lora_{name}": shape}, alpha=None)
        for name in ("unet_final_layer_adaLN_modulation_1", "transformer_norm_out_linear")
    )
    up = "lora_transformer_norm_out_linear.lora_up.weight"
    theirs[up] = torch.cat(theirs[up].chunk(2)[::-1])
    first, second = (
        model.read(save(tensors, tmp_path / f"{index}.safetensors")) for index, tensors in enumerate((ours, theirs))
    )
    predicted = [model.predict(model.denoiser, [0], [(Applied(each, 1.0),)]) for each in (first, second)]
    assert torch.equal(*predicted)


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another family": (
        lambda file: save(kohya({"lora_unet_blocks_0_cross_attn_k": (8, 8)}), file),
        "fits nothing of the model: it is for another family, with lora_unet_blocks_0_cross_attn_k",
    ),
    "no lora": (
        lambda file: save({"conv_in.weight": torch.zeros(2)}, file),
        "no LoRA of a known layout; it has conv_in",
    ),
    "cut short": (lambda file: _cut_short(file), "is not a whole safetensors file"),
    "missing": (lambda file: file, "does not exist"),
    "pickle": (lambda file: file.with_suffix(".pt"), "is a pickle file"),
}


def _cut_short(file: Path) -> Path:
    save(kohya({"lora_unet_a": (8, 8)}), file)
    file.write_bytes(file.read_bytes()[:-50])
    return file


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_is_refused_with_what_is_wrong(model: Model, bad: str, tmp_path: Path) -> None:
    make, words = BAD_FILES[bad]
    with pytest.raises(InvalidRequestError, match=words) as caught:
        model.read(make(tmp_path / "lora.safetensors"))
    assert [violation.field for violation in caught.value.violations] == ["path"]


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
def test_a_mismatch_of_rank_or_width_names_the_layer(model: Model, tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    wide = save(kohya({layer: (64, 2048)}), tmp_path / "wide.safetensors")
    with pytest.raises(InvalidRequestError, match=rf"{layer}.*2048.*must be .*another model"):
        model.read(wide)
    ragged: Tensors = kohya({layer: (64, 64)})
    ragged[f"{layer}.lora_up.weight"] = torch.zeros(64, 5)
    with pytest.raises(InvalidRequestError, match="for rank 4"):
        model.read(save(ragged, tmp_path / "ragged.safetensors"))


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
def test_the_report_says_what_did_not_match(model: Model, tmp_path: Path) -> None:
    known, unknown = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "lora_unet_nowhere"
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    file = save(kohya({known: (64, 64), unknown: (64, 64), text: (64, 64)}), tmp_path / "lora.safetensors")
    match = model.read(file).match
    assert match.matched == 3
    assert sorted(match.unmatched) == [f"{unknown}.{kind}" for kind in ("alpha", "lora_down.weight", "lora_up.weight")]


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
def test_alphas_come_from_the_header_that_diffusers_writes_or_from_peft_s_config(model: Model, tmp_path: Path) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    plain = model.read(save(dotted({layer: (64, 64)}), tmp_path / "plain.safetensors"))
    options = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 12}}
    header = {"lora_adapter_metadata": json.dumps(options)}
    told = model.read(save(dotted({f"unet.{layer}": (64, 64)}), tmp_path / "told.safetensors", header))
    beside = tmp_path / "peft"
    beside.mkdir()
    (beside / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "use_rslora": True}))
    save(dotted({f"base_model.model.{layer}": (64, 64)}), beside / "adapter_model.safetensors")
    for adapter, scale in ((told, 12 / 4), (model.read(beside), 6 / 2)):
        deltas = [change.delta for each in (adapter, plain) for change in each.changes[DENOISER]]
        told_so, usual = (delta.weight() for delta in deltas if not isinstance(delta, Offset))
        torch.testing.assert_close(told_so, usual * scale)
