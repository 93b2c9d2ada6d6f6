"""What a request starts from beside noise: a picture's latent, and a mask of what is repainted; or a film's latent."""

from __future__ import annotations

from torch import Tensor

from safelight.errors import InvalidRequestError
from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from safelight.v1.tensor_pb2 import TensorRef
from safelight.v1.work_pb2 import MEDIA_ROLE_IMAGE, MEDIA_ROLE_MASK
from services.common.exchange import TensorReader
from services.denoiser.inpainting import Inpainting
from services.modeling.wire import check_finite, read_tensor

INPUTS = (MEDIA_ROLE_IMAGE, MEDIA_ROLE_MASK)
"""What every model of pictures may start from: noising a picture is all that takes."""


def initial_refs(request: DenoiseRequest) -> list[TensorRef]:
    """The tensors of its picture or film that a request needs: none, if there is a checkpoint and nothing stays."""
    if request.HasField("mask"):
        return [request.initial_latents, request.mask]
    starts = request.HasField("initial_latents") and not request.HasField("resume_from")
    return [request.initial_latents] if starts else []


async def read_initial_latents(reader: TensorReader, request: DenoiseRequest) -> Tensor | None:
    """The picture's latent [1, C, H, W], or the film's [1, C, T, H, W], on the CPU; None: the request does not need it.

    Raises:
        NonFiniteError: it is not finite.
        TensorCorruptError, LeaseExpiredError, StageUnavailableError: see `TensorReader.read`.
    """
    if not initial_refs(request):
        return None
    latents = await read_tensor(reader, request.initial_latents, "initial_latents")
    check_finite(latents, "initial_latents")
    return latents


async def read_inpainting(reader: TensorReader, request: DenoiseRequest, original: Tensor | None) -> Inpainting | None:
    """What stays of the picture, on the CPU; None: nothing does.

    A checkpoint does not hold it: the request that goes on from one brings it again.

    Raises:
        InvalidRequestError: a value of the mask is not from 0 to 1.
        TensorCorruptError, LeaseExpiredError, StageUnavailableError: see `TensorReader.read`.
    """
    if original is None or not request.HasField("mask"):
        return None
    mask = await read_tensor(reader, request.mask, "mask")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise InvalidRequestError.of("mask", "must hold values from 0 to 1; take the mask that the decoder gave")
    return Inpainting(original, mask)
