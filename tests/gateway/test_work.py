"""What requests to the stages are as pieces of work."""

from __future__ import annotations

from gateway.work import Work, decode_work, denoise_work, encode_work
from safelight.v1.decoder_service_pb2 import DecodeRequest
from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from safelight.v1.encoder_service_pb2 import EncodeRequest
from safelight.v1.tensor_pb2 import TensorHeader, TensorRef
from safelight.v1.work_pb2 import DETERMINISM_CLASS_EXACT, Checkpoint, GuidanceOptions, SamplingOptions


def denoise_request(scale: float = 7.0) -> DenoiseRequest:
    return DenoiseRequest(
        model="tiny",
        latent_shape=[4, 8, 8],
        sampling=SamplingOptions(steps=20),
        guidance=GuidanceOptions(scale=scale),
    )


def test_guidance_takes_two_rows() -> None:
    assert denoise_work(denoise_request()) == Work("tiny", (4, 8, 8), rows=2, passes=20)
    assert denoise_work(denoise_request(scale=1.0)) == Work("tiny", (4, 8, 8), rows=1, passes=20)


def test_in_the_exact_class_every_row_has_a_pass_of_its_own() -> None:
    request = denoise_request()
    request.determinism = DETERMINISM_CLASS_EXACT
    assert denoise_work(request) == Work("tiny", (4, 8, 8), rows=1, passes=40)


def test_a_resumed_request_has_the_steps_that_are_left() -> None:
    request = denoise_request()
    request.resume_from.CopyFrom(Checkpoint(step=15))
    assert denoise_work(request).passes == 5


def test_a_sampler_of_two_calls_a_step_takes_one_in_the_last() -> None:
    assert denoise_work(denoise_request(), calls_per_step=2).passes == 39


def test_an_encoders_work_is_its_prompts_and_a_decoders_its_latent() -> None:
    assert encode_work(EncodeRequest(model="tiny", prompts=["a", "b", "c"])) == Work("tiny", rows=3)
    latents = TensorRef(header=TensorHeader(shape=[1, 4, 8, 16]))
    assert decode_work(DecodeRequest(model="tiny", latents=latents)) == Work("tiny", (4, 8, 16))
