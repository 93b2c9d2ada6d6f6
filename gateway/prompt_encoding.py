"""The encoded prompts of a request: made once, shared by all its pictures, made again when they are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.plan import GenerationPlan
from gateway.retry import Attempts
from gateway.stage_calls import StageCallError, StageCalls
from safelight.v1.encoder_service_pb2 import EncodedPrompt, EncodeRequest, EncodeResponse
from safelight.v1.tensor_pb2 import TensorRef
from safelight.v1.work_pb2 import StageTiming
from services.common.metrics import Metrics


@dataclass(frozen=True, eq=False)
class Encoded:
    """A request's prompts, encoded.

    positive: the prompt.
    negative: the negative prompt.
    timings: what each encoder spent on them, those that were lost included.
    """

    positive: EncodedPrompt
    negative: EncodedPrompt
    timings: Sequence[StageTiming]


@dataclass
class PromptEncoding:
    """Encodes the prompt and the negative prompt of a request.

    Args:
        plan: the request.
        calls: the stages.
        metrics: where retries are counted.
        max_attempts: times the encoder is tried.
        refs: the tensors that encoders hold for the request.
    """

    plan: GenerationPlan
    calls: StageCalls
    metrics: Metrics
    max_attempts: int
    refs: list[TensorRef] = field(default_factory=list)
    _encoded: Encoded | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def get(self) -> Encoded:
        """The prompts' conditioning.

        Raises:
            SafelightError: the encoder refused the prompts, or no replica could encode them.
        """
        async with self._lock:
            if self._encoded is None:
                self._encoded = await self._encode()
            return self._encoded

    def drop(self, lost: Encoded) -> None:
        """Forget a response whose tensors are gone, unless another picture has replaced it already."""
        if self._encoded is lost:
            self._encoded = None

    async def _encode(self) -> Encoded:
        request = self._request()
        attempts = Attempts("encoder", self.max_attempts, self.metrics)
        lost: list[StageTiming] = []
        while True:
            try:
                response = await self.calls.encode(request, attempts.failed)
            except StageCallError as failure:
                if failure.loss is not None:
                    lost.append(StageTiming(stage="encoder", replica=failure.replica.address))
                await attempts.recover(failure)
            else:
                return self._noted(response, lost)

    def _request(self) -> EncodeRequest:
        parameters = self.plan.images[0]
        return EncodeRequest(
            context=self.plan.context,
            model=parameters.model,
            prompts=[parameters.prompt, parameters.negative_prompt],
            negative_prompts=1,
            clip_skip=parameters.clip_skip,
            determinism=self.plan.determinism,
        )

    def _noted(self, response: EncodeResponse, lost: Sequence[StageTiming]) -> Encoded:
        positive, negative = response.prompts
        for prompt in (positive, negative):
            self.refs.extend(named.tensor for named in prompt.conditioning.tensors)
        return Encoded(positive, negative, [*lost, response.timing])
