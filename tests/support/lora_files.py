"""LoRA files of random numbers for small models, in the layouts that are in use."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def random_tensor(*shape: int, seed: int) -> Tensor:
    """Large enough for a change that every test sees, small enough for a network to stay calm."""
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(shape: tuple[int, ...], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """down and up for a weight [out, in, *kernel], the second one a convolution's where the weight is."""
    down = random_tensor(rank, *shape[1:], seed=seed)
    up = random_tensor(shape[0], rank, *[1] * (len(shape) - 2), seed=seed + 1)
    return down, up


def kohya(layers: Mapping[str, tuple[int, ...]], *, rank: int = 4, alpha: float | None = 2.0, seed: int = 0) -> Tensors:
    """lora_unet_<layer>.lora_down.weight …; layers: shapes by the names with prefix."""
    tensors: Tensors = {}
    for index, (layer, shape) in enumerate(layers.items()):
        down, up = low_rank(shape, rank, seed + 10 * index)
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def dotted(
    layers: Mapping[str, tuple[int, ...]], down: str = "lora_A", up: str = "lora_B", *, rank: int = 4, seed: int = 0
) -> Tensors:
    """<layer>.lora_A.weight and <layer>.lora_B.weight, or other words for them."""
    tensors: Tensors = {}
    for index, (layer, shape) in enumerate(layers.items()):
        matrices = low_rank(shape, rank, seed + 10 * index)
        tensors |= {f"{layer}.{word}.weight": each for word, each in zip((down, up), matrices, strict=True)}
    return tensors


def of_every_kind(layers: Mapping[str, tuple[int, ...]]) -> Tensors:
    """kohya's names: LoRA, DoRA, LoHa and LoKr in turns, and biases; layers: shapes by the names with prefix."""
    tensors: Tensors = {}
    for index, (layer, shape) in enumerate(layers.items()):
        kind = (_lora, _dora, _loha, _lokr)[index % 4]
        tensors |= {f"{layer}.{role}": tensor for role, tensor in kind(shape, 100 * index).items()}
        tensors[f"{layer}.diff_b"] = random_tensor(shape[0], seed=100 * index + 50)
    return tensors


def _lora(shape: tuple[int, ...], seed: int) -> Tensors:
    down, up = low_rank(shape, 4, seed)
    return {"lora_down.weight": down, "lora_up.weight": up}


def _dora(shape: tuple[int, ...], seed: int) -> Tensors:
    lengths = 1.0 + random_tensor(shape[0], *[1] * (len(shape) - 1), seed=seed + 2)
    return {**_lora(shape, seed), "dora_scale": lengths}


def _loha(shape: tuple[int, ...], seed: int) -> Tensors:
    width = prod(shape[1:])
    halves = {"a": (shape[0], 2), "b": (2, width)}
    names = [f"hada_w{number}_{half}" for number in (1, 2) for half in halves]
    return {name: random_tensor(*halves[name[-1]], seed=seed + place) for place, name in enumerate(names)}


def _lokr(shape: tuple[int, ...], seed: int) -> Tensors:
    left = (gcd(shape[0], 2), gcd(shape[1], 2))
    right = (shape[0] // left[0], shape[1] // left[1], *shape[2:])
    return {"lokr_w1": random_tensor(*left, seed=seed), "lokr_w2": random_tensor(*right, seed=seed + 1)}


def save(tensors: Tensors, file: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, dict(metadata or {}))
    return file
