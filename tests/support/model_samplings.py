"""Models as planning sees them: one of each kind of noise, with everything that suits it."""

from __future__ import annotations

from services.denoiser.models.scheduler_config import flow_sampling, stable_diffusion_sampling

STABLE_DIFFUSION = stable_diffusion_sampling()
FLOW = flow_sampling({"shift": 3.0}, elements_per_token=4)
