"""The pictures that a request leads its film through, as the decoder has encoded them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from services.common.exchange import TensorReader
from services.modeling.wire import read_tensor


@dataclass(frozen=True, eq=False)
class Keyframes:
    """Pictures in their places of a film.

    Args:
        latents: [1, C, T, h, w], float32, of a film that shows them and grey between; on the CPU.
        indices: number, from 0, of the frame that each picture is; rising.
    """

    latents: Tensor
    indices: tuple[int, ...]


async def read_keyframes(reader: TensorReader, request: DenoiseRequest) -> Keyframes | None:
    """The keyframes of a request that `check_denoise` has passed; None: it has none.

    A checkpoint does not hold them: the request that goes on from one brings them again.

    Raises:
        NonFiniteError: they are not finite.
        TensorCorruptError, LeaseExpiredError, StageUnavailableError: see `TensorReader.read`.
    """
    if not request.HasField("keyframe_latents"):
        return None
    latents = await read_tensor(reader, request.keyframe_latents, "keyframe_latents")
    return Keyframes(latents, tuple(request.keyframe_indices))
