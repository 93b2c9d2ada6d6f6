"""What all pictures of a request are made from, encoded at once: its prompts, what it starts from, its keyframes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.image_encoding import EncodedImage, ImageEncoding
from gateway.keyframe_encoding import EncodedKeyframes, KeyframeEncoding
from gateway.plan import GenerationPlan
from gateway.prompt_encoding import EncodedPrompts, PromptEncoding
from gateway.stage_calls import StageCalls
from gateway.tasks import ending
from safelight.v1.tensor_pb2 import TensorRef
from safelight.v1.work_pb2 import StageTiming
from services.common.metrics import Metrics


@dataclass(frozen=True, eq=False)
class EncodedInputs:
    """A request's inputs, encoded.

    prompts: its prompts.
    image: the picture that it starts from.
    keyframes: the pictures that its film is led through.
    timings: what each replica spent on them, those that were lost included.
    """

    prompts: EncodedPrompts
    image: EncodedImage
    keyframes: EncodedKeyframes
    timings: Sequence[StageTiming]


class InputEncoding:
    """Encodes the inputs of a request.

    Args:
        plan: the request.
        calls: the stages.
        metrics: where retries are counted.
        max_attempts: times a stage is tried.
    """

    def __init__(self, plan: GenerationPlan, calls: StageCalls, metrics: Metrics, max_attempts: int) -> None:
        self._prompts = PromptEncoding(plan, calls, metrics, max_attempts)
        self._image = ImageEncoding(plan, calls, metrics, max_attempts)
        self._keyframes = KeyframeEncoding(plan, calls, metrics, max_attempts)

    @property
    def refs(self) -> list[TensorRef]:
        """The tensors that stages hold for the request."""
        return self._prompts.refs + self._image.refs + self._keyframes.refs

    async def encode(self) -> EncodedInputs:
        """All of them at once; the first that fails ends the others.

        Raises:
            SafelightError: a stage refused one of them, or no replica could encode it.
        """
        prompts = asyncio.create_task(self._prompts.encode())
        image = asyncio.create_task(self._image.encode())
        keyframes = asyncio.create_task(self._keyframes.encode())
        async with ending(prompts, image, keyframes):
            encoded = await asyncio.gather(prompts, image, keyframes)
        return EncodedInputs(*encoded, [timing for each in encoded for timing in each.timings])
