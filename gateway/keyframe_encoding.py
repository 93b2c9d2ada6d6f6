"""The encoded keyframes of a request: the pictures that its film is led through, in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.plan import GenerationPlan
from gateway.retry import Attempts
from gateway.stage_calls import StageCalls
from gateway.work import encode_image_work
from safelight.v1.decoder_service_pb2 import EncodeFilmRequest
from safelight.v1.tensor_pb2 import TensorRef
from safelight.v1.work_pb2 import StageTiming
from services.common.metrics import Metrics


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


@dataclass
class KeyframeEncoding:
    """Encodes the keyframes of a request.

    Args:
        plan: the request.
        calls: the stages.
        metrics: where retries are counted.
        max_attempts: times a decoder is tried.
        refs: the tensors that decoders hold for the request.
    """

    plan: GenerationPlan
    calls: StageCalls
    metrics: Metrics
    max_attempts: int
    refs: list[TensorRef] = field(default_factory=list)

    async def encode(self) -> EncodedKeyframes:
        """The latents of the keyframes, and their places.

        Raises:
            SafelightError: the decoder refused a picture, or no replica could encode them.
        """
        if not self.plan.inputs.keyframes:
            return EncodedKeyframes()
        attempts, lost = Attempts("decoder", self.max_attempts, self.metrics), list[StageTiming]()
        request, work = self._request(), encode_image_work(self.plan.model.name, self.plan.latent_shape)
        response = await attempts.repeat(lambda: self.calls.encode_film(request, work, attempts.failed), lost)
        self.refs.append(response.latents)
        return EncodedKeyframes(response.latents, response.keyframe_indices, [*lost, response.timing])

    def _request(self) -> EncodeFilmRequest:
        parameters = self.plan.images[0]
        return EncodeFilmRequest(
            context=self.plan.context,
            model=parameters.model,
            keyframes=self.plan.inputs.keyframes,
            width=parameters.width,
            height=parameters.height,
            num_frames=parameters.num_frames,
        )
