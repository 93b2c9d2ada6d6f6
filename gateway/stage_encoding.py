"""What the encodings of a request's inputs have in common, whichever stage does them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.plan import GenerationPlan
from gateway.retry import Attempts
from gateway.stage_calls import StageCalls
from safelight.v1.decoder_service_pb2 import EncodeFilmRequest
from safelight.v1.tensor_pb2 import TensorRef
from services.common.metrics import Metrics


@dataclass
class StageEncoding:
    """Some of a request's inputs, to be encoded by a stage.

    Args:
        plan: the request.
        calls: the stages.
        metrics: where retries are counted.
        max_attempts: times a stage is tried.
        refs: the tensors that its replicas hold for the request.
    """

    plan: GenerationPlan
    calls: StageCalls
    metrics: Metrics
    max_attempts: int
    refs: list[TensorRef] = field(default_factory=list)

    def attempts(self, stage: str) -> Attempts:
        """The tries of one call."""
        return Attempts(stage, self.max_attempts, self.metrics)


def film_request(plan: GenerationPlan, *, film: bytes = b"", keyframes: Sequence[bytes] = ()) -> EncodeFilmRequest:
    """What a decoder is asked that encodes a film, or keyframes, at the size and length of the request's own."""
    parameters = plan.images[0]
    return EncodeFilmRequest(
        context=plan.context,
        model=parameters.model,
        film=film,
        keyframes=keyframes,
        width=parameters.width,
        height=parameters.height,
        num_frames=parameters.num_frames,
    )
