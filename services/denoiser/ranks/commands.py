"""What the service asks of the ranks, and what they answer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from services.common.manifest import ModelEntry
from services.common.parallel_degrees import ParallelDegrees
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.previews import LatentPreviewMap
from services.denoiser.sampling.model_sampling import ModelSampling
from services.modeling.lora.adapter import Match


@dataclass(frozen=True)
class Load:
    """Join the group and read the network; the first command. Answered with `Loaded`.

    Args:
        entry: the model, with paths on this machine.
        degrees: in which ways the ranks share it.
        rank: of the process.
        device: of the process.
        threads: of a CPU computation.
        store: host and port at which the ranks meet.
        log_level: as in the settings.
    """

    entry: ModelEntry
    degrees: ParallelDegrees
    rank: int
    device: str
    threads: int
    store: tuple[str, int]
    log_level: str


@dataclass(frozen=True)
class Loaded:
    """What the service has to know of a network that it does not hold; see `Denoiser`.

    Args:
        description: a serialised ModelDescription.
        sampling: see `Denoiser`.
        fingerprint: see `Denoiser`.
        preview_map: see `Denoiser`.
        example_conditioning: see `Denoiser`.
        resident_bytes: of weights on the rank's device.
    """

    description: bytes
    sampling: ModelSampling
    fingerprint: str
    preview_map: LatentPreviewMap | None
    example_conditioning: Mapping[str, Tensor]
    resident_bytes: int


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA at a scale, as a rank finds it: by what it has read of that fingerprint, else in the file."""

    name: str
    path: str
    fingerprint: str
    scale: float


RowFiles: TypeAlias = tuple[AdapterFile, ...]
"""What one row applies."""


@dataclass(frozen=True)
class Prepare:
    """Prepare a conditioning, and keep it under the number. Answered with its batch key."""

    number: int
    conditioning: PromptConditioning
    adapters: RowFiles


@dataclass(frozen=True)
class Predict:
    """Compute the rows of a batch. Answered by the first rank of each group of rows with its rows' predictions.

    Args:
        latents: of each row, as `Denoiser.predict` takes them.
        timesteps: of each row.
        rows: numbers of the rows' prepared conditionings.
        adapters: of each row.
        max_fused_bytes: that a set of adapters within the weights may take; 0: none is.
    """

    latents: Tensor
    timesteps: Tensor
    rows: tuple[int, ...]
    adapters: tuple[RowFiles, ...]
    max_fused_bytes: int


@dataclass(frozen=True)
class ReadAdapter:
    """Read a LoRA's file, and keep it. Answered with `AdapterReading`."""

    name: str
    path: str


@dataclass(frozen=True)
class AdapterReading:
    """What a rank made of a LoRA's file; see `Adapter`."""

    fingerprint: str
    match: Match
    nbytes: int


@dataclass(frozen=True)
class Leave:
    """There is no work: what need not stay on the device leaves it. Answered with the bytes of weights that stay."""


Command: TypeAlias = Load | Prepare | Predict | ReadAdapter | Leave
Answer: TypeAlias = Loaded | AdapterReading | Tensor | Hashable


@dataclass(frozen=True)
class Order:
    """A command, and what is still held of what the ranks keep: all else is dropped first.

    Args:
        command: to be obeyed.
        prepared: numbers of prepared conditionings.
        adapters: fingerprints.
    """

    command: Command
    prepared: frozenset[int] = frozenset()
    adapters: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Failed:
    """The answer of a rank that could not obey."""

    error: Exception
