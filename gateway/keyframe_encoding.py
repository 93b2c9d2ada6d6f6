"""The encoded keyframes of a request: the pictures that its film is led through, in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.stage_encoding import StageEncoding, film_request
from gateway.work import encode_image_work
from safelight.v1.tensor_pb2 import TensorRef
from safelight.v1.work_pb2 import StageTiming


@dataclass(frozen=True, eq=False)
class EncodedKeyframes:
    """A request's keyframes, encoded.

    latents: of a film that shows them and grey between; None: the request has none.
    indices: the number of the frame that each of them is.
    timings: what each decoder spent on them, those that were lost included.
    """

    latents: TensorRef | None = None
    indices: Sequence[int] = ()
    timings: Sequence[StageTiming] = ()


class KeyframeEncoding(StageEncoding):
    """Encodes the keyframes of a request."""

    async def encode(self) -> EncodedKeyframes:
        """The latents of the keyframes, and their places.

        Raises:
            SafelightError: the decoder refused a picture, or no replica could encode them.
        """
        if not self.plan.inputs.keyframes:
            return EncodedKeyframes()
        attempts, lost = self.attempts("decoder"), list[StageTiming]()
        request = film_request(self.plan, keyframes=self.plan.inputs.keyframes)
        work = encode_image_work(self.plan.model.name, self.plan.latent_shape)
        response = await attempts.repeat(lambda: self.calls.encode_film(request, work, attempts.failed), lost)
        self.refs.append(response.latents)
        return EncodedKeyframes(response.latents, response.keyframe_indices, [*lost, response.timing])
