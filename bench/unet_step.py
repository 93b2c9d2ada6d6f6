"""One denoise step of a Stable Diffusion UNet (batch 2: a prompt and its negative): ours against diffusers'.

Both have the same random weights and inputs and take turns in one process, so that what else the machine does meets
both alike; on a busy machine the CPU seconds of all threads say more than the wall's. The errors are against diffusers
in float32 with the same, already rounded, weights. On a CPU that is slower in bfloat16 than in float32, ours computes
in float32 when it is asked for bfloat16, as a denoiser does (services/modeling/components.py); the report says so.

    OMP_WAIT_POLICY=PASSIVE python -m bench.unet_step --dtype bfloat16 --rounds 5
    OMP_WAIT_POLICY=PASSIVE python -m bench.unet_step --model sdxl --dtype bfloat16 --rounds 3   # 11 GB of memory

SDXL whole does not fit beside diffusers' in float32 on a small machine. `--layers 2` leaves two transformer layers of
ten in each block of the coarsest level: all the widths, and a third of the weights.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from bench.in_turns import Step, Timing, ratios, relative_error, summary, time_in_turns, timed
from services.denoiser.models.sd_unet import SDUNet, load_sd_unet
from services.denoiser.models.sd_unet_params import SIZES
from services.denoiser.models.unet_blocks import time_features
from services.modeling.components import resolve_dtype
from services.modeling.placement import Placement, place
from services.modeling.weights import open_checkpoint

TOKENS = 77
TIMESTEPS = (981.0, 981.0)
# Fresh weights give attention logits with a deviation of 0.3; trained ones are several times that.
LOGIT_GAIN = 8.0

SD15: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_TINY_SDXL = SDXL | {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 1, 1),
    "cross_attention_dim": 32,
}
MODELS = {"sd15": SD15, "sdxl": SDXL}
TINY = {
    "sd15": SD15 | {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "cross_attention_dim": 32},
    "sdxl": _TINY_SDXL,
}


class Inputs(NamedTuple):
    """Of a step: latents [2, 4, h, w], timesteps [2], context [2, L, D]; of SDXL also the pooled text and the sizes."""

    latents: Tensor
    timesteps: Tensor
    context: Tensor
    pooled: Tensor | None
    sizes: Tensor

    def theirs(self, unet: UNet2DConditionModel, dtype: torch.dtype) -> Tensor:
        """diffusers' prediction."""
        added = None if self.pooled is None else {"text_embeds": self.pooled.to(dtype), "time_ids": self.sizes}
        output = unet(self.latents.to(dtype), self.timesteps, self.context.to(dtype), added_cond_kwargs=added)
        prediction: Tensor = output.sample
        return prediction

    def added(self, unet: SDUNet) -> Tensor | None:
        """What ours adds to the time features, computed once a request."""
        if self.pooled is None:
            return None
        sizes = time_features(self.sizes.flatten(), unet.params.size_width).view(len(self.sizes), -1)
        dtype = unet.conv_in.weight.dtype
        return unet.embed_added(torch.cat([self.pooled.to(dtype), sizes.to(dtype)], dim=-1))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was run, the timings, and errors max|a - b| / max|b|: against float32, and of ours against theirs.

    dtype is what was asked for and what diffusers computed in, ours_dtype what ours computed in.
    """

    torch: str
    model: str
    dtype: str
    ours_dtype: str
    size: int
    threads: int
    theirs: Timing
    ours: Timing
    context: Timing
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
    parser.add_argument("--model", choices=list(MODELS), default="sd15")
    parser.add_argument("--layers", type=int, help="of SDXL: transformer layers in its coarsest blocks, instead of 10")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after one that isn't timed")
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a UNet of 32 to 64 channels, to try the script out")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def compare(options: argparse.Namespace) -> Result:
    """Builds both networks, measures their errors and times them in turns."""
    dtype = getattr(torch, options.dtype)
    ours_dtype = resolve_dtype(options.dtype, torch.device("cpu"))
    config = (TINY if options.tiny else MODELS)[options.model]
    if options.layers is not None:
        config = config | {"transformer_layers_per_block": (1, 2, options.layers)}
    theirs, ours, exact, inputs = prepare(config, options.size, dtype, ours_dtype)
    context_timing = Timing()
    context_kv = timed(lambda: ours.project_context(inputs.context.to(ours_dtype)), context_timing)
    added = inputs.added(ours)
    steps: tuple[Step, Step] = (
        lambda: inputs.theirs(theirs, dtype),
        lambda: ours(inputs.latents.to(ours_dtype), inputs.timesteps, context_kv, added),
    )
    theirs_output, ours_output = (step().float() for step in steps)
    theirs_timing, ours_timing = time_in_turns(steps, options.rounds)
    return Result(
        torch=torch.__version__,
        model=options.model,
        dtype=options.dtype,
        ours_dtype=str(ours_dtype).removeprefix("torch."),
        size=options.size,
        threads=options.threads,
        theirs=theirs_timing,
        ours=ours_timing,
        context=context_timing,
        theirs_error=relative_error(theirs_output, exact),
        ours_error=relative_error(ours_output, exact),
        difference=relative_error(ours_output, theirs_output),
    )


def prepare(
    config: dict[str, Any], size: int, dtype: torch.dtype, ours_dtype: torch.dtype
) -> tuple[UNet2DConditionModel, SDUNet, Tensor, Inputs]:
    """diffusers' UNet in `dtype`, ours in `ours_dtype`, the output in float32, and the inputs in `dtype`."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("attn1.to_q.weight"):
            parameter.mul_(LOGIT_GAIN)
    theirs = theirs.to(dtype)
    inputs = make_inputs(config, size, dtype)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        exact = inputs.theirs(theirs.float(), torch.float32)  # before ours is loaded: they don't fit together
        theirs.to(dtype)
        placement = Placement(device=torch.device("cpu"), dtype=ours_dtype)
        ours = load_sd_unet(open_checkpoint(Path(folder)), theirs.config, device=placement.device, dtype=ours_dtype)
        place(ours, placement, ours.weight_blocks())
    return theirs, ours, exact, inputs


