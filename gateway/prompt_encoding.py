"""The encoded prompts of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.inputs import IMAGE_EMBEDS
from gateway.stage_encoding import StageEncoding
from safelight.v1.encoder_service_pb2 import EncodedPrompt, EncodeRequest, EncodeResponse
from safelight.v1.work_pb2 import MEDIA_ROLE_IMAGE, MediaInput, StageTiming


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """A request's prompts, encoded.

    positive: the prompt.
    negative: the negative prompt.
    timings: what each encoder spent on them, those that were lost included.
    """

    positive: EncodedPrompt
    negative: EncodedPrompt
    timings: Sequence[StageTiming]


class PromptEncoding(StageEncoding):
    """Encodes the prompt and the negative prompt of a request, each with the pictures that it is told of."""

    async def encode(self) -> EncodedPrompts:
        """The prompts' conditioning.

        Raises:
            SafelightError: the encoder refused the prompts, or no replica could encode them.
        """
        request, lost, attempts = self._request(), list[StageTiming](), self.attempts("encoder")
        response = await attempts.repeat(lambda: self.calls.encode(request, attempts.failed), lost)
        return self._noted(response, lost)

    def _request(self) -> EncodeRequest:
        parameters, pictures = self.plan.images[0], self._pictures()
        return EncodeRequest(
            context=self.plan.context,
            model=parameters.model,
            prompts=[parameters.prompt, parameters.negative_prompt],
            negative_prompts=1,
            clip_skip=parameters.clip_skip,
            adapters=parameters.adapters,
            determinism=self.plan.determinism,
            inputs=[MediaInput(role=MEDIA_ROLE_IMAGE, data=data) for data in pictures],
            width=parameters.width if pictures else 0,
            height=parameters.height if pictures else 0,
        )

    def _pictures(self) -> Sequence[bytes]:
        """The keyframes, if the model is told of them by the encoder, too."""
        return self.plan.inputs.keyframes if IMAGE_EMBEDS in self.plan.model.denoiser.conditioning else ()

    def _noted(self, response: EncodeResponse, lost: Sequence[StageTiming]) -> EncodedPrompts:
        positive, negative = response.prompts
        for prompt in (positive, negative):
            self.refs.extend(named.tensor for named in prompt.conditioning.tensors)
        return EncodedPrompts(positive, negative, [*lost, response.timing])
