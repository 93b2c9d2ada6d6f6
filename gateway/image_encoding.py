"""The encoded input picture of a request, and its mask at the latent's size; or its encoded film."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.retry import Attempts
from gateway.stage_encoding import StageEncoding, film_request
from gateway.work import Work, encode_image_work
from safelight.v1.decoder_service_pb2 import EncodeImageRequest
from safelight.v1.tensor_pb2 import TensorRef
from safelight.v1.work_pb2 import StageTiming


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A request's input picture or film, encoded.

    latents: of the picture or film; None: the request has none.
    mask: what of it is repainted; None: the request has no mask.
    timings: what each decoder spent on them, those that were lost included.
    """

    latents: TensorRef | None = None
    mask: TensorRef | None = None
    timings: Sequence[StageTiming] = ()


class ImageEncoding(StageEncoding):
    """Encodes the input picture, or the film, of a request."""

    async def encode(self) -> EncodedImage:
        """The latent of the picture or film that the request starts from.

        Raises:
            SafelightError: the decoder refused the file, or no replica could encode it.
        """
        if not self.plan.inputs.start:
            return EncodedImage()
        attempts, lost = self.attempts("decoder"), list[StageTiming]()
        encoded = await (self._film(attempts, lost) if self.plan.inputs.film else self._image(attempts, lost))
        self.refs.extend(ref for ref in (encoded.latents, encoded.mask) if ref is not None)
        return encoded

    async def _image(self, attempts: Attempts, lost: list[StageTiming]) -> EncodedImage:
        request, work = self._image_request(), self._work()
        response = await attempts.repeat(lambda: self.calls.encode_image(request, work, attempts.failed), lost)
        mask = response.mask if response.HasField("mask") else None
        return EncodedImage(response.latents, mask, [*lost, response.timing])

    async def _film(self, attempts: Attempts, lost: list[StageTiming]) -> EncodedImage:
        request, work = film_request(self.plan, film=self.plan.inputs.film), self._work()
        response = await attempts.repeat(lambda: self.calls.encode_film(request, work, attempts.failed), lost)
        return EncodedImage(response.latents, timings=[*lost, response.timing])

    def _work(self) -> Work:
        return encode_image_work(self.plan.model.name, self.plan.latent_shape)

    def _image_request(self) -> EncodeImageRequest:
        parameters = self.plan.images[0]
        return EncodeImageRequest(
            context=self.plan.context,
            model=parameters.model,
            image=self.plan.inputs.image,
            mask=self.plan.inputs.mask,
            width=parameters.width,
            height=parameters.height,
        )
