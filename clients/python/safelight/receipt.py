"""What made a picture and what it cost: enough to make it again, bit for bit in the exact class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from safelight.errors import InvalidRequestError
from safelight.options import GenerationOptions

VERSION = 1
"""Version of the receipt's JSON; another one is refused."""

_VERSION_FIELD = "safelight_receipt"


@dataclass(frozen=True)
class StageSeconds:
    """What one replica of a stage spent on a picture.

    Args:
        stage: "encoder", "denoiser" or "decoder".
        replica: its address.
        queue_seconds: time waited there.
        compute_seconds: time computed.
        steps: denoising steps computed; 0 at other stages.
        received_bytes: tensor bytes that it took from other processes.
    """

    stage: str
    replica: str
    queue_seconds: float
    compute_seconds: float
    steps: int
    received_bytes: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Everything that one picture was made with, and what came of it.

    Args:
        request_id: names the request in the logs of every stage.
        completed_at: when its last file was complete, by the gateway's clock: ISO 8601 in UTC.
        prompt: and the other fields of GenerationOptions: as they were used, all defaults filled in.
        inputs: SHA-256, in hexadecimal, of the files that it started from, by what they are: "image", "mask", "video";
            of several pictures the others are "image-2", "image-3" …
        fingerprints: of the weights, by stage.
        determinism: how equal another run will be, "exact" or "default".
        steps: of the sampler's schedule.
        steps_run: computed on all replicas together.
        steps_recomputed: computed twice, because a replica was lost.
        steps_saved: left out under load, as `min_steps` allowed.
        stages: the replicas on its way, in order, those that were lost included.
        media_type: of the file.
        file_size: in bytes.
        file_sha256: of the file, in hexadecimal.
        client_version: of the SDK that wrote the receipt; empty in a checkout that is not installed.
    """

    request_id: str
    completed_at: str
    prompt: str
    negative_prompt: str
    model: str
    width: int
    height: int
    steps: int
    sampler: str
    sampler_parameters: Mapping[str, float]
    schedule: str
    schedule_parameters: Mapping[str, float]
    guidance_scale: float
    distilled_guidance_scale: float | None
    clip_skip: int
    adapters: Mapping[str, float]
    adapter_fingerprints: Mapping[str, str]
    original_size: tuple[int, int] | None
    crop: tuple[int, int] | None
    target_size: tuple[int, int] | None
    seed: int
    strength: float | None
    inputs: Mapping[str, str]
    num_frames: int | None
    fps: float | None
    format: str
    quality: int | None
    metadata: bool
    determinism: str
    fingerprints: Mapping[str, str]
    steps_run: int
    steps_recomputed: int
    steps_saved: int
    stages: tuple[StageSeconds, ...]
    media_type: str
    file_size: int
    file_sha256: str
    client_version: str

    def options(self) -> GenerationOptions:
        """The options that make the picture again, but for the files that it started from: see `inputs`."""
        names = {each.name for each in fields(GenerationOptions)} & {each.name for each in fields(self)}
        return GenerationOptions(**{name: getattr(self, name) for name in names})

    def stages_with_other_weights(self, fingerprints: Mapping[str, str]) -> list[str]:
        """The stages whose weights are not those that made the picture."""
        return [stage for stage, known in sorted(self.fingerprints.items()) if fingerprints.get(stage) != known]

    def is_of(self, file: bytes) -> bool:
        """Whether a file is the one that the receipt was written for, bit for bit."""
        return (len(file), hashlib.sha256(file).hexdigest()) == (self.file_size, self.file_sha256)

    def to_json(self) -> str:
        """The receipt as a JSON object that `from_json` reads."""
        return json.dumps({_VERSION_FIELD: VERSION, **asdict(self)}, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """The receipt that `to_json` wrote.

        Raises:
            InvalidRequestError: it is none; the message names the field.
        """
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError.of("receipt", f"is no JSON: {error}") from error
        if not isinstance(values, dict) or _VERSION_FIELD not in values:
            raise InvalidRequestError.of("receipt", f"has no field {_VERSION_FIELD}; give a file that --receipt wrote")
        version = values.pop(_VERSION_FIELD)
        if version != VERSION or isinstance(version, bool):
            raise InvalidRequestError.of(_VERSION_FIELD, f"is {version!r}; this release reads {VERSION}")
        receipt: Receipt = _read(Receipt, values, "receipt")
        return receipt


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _read(kind: type[Any], values: object, place: str) -> Any:
    """A dataclass from a JSON object that has all of its fields and no other."""
    if not isinstance(values, dict):
        raise InvalidRequestError.of(place, "must be an object")
    known = {each.name: str(each.type) for each in fields(kind)}
    for name in values:
        if name not in known:
            raise InvalidRequestError.of(f"{place}.{name}", "is not a field of a receipt; take it out")
    for name in known:
        if name not in values:
            raise InvalidRequestError.of(f"{place}.{name}", "is missing; give a receipt that is whole")
    return kind(**{name: _READERS[known[name]](values[name], f"{place}.{name}") for name in known})


def _one(*kinds: type) -> Callable[[object, str], Any]:
    """Reads a value of one of the types."""

    def read(value: object, place: str) -> Any:
        if type(value) not in kinds:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise InvalidRequestError.of(place, f"is {value!r}; must be of type {names}")
        return value

    return read


def _map(*kinds: type) -> Callable[[object, str], Any]:
    """Reads an object whose values are of one of the types."""

    def read(value: object, place: str) -> Any:
        if not isinstance(value, dict):
            raise InvalidRequestError.of(place, f"is {value!r}; must be an object")
        return {name: _one(*kinds)(each, f"{place}.{name}") for name, each in value.items()}

    return read


def _pair(value: object, place: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or [type(each) for each in value] != [int, int]:
        raise InvalidRequestError.of(place, f"is {value!r}; must be a list of two whole numbers, or null")
    return value[0], value[1]


def _stages(value: object, place: str) -> tuple[StageSeconds, ...]:
    if not isinstance(value, list):
        raise InvalidRequestError.of(place, f"is {value!r}; must be a list")
    return tuple(_read(StageSeconds, each, f"{place}[{index}]") for index, each in enumerate(value))


_READERS: Mapping[str, Callable[[object, str], Any]] = {
    "str": _one(str),
    "int": _one(int),
    "float": _one(float, int),
    "bool": _one(bool),
    "int | None": _one(int, type(None)),
    "float | None": _one(float, int, type(None)),
    "tuple[int, int] | None": _pair,
    "Mapping[str, float]": _map(float, int),
    "Mapping[str, str]": _map(str),
    "tuple[StageSeconds, ...]": _stages,
}
