"""What both trainings share: a learning rate that follows the clock, and checkpoints that survive a kill.

The budget of this model is a time on a CPU, not a number of epochs, so the schedules count seconds, not steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_EVERY_SECONDS = 90.0
# A process that somebody stopped for a while (SIGSTOP) does not lose its budget.
LONGEST_STEP_SECONDS = 5.0


def learning_rate_factor(done: float, warm_up: float) -> float:
    """Linear warm-up over the first `warm_up` of the budget, then a cosine to zero; `done` runs from 0 to 1."""
    if done < warm_up:
        return max(done / warm_up, 0.01)
    return 0.5 * (1.0 + math.cos(math.pi * min((done - warm_up) / (1.0 - warm_up), 1.0)))


@dataclass
class Clock:
    """Where a run stands. Only time spent training counts: a pause between two runs of a resumed training does not."""

    budget: float
    step: int = 0
    seconds: float = 0.0
    average_loss: float = 0.0
    _last: float = field(default_factory=time.monotonic)
    _last_saved: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> float:
        """The share of the budget that is spent."""
        return self.seconds / self.budget

    def tick(self, loss: float) -> None:
        """Counts one step."""
        now = time.monotonic()
        self.average_loss = 0.98 * self.average_loss + 0.02 * loss if self.step else loss
        self.seconds += min(now - self._last, LONGEST_STEP_SECONDS)
        self.step, self._last = self.step + 1, now

    def checkpoint_due(self) -> bool:
        """Says, once per interval, that it is time to save."""
        due = time.monotonic() - self._last_saved > CHECKPOINT_EVERY_SECONDS
        if due:
            self._last_saved = time.monotonic()
        return due

    def report(self, every: int) -> None:
        """Prints a line each `every` steps."""
        if self.step % every == 0:
            print(f"step {self.step} minute {self.seconds / 60:.1f} loss {self.average_loss:.4f}", flush=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def save_checkpoint(path: Path, clock: Clock, states: Mapping[str, Any]) -> None:
    """Writes the checkpoint beside its final name and renames it, so that a kill never leaves half a file."""
    temporary = path.with_suffix(".tmp")
    torch.save({**states, "step": clock.step, "seconds": clock.seconds, "average_loss": clock.average_loss}, temporary)
    temporary.replace(path)


def load_states(path: Path) -> dict[str, Any]:
    """Reads a checkpoint."""
    states: dict[str, Any] = torch.load(path, weights_only=True)
    return states


def load_checkpoint(path: Path, clock: Clock) -> dict[str, Any] | None:
    """Restores the clock and returns the saved states; None where there is nothing to resume."""
    if not path.exists():
        return None
    states = load_states(path)
    clock.step, clock.seconds, clock.average_loss = states["step"], states["seconds"], states["average_loss"]
    return states
