"""From the gateway's stream to the user's events, the files collected on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from google.protobuf.timestamp_pb2 import Timestamp

from safelight.errors import InternalError
from safelight.messages import FORMATS, INPUT_ROLES
from safelight.receipt import Receipt, StageSeconds
from safelight.types import Accepted, Event, GeneratedImage, GenerationResult, Preview, Progress, Queued
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import work_pb2

_FORMAT_NAMES = {number: name for name, number in FORMATS.items()}
_ROLE_NAMES = {number: name for name, number in INPUT_ROLES.items()}


@dataclass
class _File:
    """A file on its way."""

    media_type: str
    data: bytearray = field(default_factory=bytearray)


class EventReader:
    """Turns the responses of one run of a request into events."""

    def __init__(self) -> None:
        self._request_id = ""
        self._files: dict[int, _File] = {}

    def read(self, response: pb.GenerateResponse) -> Event | None:
        """The event of a response; None if it only brought a piece of a file.

        Raises:
            InternalError: a file has a gap, or is not the one that the gateway sent.
        """
        kind = response.WhichOneof("event")
        if kind == "chunk":
            self._collect(response.chunk)
        elif kind == "accepted":
            return self._accepted(response.accepted)
        elif kind == "queued":
            return Queued(response.queued.image_index, response.queued.stage, response.queued.position)
        elif kind == "progress":
            progress = response.progress
            return Progress(progress.image_index, progress.stage, progress.step, progress.steps)
        elif kind == "preview":
            preview = response.preview
            return Preview(preview.image_index, preview.step, preview.data, preview.media_type)
        elif kind == "result":
            return self._result(response.result)
        return None  # a piece of a file, or an event of a later release

    def _accepted(self, accepted: pb.GenerateAccepted) -> Accepted:
        self._request_id = accepted.request_id
        seeds = tuple(image.seed for image in accepted.images)
        return Accepted(accepted.request_id, seeds, accepted.estimated_seconds or None)

    def _collect(self, chunk: work_pb2.FileChunk) -> None:
        if chunk.offset == 0:
            self._files[chunk.file_index] = _File(chunk.media_type)
        file = self._files.get(chunk.file_index)
        if file is None or chunk.offset != len(file.data):
            raise InternalError(f"picture {chunk.file_index} came with a gap before byte {chunk.offset}")
        file.data += chunk.data

    def _result(self, result: pb.GenerateResult) -> GenerationResult:
        completed_at = _iso(result.completed_at)
        return GenerationResult(
            self._request_id, tuple(self._image(receipt, completed_at) for receipt in result.images)
        )

    def _image(self, receipt: pb.ImageReceipt, completed_at: str) -> GeneratedImage:
        file = self._files.get(receipt.image_index)
        if file is None:
            raise InternalError(f"picture {receipt.image_index} came without its file")
        data, parameters = bytes(file.data), receipt.parameters
        known = self._receipt(receipt, completed_at, file.media_type, data)
        return GeneratedImage(
            data=data,
            media_type=file.media_type,
            seed=parameters.seed,
            model=parameters.model,
            width=parameters.width,
            height=parameters.height,
            steps=receipt.steps_run,
            steps_recomputed=receipt.steps_recomputed,
            steps_saved=receipt.steps_saved,
            determinism=known.determinism,
            stages=known.stages,
            token_count=receipt.token_count,
            truncated_prompt=receipt.truncated_prompt,
            truncated_negative_prompt=receipt.truncated_negative_prompt,
            fingerprints=known.fingerprints,
            receipt=known,
        )

    def _receipt(self, receipt: pb.ImageReceipt, completed_at: str, media_type: str, data: bytes) -> Receipt:
        parameters, sampling, output = receipt.parameters, receipt.parameters.sampling, receipt.output
        sizes, told_sizes = parameters.size_conditioning, parameters.HasField("size_conditioning")
        return Receipt(
            request_id=self._request_id,
            completed_at=completed_at,
            prompt=parameters.prompt,
            negative_prompt=parameters.negative_prompt,
            model=parameters.model,
            width=parameters.width,
            height=parameters.height,
            steps=sampling.steps,
            sampler=sampling.sampler,
            sampler_parameters=dict(sampling.sampler_parameters),
            schedule=sampling.schedule,
            schedule_parameters=dict(sampling.schedule_parameters),
            guidance_scale=parameters.guidance.scale,
            distilled_guidance_scale=_distilled_scale(parameters.guidance),
            clip_skip=parameters.clip_skip,
            adapters={each.name: round(each.scale, 6) for each in parameters.adapters},
            adapter_fingerprints={each.name: each.fingerprint for each in parameters.adapters},
            original_size=(sizes.original_width, sizes.original_height) if told_sizes else None,
            crop=(sizes.crop_left, sizes.crop_top) if told_sizes else None,
            target_size=(sizes.target_width, sizes.target_height) if told_sizes else None,
            seed=parameters.seed,
            strength=round(parameters.strength, 6) if parameters.HasField("strength") else None,
            inputs=_digests(parameters.inputs),
            num_frames=parameters.num_frames or None,
            fps=parameters.fps or None,
            format=_FORMAT_NAMES.get(output.format, "png"),
            quality=output.quality or None,
            metadata=not output.omit_metadata,
            determinism="exact" if receipt.determinism == work_pb2.DETERMINISM_CLASS_EXACT else "default",
            fingerprints=dict(parameters.fingerprints),
            steps_run=receipt.steps_run,
            steps_recomputed=receipt.steps_recomputed,
            steps_saved=receipt.steps_saved,
            stages=_stages(receipt.timings),
            media_type=media_type,
            file_size=len(data),
            file_sha256=_checked_sha256(data, receipt),
            client_version=_client_version(),
        )


def _digests(inputs: Iterable[work_pb2.MediaDigest]) -> dict[str, str]:
    """SHA-256 of each input by what it is; of several alike, the second is "image-2"."""
    found: dict[str, str] = {}
    for each in inputs:
        name = _ROLE_NAMES.get(each.role, str(each.role))
        count = sum(known.split("-")[0] == name for known in found)
        found[f"{name}-{count + 1}" if count else name] = each.sha256.hex()
    return found


def _distilled_scale(guidance: work_pb2.GuidanceOptions) -> float | None:
    return guidance.distilled_scale if guidance.HasField("distilled_scale") else None


def _checked_sha256(data: bytes, receipt: pb.ImageReceipt) -> str:
    """The SHA-256 of a file in hexadecimal.

    Raises:
        InternalError: it is not the file that was written.
    """
    digest = hashlib.sha256(data)
    written = receipt.file_sha256
    if written and written != digest.digest():
        raise InternalError(f"picture {receipt.image_index} was damaged on its way: its SHA-256 differs")
    return digest.hexdigest()


def _stages(timings: Iterable[work_pb2.StageTiming]) -> tuple[StageSeconds, ...]:
    return tuple(
        StageSeconds(
            timing.stage,
            timing.replica,
            timing.queue_seconds,
            timing.compute_seconds,
            timing.steps,
            timing.received_bytes,
        )
        for timing in timings
    )


def _iso(moment: Timestamp) -> str:
    return datetime.fromtimestamp(moment.ToNanoseconds() / 1e9, timezone.utc).isoformat(timespec="milliseconds")


@cache
def _client_version() -> str:
    try:
        return version("safelight")
    except PackageNotFoundError:
        return ""
