"""The denoiser of Stable Diffusion 1.x and SDXL: a UNet that is told of time and text, and SDXL's of sizes too.

Papers: Rombach et al. 2022, https://arxiv.org/abs/2112.10752; Podell et al. 2023, https://arxiv.org/abs/2307.01952.
Reference code: `sgm/modules/diffusionmodules/openaimodel.py` of Stability-AI/generative-models.

Shapes: B batch, C channels, h and w latent height and width (an eighth of the picture's), T time features (4 * C of the
finest level), L tokens of the text, D width of the text's features, A width of what is added to the time.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.denoiser.models.sd_unet_keys import diffusers_sources, is_ldm, ldm_sources
from services.denoiser.models.sd_unet_params import (
    LDM_PREFIX,
    SDUNetParams,
    diffusers_places,
    ldm_places,
    params_from_config,
    params_from_shapes,
)
from services.denoiser.models.unet_blocks import (
    CrossAttention,
    Downsample,
    ResBlock,
    SpatialTransformer,
    time_features,
)
from services.modeling.layers import Conv2d, Linear, TensorModule, Upsample
from services.modeling.lora.layouts import DENOISER
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.lora.targets import Naming, weight_names
from services.modeling.norms import GroupNorm
from services.modeling.placement import Placed
from services.modeling.weight_streaming import WeightBlock
from services.modeling.weights import Checkpoint, load_weights

# Keys and values of all cross-attentions side by side, [B, L, sum of 2*C]: one tensor, so that one copy joins requests.
ContextKV: TypeAlias = Tensor


def stack_context(rows: Sequence[ContextKV]) -> ContextKV:
    """Joins the contexts of several requests, each [B_i, L, K] with the same L, into one batch [sum of B_i, L, K]."""
    return torch.cat(list(rows))


class Block(TensorModule):
    """A residual block and, unless it has no layers, a transformer."""

    def __init__(self, width_in: int, level: int, params: SDUNetParams, *, layers: int) -> None:
        super().__init__()
        width, groups = params.widths[level], params.norm_groups
        self.res = ResBlock(width_in, width, params.time_width, groups)
        self.transformer = (
            SpatialTransformer(width, params.cross_attention_dim, params.heads[level], groups, layers)
            if layers
            else None
        )

    def forward(self, x: Tensor, time: Tensor, context_kv: Iterator[Tensor]) -> Tensor:
        """x: [B, C_in, h, w], time: [B, T], context_kv: yields [B, L, 2*C] to each transformer -> [B, C, h, w]."""
        h = self.res(x, time)
        return h if self.transformer is None else self.transformer(h, context_kv)


class DownLevel(nn.Module):
    """The encoder's blocks of one resolution and, but for the coarsest, the way down to the next."""

    def __init__(self, width_in: int, level: int, params: SDUNetParams) -> None:
        super().__init__()
        width, layers = params.widths[level], params.layers[level]
        widths_in = [width_in] + [width] * (params.blocks_per_level - 1)
        self.blocks = nn.ModuleList(Block(block_in, level, params, layers=layers) for block_in in widths_in)
        self.downsample = Downsample(width) if level + 1 < len(params.widths) else None

    def forward(self, x: Tensor, time: Tensor, context_kv: Iterator[Tensor]) -> list[Tensor]:
        """x: [B, C_in, h, w] -> what each block and the downsampling made, all of it for the decoder."""
        made = [x]
        for block in self.blocks:
            made.append(block(made[-1], time, context_kv))
        if self.downsample is not None:
            made.append(self.downsample(made[-1]))
        return made[1:]


class UpLevel(TensorModule):
    """The decoder's blocks of one resolution, each fed one skip, and, but for the finest, the way up to the next."""

    def __init__(self, width_in: int, skip_widths: Sequence[int], level: int, params: SDUNetParams) -> None:
        super().__init__()
        width, layers = params.widths[level], params.layers[level]
        widths_in = [width_in] + [width] * (len(skip_widths) - 1)
        self.blocks = nn.ModuleList(
            Block(block_in + skip, level, params, layers=layers)
            for block_in, skip in zip(widths_in, skip_widths, strict=True)
        )
        self.upsample = Upsample(width) if level > 0 else None

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context_kv: Iterator[Tensor]) -> Tensor:
        """x: [B, C_in, h, w]; takes its skips from the end of the list -> [B, C, h', w'], the next skip's size."""
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), time, context_kv)
        return x if self.upsample is None else self.upsample(x, skips[-1].shape[-2:])


