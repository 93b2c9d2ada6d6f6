"""From the user's options to the wire and back: what can't be sent is refused by name before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest

from safelight import Accepted, GenerationOptions, GenerationResult, InternalError, InvalidRequestError, Progress
from safelight.messages import EventReader, to_request
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import work_pb2 as work


def test_what_is_not_given_stays_unset_on_the_wire() -> None:
    request = to_request(GenerationOptions(prompt="a cat"))
    fields = {descriptor.name for descriptor, _ in request.ListFields()}
    assert fields == {"context", "prompt", "sampling", "guidance", "num_images", "output"}
    assert not request.guidance.HasField("scale")
    assert request.sampling == work.SamplingOptions()


def test_everything_given_is_sent() -> None:
    options = GenerationOptions(
        prompt="a cat",
        negative_prompt="a dog",
        model="sd15",
        width=512,
        height=768,
        steps=7,
        sampler="ddim",
        sampler_parameters={"eta": 0.5},
        schedule="karras",
        schedule_parameters={"rho": 5.0},
        guidance_scale=0.0,
        clip_skip=2,
        seed=0,
        num_images=3,
        format="webp",
        quality=80,
        metadata=False,
        tenant="studio",
        priority=5,
    )
    assert to_request(options) == pb.GenerateRequest(
        context=work.WorkContext(tenant="studio", priority=5),
        model="sd15",
        prompt="a cat",
        negative_prompt="a dog",
        width=512,
        height=768,
        sampling=work.SamplingOptions(
            sampler="ddim",
            sampler_parameters={"eta": 0.5},
            schedule="karras",
            schedule_parameters={"rho": 5.0},
            steps=7,
        ),
        guidance=work.GuidanceOptions(scale=0.0),
        clip_skip=2,
        seeds=[0],
        num_images=3,
        output=work.OutputOptions(format=work.OUTPUT_FORMAT_WEBP, quality=80, omit_metadata=True),
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt": "x" * 2_000_000}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a", "negative_prompt": None}, "negative_prompt"),
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "width": 0}, "width"),
        ({"prompt": "a", "num_images": 0}, "num_images"),
        ({"prompt": "a", "format": "bmp"}, "png, jpeg, webp"),
        ({"prompt": "a", "seed": 2**63}, "can't be sent"),
        ({"prompt": "a", "width": 512.5}, "can't be sent"),
        ({"prompt": "a\ud800"}, "can't be sent"),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_with_a_sentence(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        to_request(GenerationOptions(**options))


def test_a_stream_becomes_events_and_its_chunks_become_files() -> None:
    reader = EventReader()
    parameters = work.GenerationParameters(seed=5, model="sd15", width=8, height=16)
    responses = [
        pb.GenerateResponse(accepted=pb.GenerateAccepted(request_id="id", images=[parameters])),
        pb.GenerateResponse(progress=pb.GenerateProgress(stage="denoiser", step=1, steps=2)),
        pb.GenerateResponse(chunk=work.FileChunk(data=b"ab", media_type="image/png")),
        pb.GenerateResponse(chunk=work.FileChunk(data=b"cd")),
        pb.GenerateResponse(result=pb.GenerateResult(images=[pb.ImageReceipt(parameters=parameters)])),
    ]
    accepted, progress, first_chunk, second_chunk, result = map(reader.read, responses)
    assert (accepted, first_chunk, second_chunk) == (Accepted("id", (5,)), None, None)
    assert progress == Progress(0, "denoiser", 1, 2)
    assert isinstance(result, GenerationResult)
    assert (result.images[0].data, result.images[0].media_type, result.images[0].seed) == (b"abcd", "image/png", 5)


def test_an_event_of_a_later_release_is_passed_over() -> None:
    assert EventReader().read(pb.GenerateResponse()) is None


def test_a_picture_without_its_file_is_an_error() -> None:
    with pytest.raises(InternalError, match="picture 0"):
        EventReader().read(pb.GenerateResponse(result=pb.GenerateResult(images=[pb.ImageReceipt()])))