def make_inputs(config: dict[str, Any], size: int, dtype: torch.dtype) -> Inputs:
    """Random ones, in `dtype`, for a picture of size x size pixels."""
    sizes_width = SIZES * config.get("addition_time_embed_dim", 0)
    pooled_width = config.get("projection_class_embeddings_input_dim", 0) - sizes_width
    return Inputs(
        torch.randn(2, 4, size // 8, size // 8).to(dtype),
        torch.tensor(TIMESTEPS),
        torch.randn(2, TOKENS, config["cross_attention_dim"]).to(dtype),
        torch.randn(2, pooled_width).to(dtype) if pooled_width else None,
        torch.tensor([[size, size, 0, 0, size, size]] * 2),
    )


def report(result: Result) -> str:
    """The result as a small table."""
    ours, theirs = result.ours, result.theirs
    lines = [
        f"UNet step of {result.model}, {result.size} x {result.size}, batch 2, {result.dtype}, "
        f"{result.threads} threads, torch {result.torch}; median (min to max) of {len(ours.wall)} rounds",
        f"{'':11}{'wall s':>24}{'CPU s':>24}{'error':>10}",
        f"{'diffusers':11}{summary(theirs.wall)}{summary(theirs.cpu)}{result.theirs_error:10.1e}",
        f"{'safelight':11}{summary(ours.wall)}{summary(ours.cpu)}{result.ours_error:10.1e}",
        f"{'ratio':11}{summary(ratios(ours, theirs, 'wall'))}{summary(ratios(ours, theirs, 'cpu'))}"
        f"{result.difference:10.1e}",
        f"the text's keys and values, once a request: {result.context.wall[0]:.3f} s",
        f"safelight computed in {result.ours_dtype}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
