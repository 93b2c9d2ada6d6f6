"""From the gateway's stream to events: files are whole or an error, and a result carries its receipt."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from PIL import Image

from safelight import Accepted, GenerationResult, InternalError, Preview, Progress, Queued, StageSeconds
from safelight.event_reader import EventReader
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import work_pb2 as work

PARAMETERS = work.GenerationParameters(
    prompt="a cat",
    negative_prompt="a dog",
    model="sd15",
    width=64,
    height=72,
    sampling=work.SamplingOptions(
        sampler="ddim",
        sampler_parameters={"eta": 0.5},
        schedule="karras",
        schedule_parameters={"rho": 5.0},
        steps=7,
        min_steps=4,
    ),
    guidance=work.GuidanceOptions(scale=3.5),
    clip_skip=2,
    seed=5,
    fingerprints={"denoiser": "5f0c"},
    size_conditioning=work.SizeConditioning(original_width=640, original_height=720, target_width=64, target_height=72),
)
TIMING = work.StageTiming(
    stage="denoiser", replica="a:1", queue_seconds=0.5, compute_seconds=2.0, steps=9, received_bytes=4096
)


def chunk(data: bytes, offset: int = 0, index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        chunk=work.FileChunk(file_index=index, data=data, offset=offset, media_type="" if offset else "image/jpeg")
    )


def result(**fields: Any) -> pb.GenerateResponse:
    receipt = pb.ImageReceipt(parameters=PARAMETERS, timings=[TIMING], **fields)
    return pb.GenerateResponse(
        result=pb.GenerateResult(images=[receipt], completed_at=Timestamp(seconds=1_800_000_000))
    )


def read(*responses: pb.GenerateResponse) -> GenerationResult:
    """The last event of a stream."""
    reader = EventReader()
    last = [reader.read(response) for response in responses][-1]
    assert isinstance(last, GenerationResult)
    return last


def test_events_are_told_as_they_are() -> None:
    reader = EventReader()
    accepted = pb.GenerateAccepted(request_id="id", images=[PARAMETERS], estimated_seconds=1.5)
    queued = pb.GenerateQueued(image_index=1, stage="denoiser", position=3)
    progress = pb.GenerateProgress(stage="denoiser", step=1, steps=2)
    assert reader.read(pb.GenerateResponse(accepted=accepted)) == Accepted("id", (5,), 1.5)
    assert reader.read(pb.GenerateResponse(queued=queued)) == Queued(1, "denoiser", 3)
    assert reader.read(pb.GenerateResponse(progress=progress)) == Progress(0, "denoiser", 1, 2)


def test_without_an_estimate_there_is_none() -> None:
    assert EventReader().read(pb.GenerateResponse(accepted=pb.GenerateAccepted())) == Accepted("", (), None)


def test_a_preview_is_a_picture() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 9), "red").save(file, "webp", lossless=True)
    response = pb.GeneratePreview(image_index=1, step=4, data=file.getvalue(), media_type="image/webp")
    preview = EventReader().read(pb.GenerateResponse(preview=response))
    assert isinstance(preview, Preview)
    assert (preview.image_index, preview.step, preview.media_type) == (1, 4, "image/webp")
    assert (preview.image.size, preview.image.getpixel((0, 0))) == ((8, 9), (255, 0, 0))


def test_pieces_of_several_files_become_the_files() -> None:
    reader = EventReader()
    pieces = [chunk(b"ab"), chunk(b"uv", index=1), chunk(b"cd", 2), chunk(b"wx", 2, index=1)]
    assert [reader.read(piece) for piece in pieces] == [None] * 4
    receipts = [pb.ImageReceipt(image_index=index) for index in (0, 1)]
    last = reader.read(pb.GenerateResponse(result=pb.GenerateResult(images=receipts)))
    assert isinstance(last, GenerationResult)
    assert [image.data for image in last.images] == [b"abcd", b"uvwx"]


def test_a_piece_at_the_beginning_begins_the_file_again() -> None:
    assert read(chunk(b"old"), chunk(b"older", 3), chunk(b"new"), chunk(b"er", 3), result()).images[0].data == b"newer"


@pytest.mark.parametrize(
    "pieces", [[chunk(b"b", 1)], [chunk(b"a"), chunk(b"c", 2)], [chunk(b"ab"), chunk(b"b", 1)]], ids=str
)
def test_a_gap_in_a_file_is_an_error(pieces: list[pb.GenerateResponse]) -> None:
    with pytest.raises(InternalError, match=r"picture 0 came with a gap before byte \d"):
        read(*pieces, result())


def test_a_file_that_is_not_the_one_written_is_an_error() -> None:
    with pytest.raises(InternalError, match="picture 0 was damaged"):
        read(chunk(b"ab"), result(file_sha256=hashlib.sha256(b"abc").digest()))


def test_a_picture_without_its_file_is_an_error() -> None:
    with pytest.raises(InternalError, match="picture 0 came without its file"):
        read(result())


def test_an_event_of_a_later_release_is_passed_over() -> None:
    assert EventReader().read(pb.GenerateResponse()) is None


def test_a_result_says_what_it_cost_and_how_equal_another_run_will_be() -> None:
    image = read(
        chunk(b"ab"),
        result(steps_run=9, steps_recomputed=2, steps_saved=3, determinism=work.DETERMINISM_CLASS_EXACT, token_count=4),
    ).images[0]
    assert (image.steps, image.steps_recomputed, image.steps_saved, image.determinism) == (9, 2, 3, "exact")
    assert image.stages == (StageSeconds("denoiser", "a:1", 0.5, 2.0, 9, 4096),)
    assert (image.data, image.media_type, image.seed, image.token_count) == (b"ab", "image/jpeg", 5, 4)


def test_a_receipt_has_all_that_the_picture_was_made_with() -> None:
    output = work.OutputOptions(format=work.OUTPUT_FORMAT_JPEG, quality=80, omit_metadata=True)
    accepted = pb.GenerateResponse(accepted=pb.GenerateAccepted(request_id="id"))
    receipt = read(accepted, chunk(b"ab"), result(output=output, steps_run=7)).images[0].receipt
    assert receipt.file_sha256 == hashlib.sha256(b"ab").hexdigest()
    assert (receipt.request_id, receipt.completed_at) == ("id", "2027-01-15T08:00:00.000+00:00")
    assert (receipt.media_type, receipt.file_size, receipt.determinism) == ("image/jpeg", 2, "default")
    assert (receipt.fingerprints, receipt.steps_run) == ({"denoiser": "5f0c"}, 7)
    options = receipt.options()
    assert (options.format, options.quality, options.metadata) == ("jpeg", 80, False)
    assert (options.prompt, options.negative_prompt, options.model) == ("a cat", "a dog", "sd15")
    assert (options.width, options.height, options.steps, options.min_steps) == (64, 72, 7, None)
    assert (options.sampler, options.sampler_parameters) == ("ddim", {"eta": 0.5})
    assert (options.schedule, options.schedule_parameters) == ("karras", {"rho": 5.0})
    assert (options.guidance_scale, options.clip_skip, options.seed) == (3.5, 2, 5)
    assert (options.original_size, options.crop, options.target_size) == ((640, 720), (0, 0), (64, 72))
