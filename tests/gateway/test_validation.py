"""What a generation request must be: a table of wrong fields, each named with its remedy."""

from __future__ import annotations

import pytest

from gateway.validation import check_generate
from safelight.errors import InvalidRequestError, UnsupportedError
from safelight.v1 import work_pb2 as work
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.model_pb2 import DecoderDescription, DenoiserDescription, EncoderDescription, ModelDescription

MODEL = ModelDescription(
    name="sd15",
    encoder=EncoderDescription(max_tokens=77, max_clip_skip=12, default_clip_skip=1, max_prompt_bytes=1000),
    denoiser=DenoiserDescription(
        latent_channels=4,
        samplers=["euler", "ddim"],
        schedules=["scaled_linear", "karras"],
        default_steps=20,
        max_steps=100,
        default_guidance_scale=7.5,
        default_latent_width=64,
        default_latent_height=64,
        max_latent_area=128 * 128,
    ),
    decoder=DecoderDescription(scale_factor=8, latent_channels=4, formats=[work.OUTPUT_FORMAT_PNG]),
)


def test_a_prompt_alone_is_enough() -> None:
    check_generate(GenerateRequest(prompt="a cat"), MODEL)


@pytest.mark.parametrize(
    ("request_", "field", "remedy"),
    [
        (GenerateRequest(prompt="x" * 1001), "prompt", "at most 1000"),
        (GenerateRequest(negative_prompt="ü" * 501), "negative_prompt", "at most 1000"),
        (GenerateRequest(width=513), "width", "try 512"),
        (GenerateRequest(width=56), "width", "at least 64"),
        (GenerateRequest(height=-8), "height", "at least 64"),
        (GenerateRequest(width=1032, height=1024), "width", "1048576 pixels"),
        (GenerateRequest(sampling=work.SamplingOptions(steps=-1)), "sampling.steps", "from 1 to 100"),
        (GenerateRequest(sampling=work.SamplingOptions(steps=101)), "sampling.steps", "from 1 to 100"),
        (GenerateRequest(sampling=work.SamplingOptions(steps=9, min_steps=10)), "sampling.min_steps", "from 0 to 9"),
        (GenerateRequest(sampling=work.SamplingOptions(sampler="magic")), "sampling.sampler", "euler, ddim"),
        (GenerateRequest(sampling=work.SamplingOptions(schedule="magic")), "sampling.schedule", "karras"),
        (GenerateRequest(guidance=work.GuidanceOptions(scale=-1)), "guidance.scale", "from 0 to 100"),
        (GenerateRequest(guidance=work.GuidanceOptions(scale=float("nan"))), "guidance.scale", "from 0 to 100"),
        (GenerateRequest(guidance=work.GuidanceOptions(distilled_scale=3)), "guidance.distilled_scale", "leave it out"),
        (GenerateRequest(clip_skip=13), "clip_skip", "from 0 to 12"),
        (GenerateRequest(num_images=65), "num_images", "from 0 to 64"),
        (GenerateRequest(num_images=-1), "num_images", "from 0 to 64"),
        (GenerateRequest(seeds=[3, -1]), "seeds[1]", "from 0"),
        (GenerateRequest(seeds=[1, 2], num_images=3), "seeds", "one or as many"),
        (GenerateRequest(output=work.OutputOptions(quality=101)), "output.quality", "from 0 to 100"),
        (GenerateRequest(output=work.OutputOptions(format=work.OUTPUT_FORMAT_JPEG)), "output.format", "FORMAT_PNG"),
        (GenerateRequest(context=work.WorkContext(priority=101)), "context.priority", "from -100 to 100"),
    ],
)
def test_a_wrong_field_is_named_with_its_remedy(request_: GenerateRequest, field: str, remedy: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_generate(request_, MODEL)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert remedy in violation.description


def test_all_wrong_fields_are_told_at_once() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_generate(GenerateRequest(width=7, seeds=[-1], num_images=99), MODEL)
    assert [violation.field for violation in caught.value.violations] == ["width", "num_images", "seeds[0]"]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (GenerateRequest(inputs=[work.MediaInput()]), "inputs"),
        (GenerateRequest(num_frames=81), "num_frames"),
        (GenerateRequest(preview=work.PreviewOptions(every_steps=2)), "preview"),
        (GenerateRequest(size_conditioning=work.SizeConditioning()), "size_conditioning"),
    ],
)
def test_what_this_release_does_not_serve_is_refused_and_never_ignored(request_: GenerateRequest, field: str) -> None:
    with pytest.raises(UnsupportedError, match=field):
        check_generate(request_, MODEL)


FLUX = ModelDescription()
FLUX.CopyFrom(MODEL)
FLUX.denoiser.latent_multiple = 2
FLUX.denoiser.default_distilled_scale = 3.5


@pytest.mark.parametrize(
    ("request_", "field", "remedy"),
    [
        (GenerateRequest(width=520), "width", "multiple of 16, at least 64: try 512"),
        (GenerateRequest(height=1000), "height", "try 992"),
        (GenerateRequest(width=1040, height=1024), "width", "1048576 pixels"),
        (GenerateRequest(guidance=work.GuidanceOptions(distilled_scale=101)), "guidance.distilled_scale", "to 100"),
    ],
)
def test_a_model_of_larger_tokens_and_distilled_guidance_has_rules_of_its_own(
    request_: GenerateRequest, field: str, remedy: str
) -> None:
    check_generate(GenerateRequest(width=528, guidance=work.GuidanceOptions(distilled_scale=3)), FLUX)
    with pytest.raises(InvalidRequestError) as caught:
        check_generate(request_, FLUX)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert remedy in violation.description


def test_sizes_that_no_picture_has_are_refused() -> None:
    model = ModelDescription()
    model.CopyFrom(MODEL)
    model.denoiser.size_conditioning = True
    sizes = work.SizeConditioning(original_width=70_000, crop_top=-1, target_width=64)
    with pytest.raises(InvalidRequestError) as caught:
        check_generate(GenerateRequest(size_conditioning=sizes), model)
    assert [violation.field for violation in caught.value.violations] == [
        "size_conditioning.original_width",
        "size_conditioning.crop_top",
    ]
