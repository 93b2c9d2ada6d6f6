"""The road of one picture: encode, denoise, decode, with what is safe to repeat repeated.

When the tensors between two stages are lost, the picture takes its road again from the start. Once the first bytes of
its file are on their way to the client, nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from gateway.credits import Credits
from gateway.leases import Leases
from gateway.plan import GenerationPlan
from gateway.prompt_encoding import PromptEncoding
from gateway.retry import Attempts, InputsLostError
from gateway.stage_calls import StageCallError, StageCalls
from safelight.v1.decoder_service_pb2 import DecodeRequest, DecodeResult
from safelight.v1.denoiser_service_pb2 import DenoiseRequest, DenoiseResponse, DenoiseResult
from safelight.v1.encoder_service_pb2 import EncodeResponse
from safelight.v1.generation_service_pb2 import GenerateProgress, GenerateQueued, GenerateResponse, ImageReceipt
from safelight.v1.work_pb2 import FileChunk, GenerationParameters
from services.common.metrics import Metrics

Emit = Callable[[GenerateResponse], Awaitable[None]]


@dataclass
class Picture:
    """One picture of a request on its way through the stages.

    Args:
        plan: the request.
        index: which picture.
        encoding: the request's prompts, encoded.
        calls: the stages.
        credits: one is held while the picture is in the stages.
        leases: takes the reference of the latent.
        emit: takes progress and file chunks.
        metrics: where retries are counted.
        max_attempts: times each stage is tried.
    """

    plan: GenerationPlan
    index: int
    encoding: PromptEncoding
    calls: StageCalls
    credits: Credits
    leases: Leases
    emit: Emit
    metrics: Metrics
    max_attempts: int
    _sent_bytes: int = 0

    @property
    def parameters(self) -> GenerationParameters:
        """What this picture is made with."""
        return self.plan.images[self.index]

    async def make(self) -> ImageReceipt:
        """Run the stages until the file is sent; returns the receipt.

        Raises:
            SafelightError: a stage refused the request, or no replica could do its part.
        """
        runs_left = self.max_attempts
        while True:
            try:
                async with self.credits.held(self.calls.remaining_seconds()):
                    return await self._run_stages()
            except InputsLostError as lost:
                runs_left -= 1
                if self._sent_bytes or runs_left <= 0:
                    raise lost.error from lost

    async def _run_stages(self) -> ImageReceipt:
        await self._progress("encoder", 0, 1)
        encoded = await self.encoding.get()
        await self._progress("encoder", 1, 1)
        try:
            denoised = await self._denoise(encoded)
        except InputsLostError:
            self.encoding.drop(encoded)
            raise
        await self._progress("decoder", 0, 1)
        decoded = await self._decode(denoised)
        await self._progress("decoder", 1, 1)
        return self._receipt(encoded, denoised, decoded)

    async def _denoise(self, encoded: EncodeResponse) -> DenoiseResult:
        positive, negative = encoded.prompts
        request = DenoiseRequest(
            context=self.plan.context,
            model=self.parameters.model,
            conditioning=positive.conditioning,
            negative_conditioning=negative.conditioning,
            latent_shape=self.plan.latent_shape,
            sampling=self.parameters.sampling,
            guidance=self.parameters.guidance,
            seed=self.parameters.seed,
        )
        attempts = Attempts("denoiser", self.max_attempts, self.metrics)
        while True:
            try:
                result = await self.calls.denoise(request, attempts.failed, self._report_denoise)
            except StageCallError as failure:
                attempts.note(failure)
            else:
                self.leases.note(result.latents)
                return result

    async def _report_denoise(self, event: DenoiseResponse) -> None:
        if event.HasField("progress"):
            await self._progress("denoiser", event.progress.step, event.progress.steps)
        elif event.HasField("queued"):
            queued = GenerateQueued(image_index=self.index, stage="denoiser", position=event.queued.position)
            await self.emit(GenerateResponse(queued=queued))

    async def _decode(self, denoised: DenoiseResult) -> DecodeResult:
        request = DecodeRequest(
            context=self.plan.context,
            model=self.parameters.model,
            latents=denoised.latents,
            output=self.plan.output,
            parameters=self.parameters,
        )
        attempts = Attempts("decoder", self.max_attempts, self.metrics)
        while True:
            try:
                return await self._relay(request, attempts)
            except StageCallError as failure:
                if self._sent_bytes:
                    raise failure.error from failure
                attempts.note(failure)

    async def _relay(self, request: DecodeRequest, attempts: Attempts) -> DecodeResult:
        """Send the file's chunks on as they come; returns the decoder's result."""
        result = DecodeResult()
        async with aclosing(self.calls.decode(request, attempts.failed)) as events:
            async for event in events:
                if event.HasField("chunk"):
                    await self._send(event.chunk)
                else:
                    result = event.result
        return result

    async def _send(self, chunk: FileChunk) -> None:
        chunk.file_index = self.index
        self._sent_bytes += len(chunk.data)
        self.metrics.file_bytes.inc(len(chunk.data))
        await self.emit(GenerateResponse(chunk=chunk))

    async def _progress(self, stage: str, step: int, steps: int) -> None:
        progress = GenerateProgress(image_index=self.index, stage=stage, step=step, steps=steps)
        await self.emit(GenerateResponse(progress=progress))

    def _receipt(self, encoded: EncodeResponse, denoised: DenoiseResult, decoded: DecodeResult) -> ImageReceipt:
        positive, negative = encoded.prompts
        return ImageReceipt(
            image_index=self.index,
            parameters=self.parameters,
            timings=[encoded.timing, denoised.timing, decoded.timing],
            steps_run=denoised.steps_run,
            steps_saved=self.plan.steps_saved,
            determinism=denoised.determinism,
            token_count=positive.token_count,
            truncated_prompt=positive.truncated_text,
            truncated_negative_prompt=negative.truncated_text,
        )
