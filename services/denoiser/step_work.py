"""What the scheduler knows of a request: what it came with, and how far it is."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.denoiser.cost_curve import StepCosts

Request = TypeVar("Request", bound=Hashable)


@dataclass(frozen=True)
class StepNeeds(Generic[Request]):
    """What a request comes with.

    Args:
        request: its identity.
        batch_key: requests of equal key (model, latent shape, length of the conditioning) can share a forward pass.
        rows: rows it takes of a forward pass.
        steps: model calls still to do, each of them a step for the scheduler.
        tenant: whose share of the device its steps count against.
        priority: higher goes first among the work of one tenant.
        deadline: seconds, on the clock of the scheduler's `now`, after which the result is worthless; None: never.
        alone: shares a forward pass with nobody, and its own rows run one by one.
        resumed: it has taken steps at another replica, which was lost.
    """

    request: Request
    batch_key: Hashable
    rows: int
    steps: int
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    alone: bool = False
    resumed: bool = False


@dataclass(eq=False)
class StepWork(Generic[Request]):
    """A request in the scheduler.

    Args:
        needs: what it came with.
        arrived: seconds on the scheduler's clock.
        left: steps still to do.
        started: it has taken a step.
        spilled: its latents have left the device.
    """

    needs: StepNeeds[Request]
    arrived: float
    left: int
    started: bool = False
    spilled: bool = False

    @property
    def is_interrupted(self) -> bool:
        """It has taken steps elsewhere, and none since."""
        return self.needs.resumed and not self.started

    def step_seconds(self, costs: StepCosts) -> float:
        """Seconds of one of its steps when nobody shares it."""
        if self.needs.alone:
            return self.needs.rows * costs.seconds(self.needs.batch_key, 1)
        return costs.seconds(self.needs.batch_key, self.needs.rows)
