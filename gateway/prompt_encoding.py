"""The encoded prompts of a request: made once, shared by all its pictures, made again when they are lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from gateway.leases import Leases
from gateway.plan import GenerationPlan
from gateway.retry import Attempts
from gateway.stage_calls import StageCallError, StageCalls
from safelight.v1.encoder_service_pb2 import EncodeRequest, EncodeResponse
from services.common.metrics import Metrics


@dataclass
class PromptEncoding:
    """Encodes the prompt and the negative prompt of a request.

    Args:
        plan: the request.
        calls: the stages.
        leases: takes the references of the conditioning.
        metrics: where retries are counted.
        max_attempts: times the encoder is tried.
        limit_seconds: longest time for one call.
    """

    plan: GenerationPlan
    calls: StageCalls
    leases: Leases
    metrics: Metrics
    max_attempts: int
    limit_seconds: float
    _response: EncodeResponse | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def get(self) -> EncodeResponse:
        """The prompt's conditioning and the negative prompt's, in this order.

        Raises:
            SafelightError: the encoder refused the prompts, or no replica could encode them.
        """
        async with self._lock:
            if self._response is None:
                self._response = await self._encode()
                for prompt in self._response.prompts:
                    self.leases.note_conditioning(prompt.conditioning)
            return self._response

    def drop(self, lost: EncodeResponse) -> None:
        """Forget a response whose tensors are gone, unless another picture has replaced it already."""
        if self._response is lost:
            self._response = None

    async def _encode(self) -> EncodeResponse:
        parameters = self.plan.images[0]
        request = EncodeRequest(
            context=self.plan.context,
            model=parameters.model,
            prompts=[parameters.prompt, parameters.negative_prompt],
            clip_skip=parameters.clip_skip,
        )
        attempts = Attempts("encoder", self.max_attempts, self.metrics)
        while True:
            try:
                return await self.calls.encode(request, attempts.failed, self.limit_seconds)
            except StageCallError as failure:
                attempts.note(failure)
