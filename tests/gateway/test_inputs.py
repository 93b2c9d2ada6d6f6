"""What the gateway knows of a request's input picture: its role, its size and its strength, but no pixels."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest
from PIL import Image

from gateway.admission import request_work
from gateway.inputs import IMAGE_EMBEDS, MAX_FILE_BYTES, with_measures_of_inputs
from gateway.plan import GenerationPlan, make_plan
from gateway.validation import check_generate
from safelight.errors import InvalidRequestError, UnsupportedError
from safelight.v1 import work_pb2 as work
from safelight.v1.generation_service_pb2 import GenerateRequest
from safelight.v1.model_pb2 import DenoiserDescription, ModelDescription
from services.common.uploaded_films import MAX_FILM_BYTES
from tests.gateway.test_validation import MODEL as PLAIN
from tests.support.films import film_file, moving_square

MODEL = ModelDescription()
MODEL.CopyFrom(PLAIN)
MODEL.denoiser.inputs.extend([work.MEDIA_ROLE_IMAGE, work.MEDIA_ROLE_MASK])


LED = ModelDescription()
LED.CopyFrom(PLAIN)
LED.denoiser.inputs.append(work.MEDIA_ROLE_IMAGE)
LED.denoiser.min_keyframes, LED.denoiser.max_keyframes = 2, 3
LED.denoiser.conditioning.extend(["prompt_embeds", IMAGE_EMBEDS])
LED.encoder.inputs.append(work.MEDIA_ROLE_IMAGE)

FILMS = ModelDescription()
FILMS.CopyFrom(PLAIN)
FILMS.denoiser.MergeFrom(
    DenoiserDescription(
        inputs=[work.MEDIA_ROLE_VIDEO],
        latent_multiple=2,
        default_latent_frames=3,
        max_latent_volume=8 * 8 * 5,
        default_fps=16,
    )
)
FILMS.decoder.frames_per_latent = 4


def film(frames: int, size: tuple[int, int] = (64, 64), fps: int = 24) -> work.MediaInput:
    return work.MediaInput(role=work.MEDIA_ROLE_VIDEO, data=film_file(moving_square(frames, size), fps=fps))


def film_plan(*inputs: work.MediaInput, **fields: Any) -> GenerationPlan:
    return plan_of(FILMS, inputs=inputs, **fields)


def png(width: int, height: int, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def image(data: bytes) -> work.MediaInput:
    return work.MediaInput(role=work.MEDIA_ROLE_IMAGE, data=data)


MASK = work.MediaInput(role=work.MEDIA_ROLE_MASK, data=png(3, 5))
PHOTO = image(png(512, 512))


def plan_of(model: ModelDescription = MODEL, **fields: Any) -> GenerationPlan:
    request = GenerateRequest(prompt="a cat", **fields)
    check_generate(request, model)
    return make_plan(with_measures_of_inputs(request, model, MAX_FILM_BYTES), model)


@pytest.mark.parametrize(
    ("request_", "field", "remedy"),
    [
        (GenerateRequest(inputs=[MASK]), "inputs", "a mask and no image; give the image"),
        (GenerateRequest(inputs=[PHOTO, PHOTO]), "inputs[1]", "a second MEDIA_ROLE_IMAGE; give one"),
        (GenerateRequest(inputs=[PHOTO, MASK, MASK]), "inputs[2]", "a second MEDIA_ROLE_MASK; give one"),
        (
            GenerateRequest(inputs=[work.MediaInput(role=work.MEDIA_ROLE_VIDEO, data=b"film")]),
            "inputs[0].role",
            "is MEDIA_ROLE_VIDEO; model 'sd15' takes MEDIA_ROLE_IMAGE, MEDIA_ROLE_MASK",
        ),
        (GenerateRequest(inputs=[work.MediaInput(data=b"?")]), "inputs[0].role", "is MEDIA_ROLE_UNSPECIFIED"),
        (GenerateRequest(inputs=[image(b"")]), "inputs[0].data", "has 0 bytes; must have from 1"),
        (GenerateRequest(inputs=[image(bytes(MAX_FILE_BYTES + 1))]), "inputs[0].data", "resize the picture"),
        (GenerateRequest(inputs=[PHOTO], strength=1.7), "strength", "from 0 to 1"),
        (GenerateRequest(inputs=[PHOTO], strength=-0.1), "strength", "from 0 to 1"),
        (GenerateRequest(strength=0.5), "strength", "needs an image or a film"),
    ],
)
def test_a_wrong_input_is_named_with_its_remedy(request_: GenerateRequest, field: str, remedy: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_generate(request_, MODEL)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert remedy in violation.description


def test_a_model_that_takes_no_inputs_says_so() -> None:
    with pytest.raises(UnsupportedError, match="inputs: not served by model 'sd15'"):
        check_generate(GenerateRequest(inputs=[PHOTO]), PLAIN)


@pytest.mark.parametrize(
    ("own", "asked", "size"),
    [
        ((512, 768), {}, (512, 768)),
        ((515, 770), {}, (512, 768)),
        ((517, 64), {}, (520, 64)),
        ((100, 200), {"width": 256}, (256, 512)),
        ((100, 200), {"height": 256}, (128, 256)),
        ((3000, 2000), {"height": 512}, (768, 512)),
        ((3000, 2000), {"width": 512, "height": 512}, (512, 512)),
        ((8, 8), {"width": 64, "height": 128}, (64, 128)),
    ],
)
def test_the_picture_says_what_the_request_does_not(
    own: tuple[int, int], asked: dict[str, int], size: tuple[int, int]
) -> None:
    plan = plan_of(MODEL, inputs=[image(png(*own))], **asked)
    assert (plan.images[0].width, plan.images[0].height) == size
    assert plan.latent_shape == (4, size[1] // 8, size[0] // 8)


def test_the_size_is_a_multiple_of_what_the_model_takes() -> None:
    model = ModelDescription()
    model.CopyFrom(MODEL)
    model.denoiser.latent_multiple = 2
    sized = with_measures_of_inputs(GenerateRequest(inputs=[image(png(525, 500))]), model, MAX_FILM_BYTES)
    assert (sized.width, sized.height) == (528, 496)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([image(b"no picture")], r"inputs\[0\].data: \(MEDIA_ROLE_IMAGE\) a picture file must be PNG, JPEG or WebP"),
        ([PHOTO, work.MediaInput(role=work.MEDIA_ROLE_MASK, data=b"?")], r"inputs\[1\].data: \(MEDIA_ROLE_MASK\)"),
        ([image(png(9000, 9000, "1"))], "the picture has 9000x9000 pixels and may have 67108864: make it smaller"),
        ([image(png(40, 300))], "width: the input has 40x300 pixels, which makes 40x304; give a width and a height"),
        ([image(png(4096, 4096))], "width: the input has 4096x4096 pixels, .* at most 1048576 pixels in all"),
    ],
)
def test_what_is_no_picture_or_has_no_size_to_draw_is_refused(inputs: list[work.MediaInput], sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        with_measures_of_inputs(GenerateRequest(inputs=inputs), MODEL, MAX_FILM_BYTES)


def test_a_proportion_beyond_all_sizes_is_refused() -> None:
    request = GenerateRequest(inputs=[image(png(1, 60_000))], width=2**31 - 8)
    with pytest.raises(InvalidRequestError, match=r"1x60000 pixels, which makes 2147483640x\d+; give a width"):
        with_measures_of_inputs(request, MODEL, MAX_FILM_BYTES)


@pytest.mark.parametrize(
    ("inputs", "given", "strength"),
    [([PHOTO], {}, 0.8), ([PHOTO, MASK], {}, 1.0), ([MASK, PHOTO], {"strength": 0.25}, 0.25)],
)
def test_the_receipt_is_told_the_strength_and_the_files(
    inputs: list[work.MediaInput], given: dict[str, float], strength: float
) -> None:
    (parameters,) = plan_of(MODEL, inputs=inputs, **given).images
    assert parameters.strength == pytest.approx(strength)
    assert [(each.role, each.sha256) for each in parameters.inputs] == [
        (each.role, hashlib.sha256(each.data).digest()) for each in inputs
    ]


def test_a_request_without_a_picture_has_no_strength() -> None:
    (parameters,) = plan_of().images
    assert not parameters.HasField("strength")


def test_the_work_is_that_of_the_steps_that_are_run_and_of_encoding_the_picture() -> None:
    changed, drawn = request_work(plan_of(inputs=[PHOTO], strength=0.5), 20), request_work(plan_of(), 20)
    assert (changed.denoise.passes, drawn.denoise.passes) == (11, 20)
    assert changed.encode_image is not None
    assert changed.encode_image.latent_shape == (64, 64)
    assert drawn.encode_image is None


@pytest.mark.parametrize(
    ("request_", "field", "remedy"),
    [
        (GenerateRequest(), "inputs", "have 0 images; a film of model 'sd15' is led through 2 to 3"),
        (GenerateRequest(inputs=[PHOTO]), "inputs", "have 1 images"),
        (GenerateRequest(inputs=[PHOTO] * 4), "inputs", "have 4 images"),
        (GenerateRequest(inputs=[image(bytes(MAX_FILE_BYTES))] * 3), "inputs", "save them as JPEG or WebP"),
        (GenerateRequest(inputs=[PHOTO, PHOTO], strength=0.5), "strength", "is led through its images"),
        (GenerateRequest(inputs=[PHOTO, PHOTO, MASK]), "inputs[2].role", "takes MEDIA_ROLE_IMAGE"),
    ],
)
def test_wrong_keyframes_are_named_with_the_remedy(request_: GenerateRequest, field: str, remedy: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_generate(request_, LED)
    named = {violation.field: violation.description for violation in caught.value.violations}
    assert remedy in named[field]


def test_a_model_whose_encoder_sees_no_pictures_says_what_to_name() -> None:
    blind = ModelDescription()
    blind.CopyFrom(LED)
    del blind.encoder.inputs[:]
    with pytest.raises(UnsupportedError, match=r"needs an image encoder.*image_encoder: \{path"):
        check_generate(GenerateRequest(inputs=[PHOTO, PHOTO]), blind)


@pytest.mark.parametrize(
    ("own", "asked", "size"),
    [
        ((512, 512), {}, (512, 512)),
        ((4000, 2000), {}, (728, 360)),
        ((100, 200), {}, (360, 728)),
        ((100, 200), {"width": 256}, (256, 512)),
        ((3000, 2000), {"width": 512, "height": 512}, (512, 512)),
    ],
)
def test_keyframes_give_the_proportions_of_the_first_at_the_usual_area(
    own: tuple[int, int], asked: dict[str, int], size: tuple[int, int]
) -> None:
    plan = plan_of(LED, inputs=[image(png(*own)), PHOTO], **asked)
    assert (plan.images[0].width, plan.images[0].height) == size


def test_keyframes_are_kept_in_their_order_and_have_no_strength() -> None:
    files = [png(64, 64, "L"), png(64, 64, "RGB"), png(64, 64, "1")]
    plan = plan_of(LED, inputs=[image(data) for data in files])
    assert plan.inputs.keyframes == tuple(files)
    assert (plan.inputs.image, plan.strength) == (b"", 1.0)
    assert [each.sha256 for each in plan.images[0].inputs] == [hashlib.sha256(data).digest() for data in files]
    assert not plan.images[0].HasField("strength")


def test_every_keyframe_is_opened_before_any_stage_is_called() -> None:
    with pytest.raises(InvalidRequestError, match=r"inputs\[1\].data: \(MEDIA_ROLE_IMAGE\) a picture file must be"):
        plan_of(LED, inputs=[PHOTO, image(b"no picture")])


@pytest.mark.parametrize(
    ("given", "asked", "expected"),
    [
        (film(9), {}, (64, 64, 9, 24.0)),
        (film(12), {}, (64, 64, 9, 24.0)),
        (film(12), {"num_frames": 5, "fps": 8}, (64, 64, 5, 8.0)),
        (film(5, (100, 75), 30), {}, (96, 80, 5, 30.0)),
        (film(5, (50, 100)), {"width": 64}, (64, 128, 5, 24.0)),
        (film(1, (64, 64), 240), {}, (64, 64, 1, 120.0)),
    ],
)
def test_the_film_says_what_the_request_does_not(
    given: work.MediaInput, asked: dict[str, int], expected: tuple[int, int, int, float]
) -> None:
    parameters = film_plan(given, **asked).images[0]
    assert (parameters.width, parameters.height, parameters.num_frames, parameters.fps) == expected
    assert parameters.strength == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("given", "asked", "sentence"),
    [
        (film(8), {"num_frames": 9}, "num_frames: is 9 and the film has 8: ask for 5, or give a longer film"),
        (film(30), {}, "num_frames: the film has 30, and one of 64x64 may have 17: give num_frames"),
        (film(30), {"num_frames": 21, "width": 64, "height": 64}, "num_frames: is 21; a film of this size may have 17"),
        (film(17, (128, 96)), {"num_frames": 17}, "num_frames: is 17; a film of this size may have 1:"),
        (film(1, (32, 32)), {}, "width: the input has 32x32 pixels, which makes 32x32; give a width and a height"),
        (work.MediaInput(role=work.MEDIA_ROLE_VIDEO), {}, r"inputs\[0\].data: \(MEDIA_ROLE_VIDEO\) must be an MP4"),
        (PHOTO, {}, r"inputs\[0\].role: is MEDIA_ROLE_IMAGE; model 'sd15' takes MEDIA_ROLE_VIDEO"),
    ],
)
def test_what_no_film_can_be_made_of_is_refused(given: work.MediaInput, asked: dict[str, int], sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        film_plan(given, **asked)


def test_a_film_beyond_the_limit_is_refused_unopened() -> None:
    request = GenerateRequest(inputs=[work.MediaInput(role=work.MEDIA_ROLE_VIDEO, data=b"x" * 11)])
    with pytest.raises(InvalidRequestError, match=r"inputs\[0\].data: has 11 bytes, not up to 10: make it smaller"):
        with_measures_of_inputs(request, FILMS, 10)


def test_the_work_of_encoding_a_film_is_its_plane_for_each_latent_frame() -> None:
    encode = request_work(film_plan(film(9)), 20).encode_image
    assert encode is not None
    assert (encode.latent_shape, encode.passes) == ((8, 8), 3)
