"""AutoencoderKL, the picture VAE of Stable Diffusion, SDXL and FLUX: a picture to latents of 1/8 its size, and back.

Paper: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", https://arxiv.org/abs/2112.10752
Reference code: CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py.

Shapes: B pictures, C channels, H W pixels of the level at hand, Z latent channels, h w latent pixels, L = H * W
positions. Feature maps are channels_last in memory, so that a position's channels lie together for the attention
and the convolutions need no reordering.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format

from services.decoder.models.autoencoder_kl_keys import Layout, find_layout
from services.modeling.attention import attention
from services.modeling.layers import Conv2d, Linear, TensorModule, Upsample
from services.modeling.norms import GroupNorm
from services.modeling.weight_streaming import WeightBlock
from services.modeling.weights import Checkpoint, CheckpointError, load_weights

IMAGE_CHANNELS = 3
NORM_GROUPS = 32  # of every published one


@dataclass(frozen=True, kw_only=True)
class LatentScale:
    """What brings a posterior mean to latents of about unit variance: (mean - shift) * factor."""

    factor: float
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLParams:
    """What tells one AutoencoderKL from another."""

    block_channels: tuple[int, ...]  # width of each level, finest first
    resnets_per_level: int  # of the encoder; a level of the decoder has one more
    latent_channels: int
    norm_groups: int
    quant_conv: bool  # 1x1 convolutions on both sides of the latents: Stable Diffusion has them, FLUX has not
    latent_scale: LatentScale

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel along each side: 8 for four levels."""
        return 1 << (len(self.block_channels) - 1)


def group_norm(groups: int, channels: int) -> GroupNorm:
    """GroupNorm with the epsilon of the reference code."""
    return GroupNorm(groups, channels, eps=1e-6)


def norm_silu(norm: GroupNorm, x: Tensor) -> Tensor:
    """SiLU of the norm, in place on the norm's own output."""
    return F.silu(norm(x), inplace=True)


class ResnetBlock(TensorModule):
    """Twice norm, SiLU and a 3x3 convolution beside a shortcut: [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Identity() if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # One name for all maps: at the finest level each that outlives its use would raise the peak of memory.
        hidden = self.conv1(norm_silu(self.norm1, x))
        hidden = norm_silu(self.norm2, hidden)
        hidden = self.conv2(hidden)
        return hidden.add_(self.conv_shortcut(x))


class AttentionBlock(TensorModule):
    """Self-attention with one head over all positions of the coarsest level: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(groups, channels)
        self.to_qkv = Linear(channels, 3 * channels)
        self.to_out = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x_BLC, normed_BLC = (y.permute(0, 2, 3, 1).flatten(1, 2) for y in (x, self.group_norm(x)))
        q_BLC, k_BLC, v_BLC = self.to_qkv(normed_BLC).chunk(3, dim=-1)
        out_BLC = self.to_out(attention(q_BLC, k_BLC, v_BLC, heads=1), residual=x_BLC)
        return out_BLC.view(batch, height, width, channels).permute(0, 3, 1, 2)


class Downsample(TensorModule):
    """Halves both sides by a strided convolution padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class EncoderLevel(TensorModule):
    """One resolution on the way down: [B, C_in, H, W] -> [B, C_out, H / 2, W / 2]; the coarsest level keeps H and W."""

    def __init__(self, channels: Sequence[int], groups: int, *, halve: bool) -> None:
        super().__init__()
        self.resnets = resnet_chain(channels, groups)
        self.downsample = Downsample(channels[-1]) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.downsample(self.resnets(x))
        return out


class DecoderLevel(TensorModule):
    """One resolution on the way up: [B, C_in, H, W] -> [B, C_out, 2 H, 2 W]; the finest level keeps H and W."""

    def __init__(self, channels: Sequence[int], groups: int, *, double: bool) -> None:
        super().__init__()
        self.resnets = resnet_chain(channels, groups)
        self.upsample = Upsample(channels[-1]) if double else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.upsample(self.resnets(x))
        return out


def resnet_chain(channels: Sequence[int], groups: int) -> nn.Sequential:
    """Resnet blocks from each width in `channels` to the next."""
    return nn.Sequential(*(ResnetBlock(before, after, groups) for before, after in pairwise(channels)))


class MiddleBlock(TensorModule):
    """The coarsest resolution, the only one with attention: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnet_1 = ResnetBlock(channels, channels, groups)
        self.attention = AttentionBlock(channels, groups)
        self.resnet_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.resnet_2(self.attention(self.resnet_1(x)))


