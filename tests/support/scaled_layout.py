"""Weights as ComfyUI's "fp8_scaled" files have them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_LARGEST = 448.0


def scaled(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Matrices in eight bits with a scale each, the rest as it is, and the mark of such files; names under prefix."""
    tensors = {f"{prefix}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, weight in weights.items():
        tensors[prefix + name] = weight.clone()
        if weight.ndim == 2 and name.endswith(".weight"):
            scale = weight.float().abs().max() / _LARGEST
            layer = prefix + name.removesuffix(".weight")
            tensors[f"{layer}.weight"] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(())}
    return tensors


def unscaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, in float32, that such tensors stand for."""
    scales = {name.replace("scale_weight", "weight"): each for name, each in tensors.items() if "scale_weight" in name}
    return {
        name: tensor.float() * scales.get(name, torch.ones(()))
        for name, tensor in tensors.items()
        if not name.endswith(("scale_weight", "scale_input", "scaled_fp8"))
    }
