"""One step of a stack of FLUX.1's blocks at their real width: ours against diffusers'.

3072 channels, 24 heads, two double and four single blocks (of FLUX.1's 19 and 38), 1,024 tokens of a 512x512 picture
and 512 of text. Both have the same random weights and inputs and take turns in one process (bench/in_turns.py). The
errors are against diffusers in float32 with the same, already rounded, weights; time and guidance scale are such as
bfloat16 has exactly. On a CPU that is slower in bfloat16 than in float32, ours computes in float32 when it is asked for
bfloat16, as a denoiser does; the report says so. In float32 the two need 11 GB of memory together.

    OMP_WAIT_POLICY=PASSIVE python -m bench.flux_step --dtype bfloat16 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from bench.in_turns import Step, Timing, ratios, relative_error, summary, time_in_turns
from services.denoiser.models.flux_dit import FluxDiT, load_flux_dit, to_tokens
from services.modeling.components import resolve_dtype
from services.modeling.placement import Placement, place
from services.modeling.weights import open_checkpoint

LATENT_SIDE, TEXT_TOKENS = 64, 512
TIME, GUIDANCE = 0.5, 4.0
# Queries and keys are normed; weights of one would give attention logits a deviation of 1.
NORM_WEIGHT = 1.5

REAL: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 4,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
TINY: dict[str, Any] = REAL | {
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "axes_dims_rope": (4, 14, 14),
}


@dataclass(frozen=True)
class Inputs:
    """Latents [1, 16, h, w], T5's embeddings [1, L, D] and CLIP's [1, D'], of one dtype."""

    latents: Tensor
    embeds: Tensor
    pooled: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same in another dtype."""
        return Inputs(*(tensor.to(dtype) for tensor in (self.latents, self.embeds, self.pooled)))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was run, the timings, and errors max|a - b| / max|b|: against float32, and of ours against theirs."""

    torch: str
    dtype: str
    ours_dtype: str
    threads: int
    theirs: Timing
    ours: Timing
    theirs_error: float
    ours_error: float
    difference: float


def main() -> None:
    """Runs the comparison and prints it."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        result = compare(options)
    sys.stdout.write(report(result))
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after one that isn't timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a stack of 64 channels, to try the script out")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def compare(options: argparse.Namespace) -> Result:
    """Builds both networks, measures their errors and times them in turns."""
    dtype, ours_dtype = getattr(torch, options.dtype), resolve_dtype(options.dtype, torch.device("cpu"))
    theirs, inputs = reference(TINY if options.tiny else REAL, dtype)
    ours = same_in_ours(theirs, ours_dtype)
    exact = their_step(theirs.float(), inputs.to(torch.float32))
    theirs, our_inputs = theirs.to(dtype), inputs.to(ours_dtype)
    scale = torch.tensor([GUIDANCE])
    context = ours.prepare(our_inputs.embeds, our_inputs.pooled, scale, our_inputs.latents.shape[-2:])
    timesteps = torch.tensor([1000 * TIME])
    steps: tuple[Step, Step] = (
        lambda: their_step(theirs, inputs),
        lambda: to_tokens(ours(our_inputs.latents, timesteps, context)),
    )
    theirs_output, ours_output = (step().float() for step in steps)
    theirs_timing, ours_timing = time_in_turns(steps, options.rounds)
    return Result(
        torch=torch.__version__,
        dtype=options.dtype,
        ours_dtype=str(ours_dtype).removeprefix("torch."),
        threads=options.threads,
        theirs=theirs_timing,
        ours=ours_timing,
        theirs_error=relative_error(theirs_output, exact),
        ours_error=relative_error(ours_output, exact),
        difference=relative_error(ours_output, theirs_output),
    )


def reference(config: dict[str, Any], dtype: torch.dtype) -> tuple[FluxTransformer2DModel, Inputs]:
    """diffusers' network and the inputs, in `dtype`."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # the weights are never there in float32 as well
    theirs = FluxTransformer2DModel(**config).eval()
    torch.set_default_dtype(before)
    for name, parameter in theirs.named_parameters():
        if "attn.norm" in name:
            parameter.fill_(NORM_WEIGHT)
    inputs = Inputs(
        torch.randn(1, theirs.config.in_channels // 4, LATENT_SIDE, LATENT_SIDE),
        torch.randn(1, TEXT_TOKENS, theirs.config.joint_attention_dim),
        torch.randn(1, theirs.config.pooled_projection_dim),
    )
    return theirs, inputs.to(dtype)


def same_in_ours(theirs: FluxTransformer2DModel, dtype: torch.dtype) -> FluxDiT:
    """Our network with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        placement = Placement(device=torch.device("cpu"), dtype=dtype)
        dit = load_flux_dit(open_checkpoint(Path(folder)), theirs.config, device=placement.device, dtype=dtype)
    return place(dit, placement, dit.weight_blocks()).network


def their_step(theirs: FluxTransformer2DModel, inputs: Inputs) -> Tensor:
    """The velocity [1, S, 64] by diffusers."""
    dtype = inputs.latents.dtype
    side = torch.arange(LATENT_SIDE // 2)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    velocity: Tensor = theirs(
        hidden_states=to_tokens(inputs.latents),
        encoder_hidden_states=inputs.embeds,
        pooled_projections=inputs.pooled,
        timestep=torch.tensor([TIME], dtype=dtype),
        guidance=torch.tensor([GUIDANCE]),
        img_ids=positions,
        txt_ids=torch.zeros(TEXT_TOKENS, 3),
    ).sample
    return velocity


def report(result: Result) -> str:
    """The result as a small table."""
    theirs, ours = result.theirs, result.ours
    lines = [
        f"FLUX.1 stack, 1 step, {result.dtype}, {result.threads} threads, torch {result.torch}; "
        f"median (min to max) of {len(ours.wall)} rounds",
        f"{'':11}{'wall s':>24}{'CPU s':>24}{'error':>10}",
        f"{'diffusers':11}{summary(theirs.wall)}{summary(theirs.cpu)}{result.theirs_error:10.1e}",
        f"{'safelight':11}{summary(ours.wall)}{summary(ours.cpu)}{result.ours_error:10.1e}",
        f"{'ratio':11}{summary(ratios(ours, theirs, 'wall'))}{summary(ratios(ours, theirs, 'cpu'))}"
        f"{result.difference:10.1e}",
        f"safelight computed in {result.ours_dtype}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
