"""Transformers whose weights the ranks of a group share equal those of one process, from every layout, with LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from diffusers import FluxTransformer2DModel, ModelMixin, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.errors import CheckpointError
from services.common.parallel_degrees import ParallelDegrees
from services.modeling.parallel.mesh import ONE_RANK_MESH, Axis, ParallelMesh
from tests.support.flux_layout import original_flux_tensors
from tests.support.gguf_layout import save_gguf
from tests.support.lora_files import kohya, random_tensor, save
from tests.support.ranks import on_ranks
from tests.support.shared_dits import Case, Outcome, compute_all, compute_all_by, load
from tests.support.wan_layout import save_original_dit

HEADS = 4
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.03}
FILE = "diffusion_pytorch_model.safetensors"
# And whether only the plain models are computed so, for the sake of time.
DEGREES = {
    "4 by tensor": (ParallelDegrees(tensor=4), False),
    "2 by tensor, 2 by cfg": (ParallelDegrees(tensor=2, cfg=2), True),
    "2 by ring, 2 by ulysses, fsdp": (ParallelDegrees(ring=2, ulysses=2, fsdp=True), False),
}


def _flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )


def _wan(head_width: int, **options: object) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=head_width, text_dim=32, ffn_dim=64, num_layers=1, **options
    )


MODELS: dict[str, tuple[str, Callable[[], ModelMixin]]] = {
    "flux": ("flux", _flux),
    "wan": ("wan", lambda: _wan(12)),
    "wide wan": ("wan", lambda: _wan(128)),  # no shape of an original file tells the width of a head
    "wan from pictures": (
        "wan",
        lambda: _wan(12, in_channels=36, image_dim=40, added_kv_proj_dim=HEADS * 12),
    ),
}


def _saved(name: str, folder: Path) -> Case:
    torch.manual_seed(0)
    family, make = MODELS[name]
    model = make()
    for parameter_name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm_" in parameter_name), std=0.1)
    model.save_pretrained(folder)
    return Case(family, folder, dict(model.config))


def _low_rank_of_two(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    height, width = shape
    return {
        "hada_w1_a": random_tensor(height, 2, seed=seed),
        "hada_w1_b": random_tensor(2, width, seed=seed + 1),
        "hada_w2_a": random_tensor(height, 2, seed=seed + 2),
        "hada_w2_b": random_tensor(2, width, seed=seed + 3),
    }


def _kronecker(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    return {
        "lokr_w1": random_tensor(4, 2, seed=seed),
        "lokr_w2": random_tensor(shape[0] // 4, shape[1] // 2, seed=seed + 1),
    }


def _lora(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    tensors = kohya({"": shape}, seed=seed)
    return {name.removeprefix("."): tensor for name, tensor in tensors.items()}


def _decomposed(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    return _lora(shape, seed) | {"dora_scale": random_tensor(shape[0], 1, seed=seed + 2).abs() + 1}


def _with_biases(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    return _lora(shape, seed) | {"diff_b": random_tensor(shape[0], seed=seed + 2)}


LORA_KINDS: dict[str, Callable[[tuple[int, ...], int], dict[str, Tensor]]] = {
    "lora": _lora,
    "loha": _low_rank_of_two,
    "lokr": _kronecker,
    "dora": _decomposed,
    "biases": _with_biases,
}


def _matrices(case: Case) -> dict[str, tuple[int, ...]]:
    """The linear layers of a diffusers folder, by its names."""
    tensors = load_file(case.path / FILE)
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2
    }


def _lora_file(kind: str, layers: Mapping[str, tuple[int, ...]], file: Path) -> Path:
    tensors = {
        f"lora_unet_{layer.replace('.', '_')}.{role}": tensor
        for index, (layer, shape) in enumerate(layers.items())
        for role, tensor in LORA_KINDS[kind](shape, 10 * index).items()
    }
    return save(tensors, file)


def _with_loras(case: Case, folder: Path, name: str) -> dict[str, Case]:
    layers = _matrices(case)
    return {
        f"{name} with {kind}": Case(
            case.family, case.path, case.config, lora=_lora_file(kind, layers, folder / f"{name}-{kind}.safetensors")
        )
        for kind in LORA_KINDS
    }


def _other_layouts(flux: Case, wan: Case, folder: Path) -> dict[str, Case]:
    tensors = load_file(flux.path / FILE)
    original = {name: tensor.contiguous() for name, tensor in original_flux_tensors(tensors).items()}
    save_file(original, folder / "flux.safetensors")
    eight_bits = {
        name: each.to(torch.float8_e4m3fn if each.ndim == 2 else each.dtype) for name, each in original.items()
    }
    save_file(eight_bits, folder / "flux8.safetensors")
    save_gguf(folder / "flux.gguf", original, gguf.GGMLQuantizationType.Q8_0)
    save_original_dit(wan.path, _names_of(wan), folder / "wan.safetensors")
    fused = {f"double_blocks.{block}.img_attn.qkv": (3 * 128, 128) for block in range(1)} | {
        "single_blocks.0.linear1": (7 * 128, 128)
    }
    return {
        "flux's original layout": Case("flux", folder / "flux.safetensors"),
        "flux in eight bits": Case("flux", folder / "flux8.safetensors"),
        "flux kept in eight bits": Case("flux", folder / "flux8.safetensors", float8=True),
        "flux stored in eight bits": Case("flux", folder / "flux.safetensors", float8=True),
        "flux in gguf": Case("flux", folder / "flux.gguf"),
        "wan's original layout": Case("wan", folder / "wan.safetensors"),
        "flux with a lora of fused layers": Case(
            "flux", folder / "flux.safetensors", lora=_lora_file("lora", fused, folder / "fused.safetensors")
        ),
    }


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _names_of(case: Case) -> list[str]:
    """The parameters of our network."""
    return list(load(ONE_RANK_MESH, case)[0].network.state_dict())


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("shared")
    models = {name: _saved(name, folder / name) for name in MODELS}
    loras = {
        name: each for model in ("flux", "wan") for name, each in _with_loras(models[model], folder, model).items()
    }
    fused = {
        f"{model} with a fused lora": Case(
            models[model].family,
            models[model].path,
            models[model].config,
            lora=loras[f"{model} with lora"].lora,
            fused=True,
        )
        for model in ("flux", "wan")
    }
    halves = {f"{model}, in half": replace(models[model], dtype=torch.bfloat16) for model in ("flux", "wan")}
    return models | halves | loras | fused | _other_layouts(models["flux"], models["wide wan"], folder)


@pytest.fixture(scope="module")
def alone(cases: dict[str, Case]) -> dict[str, Outcome]:
    """What one process makes of each case."""
    return compute_all(ONE_RANK_MESH, cases)


@pytest.fixture(scope="module")
def shared(cases: dict[str, Case]) -> dict[str, list[dict[str, Outcome]]]:
    """What each rank makes of the cases, in one group of processes for all degrees."""
    work = [(degrees, {name: cases[name] for name in (MODELS if few else cases)}) for degrees, few in DEGREES.values()]
    ranks = on_ranks(work[0][0], compute_all_by, work)
    return {name: [outcomes[index] for outcomes in ranks] for index, name in enumerate(DEGREES)}


@pytest.mark.parametrize("degrees", DEGREES)
def test_shared_weights_compute_what_one_process_does(
    cases: dict[str, Case], alone: dict[str, Outcome], shared: dict[str, list[dict[str, Outcome]]], degrees: str
) -> None:
    errors = {
        (name, rank): _relative_error(ours.velocity, alone[name].velocity)
        for rank, outcomes in enumerate(shared[degrees])
        for name, ours in outcomes.items()
    }
    assert {key: error for key, error in errors.items() if not error < TOLERANCES[cases[key[0]].dtype]} == {}


def test_reports_of_loras_are_those_of_whole_layers(
    alone: dict[str, Outcome], shared: dict[str, list[dict[str, Outcome]]]
) -> None:
    ranks = [outcomes for ranks in shared.values() for outcomes in ranks]
    assert all(ours.matched == alone[name].matched for outcomes in ranks for name, ours in outcomes.items())


def test_a_rank_holds_its_share_and_two_blocks(
    alone: dict[str, Outcome], shared: dict[str, list[dict[str, Outcome]]]
) -> None:
    for outcomes in shared["2 by ring, 2 by ulysses, fsdp"]:
        for name, ours in outcomes.items():
            share = alone[name].resident_bytes / 4
            assert share < ours.peak_bytes < 1.1 * (share + 2 * max(alone[name].block_bytes)), name


def test_a_lora_changes_what_it_is_compared_with(alone: dict[str, Outcome]) -> None:
    changed = [name for name in alone if " with " in name]
    assert len(changed) > 2 * len(LORA_KINDS)
    for name in changed:
        plain = alone[name.partition(" with ")[0]]
        assert _relative_error(alone[name].velocity[:1], plain.velocity[:1]) > 0.02, name


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_heads_that_ranks_can_t_share_are_refused(cases: dict[str, Case], name: str) -> None:
    mesh = ParallelMesh(tensor=Axis(0, 3))
    with pytest.raises(CheckpointError, match="of 4 heads can't be shared by 3 ranks"):
        load(mesh, cases[name])
