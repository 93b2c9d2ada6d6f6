"""What a diffusers folder's scheduler_config.json says of how its model was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safelight.errors import CheckpointError
from services.common.manifest import ModelEntry
from services.denoiser.sampling.model_sampling import ModelSampling
from services.denoiser.sampling.parameters import NONE_GIVEN
from services.denoiser.sampling.rectified_flow import RectifiedFlow
from services.denoiser.sampling.variance_preserving import VariancePreserving
from services.modeling.components import read_json

_SOLVERS = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "deis", "unipc", "lcm")
STABLE_DIFFUSION_SAMPLERS = ("euler", "euler_ancestral", "heun", "ddim", "ddpm", *_SOLVERS)
_TRAILING = "trailing"  # a schedule by diffusers' name of it
STABLE_DIFFUSION_SCHEDULES = (
    "scaled_linear",
    "karras",
    "exponential",
    "beta",
    "sgm_uniform",
    "ddim",
    _TRAILING,
    "ays",
)
FLOW_SAMPLERS = ("flow_match_euler", "flow_match_heun", *_SOLVERS)

AYS_SD15 = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)
AYS_SDXL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0)

# The model's own value of a parameter of the flow schedules, by diffusers' name of it.
_FLOW_PARAMETERS = {"shift": "shift", "shift_terminal": "shift_terminal"}
_DYNAMIC_PARAMETERS = {
    "base_shift": "base_shift",
    "max_shift": "max_shift",
    "base_image_seq_len": "base_tokens",
    "max_image_seq_len": "max_tokens",
    "shift_terminal": "shift_terminal",
}


def scheduler_config(entry: ModelEntry) -> Mapping[str, Any] | None:
    """The file of a manifest entry; None: it has none, as single files have."""
    return read_json(entry.paths[0] / "scheduler" / "scheduler_config.json")


def stable_diffusion_sampling(
    config: Mapping[str, Any] | None = None, ays_timesteps: tuple[int, ...] = AYS_SD15
) -> ModelSampling:
    """The sampling of Stable Diffusion 1.x, 2.x and XL; config: a scheduler_config.json, None for the usual one.

    The default schedule is the trailing one if the config says so, as those of distilled models do.

    Raises:
        CheckpointError: the model predicts what is not served, or has other betas.
    """
    try:
        noise = VariancePreserving.from_config(config) if config else VariancePreserving()
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"scheduler_config.json: {error}") from error
    first = (_TRAILING,) if (config or {}).get("timestep_spacing") == _TRAILING else ()
    return ModelSampling(
        noise=noise,
        samplers=STABLE_DIFFUSION_SAMPLERS,
        schedules=dict.fromkeys(first + STABLE_DIFFUSION_SCHEDULES, NONE_GIVEN),
        ays_timesteps=ays_timesteps,
    )


def flow_sampling(config: Mapping[str, Any], elements_per_token: int) -> ModelSampling:
    """The sampling of a rectified-flow model by its scheduler_config.json; elements_per_token: see `ModelSampling`.

    The default schedule is the dynamic one if the config says `use_dynamic_shifting`, else the static one.
    """
    static, dynamic = _given(config, _FLOW_PARAMETERS), _given(config, _DYNAMIC_PARAMETERS)
    schedules: dict[str, Mapping[str, float]] = {"flow": static, "flow_dynamic": dynamic}
    if config.get("use_dynamic_shifting"):
        schedules = {"flow_dynamic": dynamic, "flow": static}
    return ModelSampling(
        noise=RectifiedFlow(num_train_timesteps=int(config.get("num_train_timesteps", 1000))),
        samplers=FLOW_SAMPLERS,
        schedules=schedules | dict.fromkeys(("karras", "exponential", "beta"), NONE_GIVEN),
        elements_per_token=elements_per_token,
    )


def _given(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, float]:
    """Our names' values, of those that the config gives."""
    return {ours: float(config[theirs]) for theirs, ours in names.items() if config.get(theirs) is not None}
