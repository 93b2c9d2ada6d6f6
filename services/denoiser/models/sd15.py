"""Stable Diffusion 1.5 as the engine sees it: conditioning in, predictions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from safelight.errors import CheckpointError, InvalidRequestError
from safelight.v1.model_pb2 import DenoiserDescription, ModelDescription
from services.common.manifest import Defaults, ModelEntry
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.models.scheduler_config import scheduler_config, stable_diffusion_sampling
from services.denoiser.models.sd_unet import ContextKV, SDUNet, load_sd_unet, stack_context
from services.denoiser.previews import FILE_NAME, LatentPreviewMap, load_preview_map
from services.denoiser.sampling.model_sampling import ModelSampling
from services.modeling.components import open_component, read_json, resolve_dtype
from services.modeling.wire import DATA_TYPES

PROMPT_EMBEDS = "prompt_embeds"
_LATENT_SIZE_OF_SINGLE_FILES = 64
_USUAL_TOKENS = 77


class SD15Denoiser:
    """An SD1.5 UNet with its noise schedule.

    Args:
        unet: the network, on its device.
        sampling: how its latents are noised, and what takes the noise away.
        fingerprint: of its weights.
        sample_size: default width and height in latent elements.
        defaults: of requests.
        tokens: length of the prompts' embeddings.
        preview_map: from latents to colours; None: no previews.
    """

    def __init__(
        self,
        unet: SDUNet,
        sampling: ModelSampling,
        fingerprint: str,
        sample_size: int,
        defaults: Defaults,
        tokens: int,
        preview_map: LatentPreviewMap | None,
    ) -> None:
        self._unet = unet
        self.sampling = sampling
        self.fingerprint = fingerprint
        self._sample_size = sample_size
        self._defaults = defaults
        self._tokens = tokens
        self.preview_map = preview_map
        parameter = next(unet.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @classmethod
    def load(cls, entry: ModelEntry, device: torch.device) -> SD15Denoiser:
        """Read the UNet of a manifest entry, from either layout, onto the device.

        Raises:
            CheckpointError: the weights are missing, damaged or not of this architecture.
        """
        source = open_component(entry, entry.denoiser, "unet")
        dtype = resolve_dtype(entry.denoiser.dtype, device)
        unet = load_sd_unet(source.checkpoint, source.config, device=device, dtype=dtype)
        sample_size = int((source.config or {}).get("sample_size", _LATENT_SIZE_OF_SINGLE_FILES))
        text_config = read_json(entry.paths[0] / "text_encoder" / "config.json") or {}
        return cls(
            unet,
            stable_diffusion_sampling(scheduler_config(entry)),
            source.checkpoint.fingerprint,
            sample_size,
            entry.defaults,
            tokens=int(text_config.get("max_position_embeddings", _USUAL_TOKENS)),
            preview_map=_preview_map(entry, unet.params.in_channels),
        )

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        denoiser = DenoiserDescription(
            fingerprint=self.fingerprint,
            latent_channels=self._unet.params.in_channels,
            conditioning=[PROMPT_EMBEDS],
            samplers=self.sampling.samplers,
            schedules=list(self.sampling.schedules),
            default_steps=self._defaults.steps,
            default_guidance_scale=self._defaults.guidance_scale,
            default_latent_width=self._sample_size,
            default_latent_height=self._sample_size,
            dtype=DATA_TYPES[self.dtype],
            previews=self.preview_map is not None,
        )
        return ModelDescription(name=name, family="sd15", denoiser=denoiser)

    def example_conditioning(self) -> Mapping[str, Tensor]:
        """`prompt_embeds` of the usual length."""
        return {PROMPT_EMBEDS: torch.zeros(1, self._tokens, self._unet.params.cross_attention_dim)}

    def prepare(self, conditioning: PromptConditioning) -> ContextKV:
        """The keys and values of a prompt's cross-attentions, computed once a request from `prompt_embeds` [1, L, D].

        Raises:
            InvalidRequestError: the tensor is missing or of the wrong shape.
        """
        embeds = conditioning.tensors.get(PROMPT_EMBEDS)
        width = self._unet.params.cross_attention_dim
        if embeds is None or embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[2] != width:
            found = "missing" if embeds is None else f"{list(embeds.shape)}"
            raise InvalidRequestError.of(
                f"{conditioning.field}.{PROMPT_EMBEDS}",
                f"must be a tensor of shape [1, tokens, {width}], is {found}: use this model's own encoder",
            )
        # A copy, in memory that torch has aligned: the rounding of some matrix products follows the alignment.
        return self._unet.project_context(embeds.to(self.device, self.dtype, copy=True))

    def batch_key(self, prepared: ContextKV) -> int:
        """Tokens of the conditioning: rows of one length can share a forward pass."""
        return prepared.shape[1]

    def move(self, prepared: ContextKV, device: torch.device) -> ContextKV:
        """The keys and values on another device."""
        return prepared.to(device)

    def predict(self, latents: Tensor, timesteps: Tensor, rows: Sequence[ContextKV]) -> Tensor:
        """The prediction for each row: latents [B, C, H, W] scaled to unit variance, timesteps [B]."""
        return self._unet(latents.to(self.dtype), timesteps, stack_context(rows))


def _preview_map(entry: ModelEntry, latent_channels: int) -> LatentPreviewMap | None:
    """The map that the manifest names, or the one in the model's folder."""
    if not entry.latent_preview:
        return load_preview_map(entry.paths[0] / FILE_NAME, latent_channels)
    named = load_preview_map(Path(entry.latent_preview), latent_channels)
    if named is None:
        raise CheckpointError(f"model {entry.name!r}: {entry.latent_preview} does not exist: correct latent_preview")
    return named
