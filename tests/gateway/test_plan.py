"""A plan has every default filled in."""

from __future__ import annotations

from gateway.plan import make_plan
from safelight.v1 import work_pb2 as work
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.model_pb2 import ModelDescription
from services.common.validation import MAX_SEED
from tests.gateway.test_validation import FLUX, MODEL


def test_defaults_are_the_models_own() -> None:
    plan = make_plan(GenerateRequest(prompt="a cat"), MODEL)
    (image,) = plan.images
    assert (image.width, image.height, image.clip_skip, image.sampling.steps) == (512, 512, 1, 20)
    assert (image.sampling.sampler, image.sampling.schedule, image.guidance.scale) == ("euler", "scaled_linear", 7.5)
    assert plan.latent_shape == (4, 64, 64)


def test_what_is_given_stays() -> None:
    request = GenerateRequest(
        prompt="a cat",
        width=128,
        height=256,
        sampling=work.SamplingOptions(sampler="ddim", sampler_parameters={"eta": 0.5}, steps=7),
        guidance=work.GuidanceOptions(scale=0),
        clip_skip=2,
        context=work.WorkContext(request_id="mine"),
    )
    plan = make_plan(request, MODEL)
    (image,) = plan.images
    assert (image.sampling.sampler, image.sampling.steps, image.guidance.scale, image.clip_skip) == ("ddim", 7, 0, 2)
    assert dict(image.sampling.sampler_parameters) == {"eta": 0.5}
    assert (plan.latent_shape, plan.context.request_id) == ((4, 32, 16), "mine")


def test_a_distilled_scale_is_the_model_s_own_or_what_is_given_or_none() -> None:
    given = GenerateRequest(guidance=work.GuidanceOptions(distilled_scale=2))
    for request, model, scale in ((GenerateRequest(), FLUX, 3.5), (given, FLUX, 2.0), (GenerateRequest(), MODEL, None)):
        guidance = make_plan(request, model).images[0].guidance
        assert (guidance.distilled_scale if guidance.HasField("distilled_scale") else None) == scale
        assert guidance.scale == 7.5


def test_one_seed_counts_up_for_several_pictures() -> None:
    plan = make_plan(GenerateRequest(seeds=[41], num_images=3), MODEL)
    assert [image.seed for image in plan.images] == [41, 42, 43]


def test_the_largest_seed_counts_on_from_zero() -> None:
    plan = make_plan(GenerateRequest(seeds=[MAX_SEED], num_images=2), MODEL)
    assert [image.seed for image in plan.images] == [MAX_SEED, 0]


def test_given_seeds_are_one_picture_each() -> None:
    plan = make_plan(GenerateRequest(seeds=[5, 3]), MODEL)
    assert [image.seed for image in plan.images] == [5, 3]


def test_without_a_seed_every_request_draws_its_own() -> None:
    seeds = {make_plan(GenerateRequest(), MODEL).images[0].seed for _ in range(8)}
    assert len(seeds) > 1


def test_a_model_that_is_told_sizes_is_told_the_picture_s_unless_others_are_given() -> None:
    model = ModelDescription()
    model.CopyFrom(MODEL)
    model.denoiser.size_conditioning = True
    given = work.SizeConditioning(original_width=4096, crop_top=7)
    request = GenerateRequest(width=128, height=256, size_conditioning=given)
    assert make_plan(request, model).images[0].size_conditioning == work.SizeConditioning(
        original_width=4096, original_height=256, crop_top=7, target_width=128, target_height=256
    )


def test_a_model_that_takes_no_sizes_is_told_none() -> None:
    assert not make_plan(GenerateRequest(), MODEL).images[0].HasField("size_conditioning")
