"""From the user's options to the wire: what can't be sent is refused by name before anything is sent."""

from __future__ import annotations

import time
from typing import Any

import pytest

from safelight import GenerationOptions, InvalidRequestError
from safelight.messages import to_request
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
        min_steps=4,
        sampler="ddim",
        sampler_parameters={"eta": 0.5},
        schedule="karras",
        schedule_parameters={"rho": 5.0},
        guidance_scale=0.0,
        clip_skip=2,
        original_size=(4096, 2048),
        crop=(0, 16),
        target_size=(1024, 768),
        seed=0,
        num_images=3,
        determinism="exact",
        preview_every_steps=2,
        format="webp",
        quality=80,
        metadata=False,
        tenant="studio",
        priority=5,
    )
    assert to_request(options, idempotency_key="mine") == pb.GenerateRequest(
        context=work.WorkContext(tenant="studio", priority=5, idempotency_key="mine"),
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
            min_steps=4,
        ),
        guidance=work.GuidanceOptions(scale=0.0),
        clip_skip=2,
        seeds=[0],
        num_images=3,
        output=work.OutputOptions(format=work.OUTPUT_FORMAT_WEBP, quality=80, omit_metadata=True),
        preview=work.PreviewOptions(every_steps=2),
        determinism=work.DETERMINISM_CLASS_EXACT,
        size_conditioning=work.SizeConditioning(
            original_width=4096, original_height=2048, crop_top=16, target_width=1024, target_height=768
        ),
    )


def test_of_sizes_only_those_given_are_sent() -> None:
    request = to_request(GenerationOptions(prompt="a cat", target_size=(1024, 768)))
    assert request.size_conditioning == work.SizeConditioning(target_width=1024, target_height=768)


def test_a_timeout_becomes_a_moment() -> None:
    before = time.time_ns()
    request = to_request(GenerationOptions(prompt="a cat"), timeout_seconds=2.5)
    after = time.time_ns()
    assert before <= request.context.deadline.ToNanoseconds() - 2_500_000_000 <= after


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), 1e12])
def test_a_timeout_that_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"timeout_seconds: is .* must be above 0"):
        to_request(GenerationOptions(prompt="a cat"), timeout_seconds=seconds)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt": "x" * 2_000_000}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a", "negative_prompt": None}, "negative_prompt"),
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "width": 0}, "width"),
        ({"prompt": "a", "num_images": 0}, "num_images"),
        ({"prompt": "a", "min_steps": 0}, "min_steps"),
        ({"prompt": "a", "preview_every_steps": 0}, "preview_every_steps"),
        ({"prompt": "a", "determinism": "rough"}, "determinism: is 'rough'; choose from default, exact"),
        ({"prompt": "a", "format": "bmp"}, "png, jpeg, webp"),
        ({"prompt": "a", "seed": 2**63}, "can't be sent"),
        ({"prompt": "a", "width": 512.5}, "can't be sent"),
        ({"prompt": "a\ud800"}, "can't be sent"),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_with_a_sentence(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        to_request(GenerationOptions(**options))