class SDUNet(TensorModule):
    """Predicts the noise in a latent, given its timestep and the text."""

    def __init__(self, params: SDUNetParams) -> None:
        super().__init__()
        widths, base, coarsest = params.widths, params.widths[0], len(params.widths) - 1
        self.params = params
        self.time = _embedding(base, params.time_width)
        self.added = _embedding(params.added_width, params.time_width) if params.added_width else None
        self.conv_in = Conv2d(params.in_channels, base, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(width_in, level, params) for level, width_in in enumerate((base, *widths[:-1]))
        )
        self.middle_in = Block(widths[-1], coarsest, params, layers=params.middle_layers)
        self.middle_out = ResBlock(widths[-1], widths[-1], params.time_width, params.norm_groups)
        skips = _skip_widths(params)
        self.up = nn.ModuleList(
            UpLevel(width_in, [skips.pop() for _ in range(params.blocks_per_level + 1)], level, params)
            for level, width_in in zip(range(coarsest, -1, -1), (widths[-1], *widths[:0:-1]), strict=True)
        )
        self.norm_out = GroupNorm(params.norm_groups, base)
        self.conv_out = Conv2d(base, params.out_channels, 3, padding=1)

    def project_context(self, context: Tensor) -> ContextKV:
        """The keys and values of every cross-attention, computed once a request. context: [B, L, D] -> [B, L, K]."""
        return torch.cat([module.to_kv(context) for module in self._cross_attentions()], dim=-1)

    def embed_added(self, added: Tensor) -> Tensor:
        """What a model of added conditioning adds to the time, computed once a request. added: [B, A] -> [B, T]."""
        assert self.added is not None
        embedded: Tensor = self.added(added)
        return embedded

    def forward(self, latents: Tensor, timesteps: Tensor, context_kv: ContextKV, added: Tensor | None = None) -> Tensor:
        """The noise [B, C, h, w].

        Args:
            latents: [B, C, h, w], scaled to unit variance.
            timesteps: [B] in 0..999, fractions allowed.
            context_kv: [B, L, K] of `project_context`.
            added: [B, T] of `embed_added`; None for a model that takes none.
        """
        time = self.time(time_features(timesteps, self.params.widths[0]).to(latents.dtype))
        time = F.silu(time if added is None else time + added)
        kv = iter(torch.split(context_kv, [module.to_kv.out_features for module in self._cross_attentions()], dim=-1))
        h = self.conv_in(latents.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for level in self.down:
            skips += level(skips[-1], time, kv)
        h = self.middle_out(self.middle_in(skips[-1], time, kv), time)
        for level in self.up:
            h = level(h, skips, time, kv)
        return self.conv_out(F.silu(self.norm_out(h), inplace=True))

    def weight_blocks(self) -> list[WeightBlock]:
        """All weights, in the order in which they compute: a prompt's keys and values, both ends, what is between."""
        between = [
            (name, module)
            for name, module in self.named_modules()
            if isinstance(module, Block | Downsample | Upsample) or module is self.middle_out
        ]
        return [
            WeightBlock("context", tuple(module.to_kv for module in self._cross_attentions())),
            WeightBlock("ends", (*self._embedders(), self.conv_in, self.norm_out, self.conv_out)),
            *(WeightBlock(name, (module,)) for name, module in between),
        ]

    def full_precision(self) -> list[nn.Module]:
        """What is never stored in eight bits: what makes the time features that reach every position, and both ends."""
        times = (module.time for module in self.modules() if isinstance(module, ResBlock))
        return [*self._embedders(), self.conv_in, self.conv_out, *times]

    def _embedders(self) -> list[nn.Module]:
        return [each for each in (self.time, self.added) if each is not None]

    def _cross_attentions(self) -> list[CrossAttention]:
        """In the order in which `forward` comes to them."""
        return [module for module in self.modules() if isinstance(module, CrossAttention)]


def load_sd_unet(
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    float8: bool = False,
) -> SDUNet:
    """Builds the UNet that `checkpoint` holds, in the original single-file layout or in diffusers'; its names tell.

    `config` is diffusers' `unet/config.json`; without one the dimensions are read from the shapes.
    Raises CheckpointError when the names are of neither layout or don't fit the dimensions.
    """
    in_one_file = is_ldm(checkpoint.keys())
    if config is not None:
        params = params_from_config(config)
    else:
        params = params_from_shapes(checkpoint, ldm_places(checkpoint) if in_one_file else diffusers_places(checkpoint))
    with torch.device("meta"):
        unet = SDUNet(params)
    find_sources, prefix = (ldm_sources, LDM_PREFIX) if in_one_file else (diffusers_sources, "")
    sources = find_sources(unet.state_dict().keys(), params)
    load_weights(unet, checkpoint, sources, device=device, dtype=dtype, prefix=prefix, float8=float8)
    return unet.eval()


def _embedding(width_in: int, width: int) -> nn.Sequential:
    """Features of a number or of a text, to be added to each other: [B, width_in] -> [B, width]."""
    return nn.Sequential(Linear(width_in, width), nn.SiLU(), Linear(width, width))


def sd_adaptable_network(unet: Placed[SDUNet]) -> AdaptableNetwork:
    """The UNet for LoRAs, which name its layers as either checkpoint layout does."""
    names, params = weight_names(unet.network), unet.network.params
    namings = [Naming(diffusers_sources(names, params)), Naming(ldm_sources(names, params), LDM_PREFIX)]
    return AdaptableNetwork([DENOISER], unet, namings)


def _skip_widths(params: SDUNetParams) -> list[int]:
    """The channels of what the encoder leaves for the decoder, in the order in which it makes them."""
    levels = [[width] * (params.blocks_per_level + 1) for width in params.widths]
    return [params.widths[0], *(width for level in levels for width in level)][:-1]
