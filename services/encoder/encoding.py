"""The life of one encode request: check, tokenize, look in the cache, compute the rest in batches, hand off."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
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
from services.encoder.input_pictures import PictureKey, picture_key, read_input
from services.encoder.registry import ImageEncoder, PromptEncoder
from services.encoder.tokenization import TokenizedPrompt
from services.encoder.validation import check_encode
from services.modeling.lora.adapter import Applied, set_key
from services.modeling.lora.library import AdapterLibrary
from services.modeling.wire import TorchPayload, make_header

_LAYOUTS = {2: "BD", 3: "BLD"}
_CACHE = "embeddings"
_UPLOADS_READ_AT_ONCE = 2  # a small file may hold many pixels

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


class PictureJob(NamedTuple):
    """A picture to encode: what the network sees of it [1, 3, S, S]."""

    model: str
    pixels: Tensor


EncoderJob = PromptJob | PictureJob
EncoderBatcher = Batcher[EncoderJob, ConditioningTensors]


@dataclass(frozen=True)
class _Encoded:
    """The conditioning of a prompt or a picture, where it came from and what it cost."""

    tensors: ConditioningTensors
    cached: bool
    queue_seconds: float
    compute_seconds: float


@dataclass(frozen=True)
class Encoding:
    """Runs requests against the batcher that all of them share."""

    encoders: Mapping[str, PromptEncoder]
    batcher: EncoderBatcher
    executor: DeviceExecutor
    cache: EmbeddingCache
    store: TensorStore
    metrics: Metrics
    models: dict[str, ModelDescription]
    library: AdapterLibrary
    _reading: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_UPLOADS_READ_AT_ONCE))

    async def encode(self, request: pb.EncodeRequest) -> pb.EncodeResponse:
        """The conditioning of every prompt, in order; that of the pictures is in each.

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
        encoded = await asyncio.gather(
            *map(self._encode_prompt, jobs),
            *(self._encode_picture(request, index, encoder, alone) for index in range(len(request.inputs))),
        )
        results, pictures = encoded[: len(jobs)], [each.tensors for each in encoded[len(jobs) :]]
        shared = await self.executor.run(lambda: joined(pictures))
        prompts = [await self._pack(job, result, shared) for job, result in zip(jobs, results, strict=True)]
        return pb.EncodeResponse(prompts=prompts, timing=self._timing(request.model, encoded))

    async def _encode_prompt(self, job: PromptJob) -> _Encoded:
        fingerprint = self.encoders[job.model].fingerprint
        key = EmbeddingKey(fingerprint, job.prompt.ids, job.clip_skip, job.alone, set_key(job.adapters))
        return self._cached(key) or await self._computed(
            key, job, WorkKind(job.model), object() if job.alone else job.clip_skip
        )

    async def _encode_picture(
        self, request: pb.EncodeRequest, index: int, encoder: PromptEncoder, alone: bool
    ) -> _Encoded:
        image_encoder = encoder.image_encoder
        assert image_encoder is not None, "check_encode refuses pictures of a model that takes none"
        key = await asyncio.to_thread(picture_key, request, index, encoder.fingerprint, alone)
        if cached := self._cached(key):
            return cached
        async with self._reading:
            pixels = await asyncio.to_thread(lambda: image_encoder.pixels(read_input(request, index)))
        kind = WorkKind(request.model, tuple(pixels.shape[-2:]))
        return await self._computed(key, PictureJob(request.model, pixels), kind, object() if alone else None)

    def _cached(self, key: EmbeddingKey | PictureKey) -> _Encoded | None:
        cached = self.cache.get(key)
        if cached is None:
            self.metrics.cache_misses.labels(_CACHE).inc()
            return None
        self.metrics.cache_hits.labels(_CACHE).inc()
        return _Encoded(cached, True, 0.0, 0.0)

    async def _computed(
        self, key: EmbeddingKey | PictureKey, job: EncoderJob, kind: WorkKind, batch_key: object
    ) -> _Encoded:
        tensors, queued, computed = await self.batcher.submit(job, kind, batch_key)
        self.cache.put(key, tensors)
        self.metrics.cache_bytes.labels(_CACHE).set(self.cache.bytes)
        return _Encoded(tensors, False, queued, computed)

    async def _pack(self, job: PromptJob, encoded: _Encoded, shared: ConditioningTensors) -> pb.EncodedPrompt:
        fingerprint = self.encoders[job.model].fingerprint
        tensors = [
            NamedTensor(
                name=name,
                tensor=await self.store.put(
                    make_header(tensor, _LAYOUTS[tensor.ndim], fingerprint), TorchPayload(tensor)
                ),
            )
            for name, tensor in {**encoded.tensors, **shared}.items()
        ]
        return pb.EncodedPrompt(
            conditioning=Conditioning(tensors=tensors),
            token_count=job.prompt.token_count,
            truncated_text=job.prompt.cut_off,
            cached=encoded.cached,
        )

    def _timing(self, model: str, encoded: Sequence[_Encoded]) -> StageTiming:
        """The request's time is that of its slowest prompt or picture: they share batches."""
        queued = max(each.queue_seconds for each in encoded)
        computed = max(each.compute_seconds for each in encoded)
        self.metrics.queue_seconds.labels("encoder").observe(queued)
        self.metrics.stage_seconds.labels("encoder", model).observe(computed)
        return StageTiming(stage="encoder", queue_seconds=queued, compute_seconds=computed)


def _tokenize(encoder: PromptEncoder, request: pb.EncodeRequest) -> list[TokenizedPrompt]:
    """Each prompt's tokens; the last `negative_prompts` of them are negative ones."""
    first_negative = len(request.prompts) - request.negative_prompts
    return [encoder.tokenize(prompt, negative=index >= first_negative) for index, prompt in enumerate(request.prompts)]


def joined(pictures: Sequence[ConditioningTensors]) -> ConditioningTensors:
    """The conditioning [1, tokens, width] of several pictures as that of one, in their order; nothing of none."""
    names = pictures[0] if pictures else ()
    return {name: torch.cat([picture[name] for picture in pictures], dim=1) for name in names}


def encode_batch(encoders: Mapping[str, PromptEncoder], jobs: Sequence[EncoderJob]) -> list[ConditioningTensors]:
    """The conditioning of a batch of one model, of prompts with one clip_skip or of pictures; runs on the device's
    thread."""
    encoder = encoders[jobs[0].model]
    if pictures := [job for job in jobs if isinstance(job, PictureJob)]:
        return _encode_pictures(encoder.image_encoder, pictures)
    return _encode_prompts(encoder, [job for job in jobs if isinstance(job, PromptJob)])


def _encode_pictures(encoder: ImageEncoder | None, jobs: Sequence[PictureJob]) -> list[ConditioningTensors]:
    assert encoder is not None
    return encoder.encode([job.pixels for job in jobs])


def _encode_prompts(encoder: PromptEncoder, jobs: Sequence[PromptJob]) -> list[ConditioningTensors]:
    with ExitStack() as adapted:
        for network in encoder.networks:
            adapted.enter_context(network.with_branches([job.adapters for job in jobs if job.prompt.ids]))
        return encoder.encode([job.prompt for job in jobs], jobs[0].clip_skip)
