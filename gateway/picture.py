"""The road of one picture: encode, denoise, decode, with what is lost made again.

When the tensors between two stages are lost, the picture takes its road again: from its newest checkpoint where there
is one. When a decoder is lost in the middle of the file, the file is written again and sent again from its first
byte.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field

from gateway.checkpoints import Checkpoints
from gateway.credits import Credits
from gateway.denoising import Denoising
from gateway.film import decoder_steps
from gateway.input_encoding import EncodedInputs
from gateway.ledger import Ledger
from gateway.plan import GenerationPlan
from gateway.report import Report
from gateway.retry import Attempts, InputsLostError
from gateway.settings import GatewaySettings
from gateway.shared import Shared
from gateway.stage_calls import StageCalls
from safelight.errors import InternalError
from safelight.v1.decoder_service_pb2 import DecodeRequest, DecodeResult
from safelight.v1.denoiser_service_pb2 import DenoiseResult
from safelight.v1.generation_service_pb2 import ImageReceipt
from safelight.v1.tensor_pb2 import TensorRef
from safelight.v1.work_pb2 import GenerationParameters
from services.common.metrics import Metrics


@dataclass
class Picture:
    """One picture of a request on its way through the stages.

    Args:
        plan: the request.
        index: which picture.
        inputs: the request's prompts, and what else it is made from, encoded.
        calls: the stages.
        credits: one is held while the picture is in the stages.
        checkpoints: the picture's own.
        ledger: takes what it costs.
        report: takes what the client is told.
        settings: how often to try.
        metrics: where retries are counted.
        refs: the latents that denoisers hold for the picture.
    """

    plan: GenerationPlan
    index: int
    inputs: Shared[EncodedInputs]
    calls: StageCalls
    credits: Credits
    checkpoints: Checkpoints
    ledger: Ledger
    report: Report
    settings: GatewaySettings
    metrics: Metrics
    refs: list[TensorRef] = field(default_factory=list)

    @property
    def parameters(self) -> GenerationParameters:
        """What this picture is made with."""
        return self.plan.images[self.index]

    async def make(self) -> ImageReceipt:
        """Run the stages until the file is sent; returns the receipt.

        Raises:
            SafelightError: a stage refused the request, or no replica could do its part.
        """
        async with self.credits.held(self.plan.context.tenant, self.calls.remaining_seconds()):
            runs_left = self.settings.max_attempts
            while True:
                reached = self.ledger.steps_reached
                try:
                    return await self._run_stages()
                except InputsLostError as lost:
                    runs_left = self.settings.max_attempts if self.ledger.steps_reached > reached else runs_left - 1
                    if runs_left <= 0:
                        raise lost.error from lost

    async def _run_stages(self) -> ImageReceipt:
        self.report.progress("encoder", 0, 1)
        inputs = await self.inputs.get()
        self.ledger.note_encoded(inputs.timings)
        self.report.progress("encoder", 1, 1)
        try:
            denoised = await self._denoise(inputs)
        except InputsLostError:
            self.inputs.drop(inputs)
            raise
        frames = decoder_steps(denoised.latents)
        self.report.progress("decoder", 0, frames)
        decoded = await self._decode(denoised)
        self.report.progress("decoder", frames, frames)
        return self._receipt(inputs, denoised, decoded)

    async def _denoise(self, inputs: EncodedInputs) -> DenoiseResult:
        denoising = Denoising(
            self.plan,
            self.index,
            self.calls,
            self.checkpoints,
            self.ledger,
            self.report,
            self.settings,
            self.metrics,
        )
        denoised = await denoising.run(inputs)
        self.refs.append(denoised.latents)
        return denoised

    async def _decode(self, denoised: DenoiseResult) -> DecodeResult:
        inputs = self.plan.inputs
        request = DecodeRequest(
            context=self.plan.context,
            model=self.parameters.model,
            latents=denoised.latents,
            output=self.plan.output,
            parameters=self.parameters,
            original_image=inputs.image if inputs.mask else b"",
            mask=inputs.mask,
        )
        attempts = Attempts("decoder", self.settings.max_attempts, self.metrics)
        patience = self.settings.replica_wait_seconds
        return await attempts.repeat(lambda: self._relay(request, attempts), self.ledger.timings, patience)

    async def _relay(self, request: DecodeRequest, attempts: Attempts) -> DecodeResult:
        """Send the progress and the file's chunks on as they come; returns the decoder's result."""
        offset = 0
        async with aclosing(self.calls.decode(request, attempts.failed)) as events:
            async for event in events:
                if event.HasField("result"):
                    self.ledger.timings.append(event.result.timing)
                    return event.result
                if event.HasField("progress"):
                    self.report.progress("decoder", event.progress.step, event.progress.steps)
                    continue
                event.chunk.offset = offset
                offset += len(event.chunk.data)
                self.report.chunk(event.chunk)
        raise InternalError("a decoder ended its stream without a result")

    def _receipt(self, inputs: EncodedInputs, denoised: DenoiseResult, decoded: DecodeResult) -> ImageReceipt:
        ledger, prompts = self.ledger, inputs.prompts
        return ImageReceipt(
            image_index=self.index,
            parameters=self.parameters,
            timings=ledger.timings,
            steps_run=ledger.steps_run,
            determinism=denoised.determinism,
            token_count=prompts.positive.token_count,
            truncated_prompt=prompts.positive.truncated_text,
            truncated_negative_prompt=prompts.negative.truncated_text,
            steps_recomputed=ledger.steps_recomputed,
            steps_saved=self.plan.steps_saved,
            output=self.plan.output,
            file_size=decoded.file_size,
            file_sha256=decoded.sha256,
        )
