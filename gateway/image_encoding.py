"""The encoded input picture of a request, and its mask at the latent's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.plan import GenerationPlan
from gateway.retry import Attempts
from gateway.stage_calls import StageCalls
from gateway.work import encode_image_work
from safelight.v1.decoder_service_pb2 import EncodeImageRequest
from safelight.v1.tensor_pb2 import TensorRef
from safelight.v1.work_pb2 import StageTiming
from services.common.metrics import Metrics


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A request's input picture, encoded.

    latents: of the picture; None: the request has none.
    mask: what of it is repainted; None: the request has no mask.
    timings: what each decoder spent on them, those that were lost included.
    """

    latents: TensorRef | None = None
    mask: TensorRef | None = None
    timings: Sequence[StageTiming] = ()


@dataclass
class ImageEncoding:
    """Encodes the input picture of a request.

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

    async def encode(self) -> EncodedImage:
        """The latent of the picture that the request starts from.

        Raises:
            SafelightError: the decoder refused the picture, or no replica could encode it.
        """
        if not self.plan.inputs.image:
            return EncodedImage()
        request, lost = self._request(), list[StageTiming]()
        attempts = Attempts("decoder", self.max_attempts, self.metrics)
        work = encode_image_work(request.model, self.plan.latent_shape)
        response = await attempts.repeat(lambda: self.calls.encode_image(request, work, attempts.failed), lost)
        mask = response.mask if response.HasField("mask") else None
        self.refs.extend([response.latents, *([mask] if mask else [])])
        return EncodedImage(response.latents, mask, [*lost, response.timing])

    def _request(self) -> EncodeImageRequest:
        parameters = self.plan.images[0]
        return EncodeImageRequest(
            context=self.plan.context,
            model=parameters.model,
            image=self.plan.inputs.image,
            mask=self.plan.inputs.mask,
            width=parameters.width,
            height=parameters.height,
        )
