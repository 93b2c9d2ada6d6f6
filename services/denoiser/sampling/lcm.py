"""LCM: each step goes to the model's x0 prediction and noises it anew, as consistency models are sampled."""

from __future__ import annotations

from services.denoiser.sampling.step import StepInputs, StepOutput


def lcm(step: StepInputs) -> StepOutput:
    """One step of multistep consistency sampling (Song et al. 2023, Algorithm 1; Luo et al. 2023, LCM).

    The boundary scalings by which diffusers mixes x into x0 differ from 0 and 1 by less than 1e-5 at LCM's timesteps
    and are left out.
    """
    i_next = step.i + 1
    return StepOutput(step.plan.alphas[i_next] * step.denoised, step.plan.sigmas[i_next])