class Encoder(TensorModule):
    """Picture [B, 3, H, W] to the moments [B, 2 Z, h, w] of the latents: mean and logarithm of the variance."""

    def __init__(self, params: AutoencoderKLParams) -> None:
        super().__init__()
        widths, groups = params.block_channels, params.norm_groups
        chains = [(before, *[width] * params.resnets_per_level) for before, width in pairwise((widths[0], *widths))]
        self.conv_in = Conv2d(IMAGE_CHANNELS, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential(
            *(EncoderLevel(chain, groups, halve=True) for chain in chains[:-1]),
            EncoderLevel(chains[-1], groups, halve=False),
        )
        self.mid_block = MiddleBlock(widths[-1], groups)
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = Conv2d(widths[-1], 2 * params.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.mid_block(self.down_blocks(self.conv_in(image)))
        return self.conv_out(norm_silu(self.norm_out, x))


class Decoder(TensorModule):
    """Latents [B, Z, h, w], in the encoder's units, to a picture [B, 3, H, W]."""

    def __init__(self, params: AutoencoderKLParams) -> None:
        super().__init__()
        widths, groups = params.block_channels[::-1], params.norm_groups
        chains = [
            (before, *[width] * (params.resnets_per_level + 1)) for before, width in pairwise((widths[0], *widths))
        ]
        self.conv_in = Conv2d(params.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MiddleBlock(widths[0], groups)
        self.up_blocks = nn.Sequential(
            *(DecoderLevel(chain, groups, double=True) for chain in chains[:-1]),
            DecoderLevel(chains[-1], groups, double=False),
        )
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = Conv2d(widths[-1], IMAGE_CHANNELS, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.up_blocks(self.mid_block(self.conv_in(z)))
        return self.conv_out(norm_silu(self.norm_out, x))


class AutoencoderKL(nn.Module):
    """The VAE, for inference only. The posterior mean stands for the latents of a picture; nothing is sampled."""

    def __init__(self, params: AutoencoderKLParams) -> None:
        super().__init__()
        self.params = params
        channels = params.latent_channels
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)
        self.quant_conv = Conv2d(2 * channels, 2 * channels, 1) if params.quant_conv else nn.Identity()
        self.post_quant_conv = Conv2d(channels, channels, 1) if params.quant_conv else nn.Identity()

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Tensor:
        """The posterior mean [B, Z, h, w] of `image` [B, 3, H, W] in [-1, 1], in the dtype of the weights."""
        moments: Tensor = self.quant_conv(self.encoder(self._feature_map(image)))
        return moments[:, : self.params.latent_channels]

    @torch.inference_mode()
    def decode(self, mean: Tensor) -> Tensor:
        """The picture [B, 3, H, W], about in [-1, 1], of a posterior mean [B, Z, h, w]; dtype of the weights."""
        return self.decoder(self.post_quant_conv(self._feature_map(mean)))

    def normalize(self, mean: Tensor) -> Tensor:
        """A posterior mean to the latents that a denoiser works on, of about unit variance."""
        return (mean - self.params.latent_scale.shift) * self.params.latent_scale.factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """A denoiser's latents to a posterior mean, which `decode` takes."""
        return latents / self.params.latent_scale.factor + self.params.latent_scale.shift

    def weight_blocks(self) -> list[WeightBlock]:
        """All weights, in the order in which they compute: the encoder's, then the decoder's."""
        ends = (self.encoder.conv_in, self.encoder.norm_out, self.encoder.conv_out, self.quant_conv)
        other_ends = (self.post_quant_conv, self.decoder.conv_in, self.decoder.norm_out, self.decoder.conv_out)
        down, up = self.encoder.down_blocks, self.decoder.up_blocks
        return [
            WeightBlock("encoder.ends", ends),
            *(WeightBlock(f"encoder.down_blocks.{level}", (block,)) for level, block in enumerate(down)),
            WeightBlock("encoder.mid_block", (self.encoder.mid_block,)),
            WeightBlock("decoder.ends", other_ends),
            WeightBlock("decoder.mid_block", (self.decoder.mid_block,)),
            *(WeightBlock(f"decoder.up_blocks.{level}", (block,)) for level, block in enumerate(up)),
        ]

    def _feature_map(self, x: Tensor) -> Tensor:
        return x.to(dtype=self.decoder.conv_in.weight.dtype, memory_format=torch.channels_last)


# What the config of a diffusers folder may say. These would change the picture, and other values are not implemented:
_ONLY_VALUES: Mapping[str, object] = {
    "in_channels": IMAGE_CHANNELS,
    "out_channels": IMAGE_CHANNELS,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}
# These change nothing here: classes of blocks, which the weights tell; sizes and dtypes, which the caller sets.
_WITHOUT_EFFECT = {"down_block_types", "up_block_types", "sample_size", "force_upcast"}
_READ = {
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "scaling_factor",
    "shift_factor",
    "use_quant_conv",
    "use_post_quant_conv",
}


def params_from_config(config: Mapping[str, Any], usual: LatentScale) -> AutoencoderKLParams:
    """The params that a diffusers `vae/config.json` describes; usual: the scale of a config that names none.

    Raises CheckpointError for what is not implemented.
    """
    options = {"use_quant_conv": True, "use_post_quant_conv": True, **config}
    _check_options(options)
    try:
        return AutoencoderKLParams(
            block_channels=tuple(options["block_out_channels"]),
            resnets_per_level=options["layers_per_block"],
            latent_channels=options["latent_channels"],
            norm_groups=options["norm_num_groups"],
            quant_conv=options["use_quant_conv"],
            latent_scale=LatentScale(
                factor=options.get("scaling_factor", usual.factor),
                shift=options.get("shift_factor", usual.shift) or 0.0,
            ),
        )
    except KeyError as error:
        raise CheckpointError(f"the config of the VAE lacks {error}") from error


def params_from_shapes(checkpoint: Checkpoint, layout: Layout, usual: LatentScale) -> AutoencoderKLParams:
    """The params of a file without a config: sizes from its shapes; usual: the scale, which no shape tells."""

    def source(place: str) -> str:
        return layout.sources(f"{place}.weight", levels=1)[0]

    def present(template: str) -> list[str]:
        return list(takewhile(checkpoint.__contains__, (source(template.format(number)) for number in count())))

    return AutoencoderKLParams(
        block_channels=tuple(checkpoint.shape(name)[0] for name in present("encoder.down_blocks.{}.resnets.0.conv1")),
        resnets_per_level=len(present("encoder.down_blocks.0.resnets.{}.conv1")),
        latent_channels=checkpoint.shape(source("decoder.conv_in"))[1],
        norm_groups=NORM_GROUPS,
        quant_conv=source("quant_conv") in checkpoint,
        latent_scale=usual,
    )


def load_autoencoder_kl(
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    latent_scale: LatentScale,
) -> AutoencoderKL:
    """The VAE of a model's single file, of a VAE's own file, or of a diffusers `vae` folder with its `config`.

    latent_scale: of a VAE whose config names none; no shape tells it, so it is the family's.

    Raises CheckpointError for a layout, an option or a tensor that does not fit.
    """
    layout = find_layout(checkpoint)
    params = (
        params_from_shapes(checkpoint, layout, latent_scale)
        if config is None
        else params_from_config(config, latent_scale)
    )
    with torch.device("meta"):
        vae = AutoencoderKL(params)
    sources = {name: layout.sources(name, len(params.block_channels)) for name in vae.state_dict()}
    training = tuple(f"{layout.prefix}{part}" for part in ("loss.", "model_ema."))
    ignored = {name for name in checkpoint if name.startswith(training)}
    load_weights(vae, checkpoint, sources, device=device, dtype=dtype, prefix=layout.prefix, ignored=ignored)
    convert_conv2d_weight_memory_format(vae, torch.channels_last)
    return vae.eval()


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming the options of a config that are unknown or have a value not implemented."""
    known = _ONLY_VALUES.keys() | _WITHOUT_EFFECT | _READ
    refused = {
        name: value
        for name, value in options.items()
        if not name.startswith("_") and (name not in known or value != _ONLY_VALUES.get(name, value))
    }
    if options["use_quant_conv"] != options["use_post_quant_conv"]:
        refused["use_post_quant_conv"] = options["use_post_quant_conv"]
    if refused:
        raise CheckpointError(f"this AutoencoderKL does not implement {refused} of its config")
