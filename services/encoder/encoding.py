"""The life of one encode request: check, tokenize, look in the cache, compute the rest in batches, hand off."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from safelight.v1 import encoder_service_pb2 as pb
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.tensor_pb2 import Conditioning, NamedTensor
from safelight.v1.work_pb2 import DETERMINISM_CLASS_EXACT, StageTiming
from services.common.batch_costs import WorkKind
from services.common.batching import Batcher
from services.common.exchange import TensorStore
from services.common.executor import DeviceExecutor
from services.common.fingerprints import check_own_fingerprint
from services.common.metrics import Metrics
from services.common.model_servicer import find_model
from services.encoder.embedding_cache import EmbeddingCache, EmbeddingKey
from services.encoder.registry import PromptEncoder
from services.encoder.tokenization import TokenizedPrompt
from services.encoder.validation import check_encode
from services.modeling.lora.adapter import Applied, set_key
from services.modeling.lora.library import AdapterLibrary
from services.modeling.wire import TorchPayload, make_header

_LAYOUTS = {2: "BD", 3: "BLD"}
_CACHE = "embeddings"

ConditioningTensors = Mapping[str, Tensor]


class PromptJob(NamedTuple):
    """A prompt to encode, by networks with adapters.

    alone: in a batch of its own, so that company never changes a bit.
    """

    model: str
    prompt: TokenizedPrompt
    clip_skip: int
    alone: bool
    adapters: tuple[Applied, ...] = ()


PromptBatcher = Batcher[PromptJob, ConditioningTensors]


@dataclass(frozen=True)
class _Encoded:
    """A prompt's conditioning, where it came from and what it cost."""

    tensors: ConditioningTensors
    cached: bool
    queue_seconds: float
    compute_seconds: float


@dataclass(frozen=True)
class Encoding:
    """Runs requests against the batcher that all of them share."""

    encoders: Mapping[str, PromptEncoder]
    batcher: PromptBatcher
    executor: DeviceExecutor
    cache: EmbeddingCache
    store: TensorStore
    metrics: Metrics
    models: dict[str, ModelDescription]
    library: AdapterLibrary

    async def encode(self, request: pb.EncodeRequest) -> pb.EncodeResponse:
        """The conditioning of every prompt, in order.

        Raises:
            SafelightError: of the kinds that EncoderService.Encode documents.
        """
        description = find_model(self.models, request.model).encoder
        check_encode(request, description)
        check_own_fingerprint(request.context, "encoder", description.fingerprint)
        clip_skip = request.clip_skip or description.default_clip_skip
        encoder = self.encoders[request.model]
        adapters = tuple(applied for applied in self.library.find(request.model, request.adapters) if applied.changes)
        tokenized = await self.executor.run(lambda: _tokenize(encoder, request))
        alone = request.determinism == DETERMINISM_CLASS_EXACT
        jobs = [PromptJob(request.model, prompt, clip_skip, alone, adapters) for prompt in tokenized]
        encoded = await asyncio.gather(*map(self._encode_prompt, jobs))
        prompts = [await self._pack(job, result) for job, result in zip(jobs, encoded, strict=True)]
        return pb.EncodeResponse(prompts=prompts, timing=self._timing(request.model, encoded))

    async def _encode_prompt(self, job: PromptJob) -> _Encoded:
        fingerprint = self.encoders[job.model].fingerprint
        key = EmbeddingKey(fingerprint, job.prompt.ids, job.clip_skip, job.alone, set_key(job.adapters))
        cached = self.cache.get(key)
        if cached is not None:
            self.metrics.cache_hits.labels(_CACHE).inc()
            return _Encoded(cached, True, 0.0, 0.0)
        self.metrics.cache_misses.labels(_CACHE).inc()
        batch_key = object() if job.alone else job.clip_skip
        tensors, queued, computed = await self.batcher.submit(job, WorkKind(job.model), batch_key)
        self.cache.put(key, tensors)
        self.metrics.cache_bytes.labels(_CACHE).set(self.cache.bytes)
        return _Encoded(tensors, False, queued, computed)

    async def _pack(self, job: PromptJob, encoded: _Encoded) -> pb.EncodedPrompt:
        fingerprint = self.encoders[job.model].fingerprint
        tensors = [
            NamedTensor(
                name=name,
                tensor=await self.store.put(
                    make_header(tensor, _LAYOUTS[tensor.ndim], fingerprint), TorchPayload(tensor)
                ),
            )
            for name, tensor in encoded.tensors.items()
        ]
        return pb.EncodedPrompt(
            conditioning=Conditioning(tensors=tensors),
            token_count=job.prompt.token_count,
            truncated_text=job.prompt.cut_off,
            cached=encoded.cached,
        )

    def _timing(self, model: str, encoded: Sequence[_Encoded]) -> StageTiming:
        """The request's time is that of its slowest prompt: they share batches."""
        queued = max(each.queue_seconds for each in encoded)
        computed = max(each.compute_seconds for each in encoded)
        self.metrics.queue_seconds.labels("encoder").observe(queued)
        self.metrics.stage_seconds.labels("encoder", model).observe(computed)
        return StageTiming(stage="encoder", queue_seconds=queued, compute_seconds=computed)


def _tokenize(encoder: PromptEncoder, request: pb.EncodeRequest) -> list[TokenizedPrompt]:
    """Each prompt's tokens; the last `negative_prompts` of them are negative ones."""
    first_negative = len(request.prompts) - request.negative_prompts
    return [encoder.tokenize(prompt, negative=index >= first_negative) for index, prompt in enumerate(request.prompts)]


def encode_batch(encoders: Mapping[str, PromptEncoder], jobs: Sequence[PromptJob]) -> list[ConditioningTensors]:
    """The conditioning of a batch of one model and clip_skip; runs on the device's thread."""
    encoder = encoders[jobs[0].model]
    with ExitStack() as adapted:
        for network in encoder.networks:
            adapted.enter_context(network.with_branches([job.adapters for job in jobs if job.prompt.ids]))
        return encoder.encode([job.prompt for job in jobs], jobs[0].clip_skip)
