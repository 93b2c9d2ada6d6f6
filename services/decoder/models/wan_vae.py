"""Wan2.1's causal VAE: a film of 1 + 4 n frames to 1 + n latent frames of an eighth of its sides, and back.

Paper: Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models", section 4.1,
https://arxiv.org/abs/2503.20314. Reference code: Wan-Video/Wan2.1, wan/modules/vae.py.

No layer looks at a later frame, so a film is encoded and decoded piece by piece, in memory that does not grow with its
length. The first frame makes a latent frame of its own; every later one is made of four.

Shapes: T frames, as a batch (see causal_conv.py), C channels, H W pixels of the level at hand, Z latent channels,
h w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format

from services.decoder.models.causal_conv import CausalConv3d, DoubleFrames, HalveFrames, Past
from services.decoder.models.wan_vae_keys import Layout, find_layout
from services.modeling.attention import attention
from services.modeling.layers import Conv2d, TensorModule, Upsample
from services.modeling.weight_streaming import WeightBlock
from services.modeling.weights import Checkpoint, CheckpointError, load_weights

IMAGE_CHANNELS = 3
FRAMES_PER_LATENT = 4
_LEAST_NORM = 1e-12
_STRIP_ELEMENTS = 2**19  # of a feature map: two MiB in float32


@dataclass(frozen=True, kw_only=True)
class WanVAEParams:
    """What tells one VAE of this architecture from another; mean and deviation normalise each latent channel."""

    widths: tuple[int, ...]  # of each level, finest first
    blocks_per_level: int  # of the encoder; a level of the decoder has one more
    latent_channels: int
    halves_frames: tuple[bool, ...]  # on the way from each level to the next coarser one
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel along each side: 8 for four levels."""
        return 1 << len(self.halves_frames)


class ChannelNorm(TensorModule):
    """Divides every pixel by the root mean square of its channels and scales each: [T, C, H, W] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self._divide(x, torch.empty_like(x))

    def activate(self, x: Tensor, out: Tensor) -> None:
        """Writes the SiLU of the norm, in strips of rows that stay in a CPU's cache."""
        rows = x.shape[2] if x.is_cuda else max(_STRIP_ELEMENTS // x[:, :, 0].numel(), 1)
        for strip, target in zip(*(torch.split(each, rows, dim=2) for each in (x, out)), strict=True):
            F.silu(self._divide(strip, target), inplace=True)

    def _divide(self, x: Tensor, out: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        inverse = norm.clamp_min(_LEAST_NORM).reciprocal_() * math.sqrt(x.shape[1])
        return torch.mul(x, inverse.to(x.dtype), out=out).mul_(self.gamma[:, None, None])


class ResidualBlock(TensorModule):
    """Twice norm, SiLU and a convolution beside a shortcut: [T, C_in, H, W] -> [T, C_out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, (3, 3, 3))
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3))
        self.conv_shortcut = nn.Identity() if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        hidden = self.conv1(x, past, self.norm1.activate)
        hidden = self.conv2(hidden, past, self.norm2.activate)
        return hidden.add_(self.conv_shortcut(x))


class AttentionBlock(TensorModule):
    """Self-attention with one head within each frame: [T, C, H, W] -> [T, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = Conv2d(channels, 3 * channels, 1)
        self.proj = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        q, k, v = (each.permute(0, 2, 3, 1).flatten(1, 2) for each in self.to_qkv(self.norm(x)).chunk(3, dim=1))
        out = attention(q, k, v, heads=1).view(len(x), *x.shape[-2:], -1).permute(0, 3, 1, 2)
        return self.proj(out, residual=x)


class Downsample(TensorModule):
    """Halves both sides and, if `halves_frames`, the number of frames after the first."""

    def __init__(self, channels: int, *, halves_frames: bool) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)
        self.time_conv = HalveFrames(channels) if halves_frames else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.conv(F.pad(x, (0, 1, 0, 1)))
        return x if self.time_conv is None else self.time_conv(x, past)


class FilmUpsample(TensorModule):
    """Doubles both sides and, if `doubles_frames`, the number of frames after the first; halves the channels."""

    def __init__(self, channels: int, *, doubles_frames: bool) -> None:
        super().__init__()
        self.time_conv = DoubleFrames(channels) if doubles_frames else None
        self.resample = Upsample(channels, channels // 2)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.resample(x if self.time_conv is None else self.time_conv(x, past))


class Chain(nn.ModuleList):
    """Layers one after the other, each told of the film's past."""

    def forward(self, x: Tensor, past: Past) -> Tensor:
        for layer in self:
            x = layer(x, past)
        return x


def middle_block(channels: int) -> Chain:
    """The coarsest resolution, the only one with attention: [T, C, H, W] -> [T, C, H, W]."""
    return Chain([ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)])


class Encoder(TensorModule):
    """Frames [T, 3, H, W] to the moments [T', 2 Z, h, w] of the latents: mean and logarithm of the variance."""

    def __init__(self, params: WanVAEParams) -> None:
        super().__init__()
        widths = params.widths
        self.conv_in = CausalConv3d(IMAGE_CHANNELS, widths[0], (3, 3, 3))
        self.down_blocks = Chain()
        for level, (before, width) in enumerate(pairwise((widths[0], *widths))):
            self.down_blocks.extend(_residual_blocks(before, width, params.blocks_per_level))
            if level < len(params.halves_frames):
                self.down_blocks.append(Downsample(width, halves_frames=params.halves_frames[level]))
        self.mid_block = middle_block(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * params.latent_channels, (3, 3, 3))

    def forward(self, frames: Tensor, past: Past) -> Tensor:
        x = self.mid_block(self.down_blocks(self.conv_in(frames, past), past), past)
        return self.conv_out(x, past, self.norm_out.activate)


class Decoder(TensorModule):
    """Latents [T', Z, h, w], in the encoder's units, to frames [T, 3, H, W]."""

    def __init__(self, params: WanVAEParams) -> None:
        super().__init__()
        widths, doubles = params.widths[::-1], params.halves_frames[::-1]
        self.conv_in = CausalConv3d(params.latent_channels, widths[0], (3, 3, 3))
        self.mid_block = middle_block(widths[0])
        self.up_blocks = Chain()
        before = widths[0]
        for level, width in enumerate(widths):
            self.up_blocks.extend(_residual_blocks(before, width, params.blocks_per_level + 1))
            if level < len(doubles):
                self.up_blocks.append(FilmUpsample(width, doubles_frames=doubles[level]))
                before = width // 2
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], IMAGE_CHANNELS, (3, 3, 3))

    def forward(self, z: Tensor, past: Past) -> Tensor:
        x = self.up_blocks(self.mid_block(self.conv_in(z, past), past), past)
        return self.conv_out(x, past, self.norm_out.activate)


def _residual_blocks(in_channels: int, out_channels: int, count: int) -> list[ResidualBlock]:
    widths = [in_channels] + [out_channels] * count
    return [ResidualBlock(before, after) for before, after in pairwise(widths)]


class WanVAE(nn.Module):
    """The VAE, for inference only. The posterior mean stands for the latents of a film; nothing is sampled."""

    def __init__(self, params: WanVAEParams) -> None:
        super().__init__()
        self.params = params
        channels = params.latent_channels
        self.encoder = Encoder(params)
        self.quant_conv = Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = Conv2d(channels, channels, 1)
        self.decoder = Decoder(params)

    @torch.inference_mode()
    def encode(self, frames: Tensor, past: Past) -> Tensor:
        """The posterior mean of the next frames of a film, in [-1, 1]: of its first, [1, 3, H, W] -> [1, Z, h, w];
        later [4 n, 3, H, W] -> [n, Z, h, w]. In the dtype of the weights."""
        moments = self.quant_conv(self.encoder(self._feature_map(frames), past))
        return moments[:, : self.params.latent_channels]

    @torch.inference_mode()
    def decode(self, mean: Tensor, past: Past) -> Tensor:
        """The next frames of a film, about in [-1, 1]: of its first latent frame, [1, Z, h, w] -> [1, 3, H, W]; later
        [n, Z, h, w] -> [4 n, 3, H, W]. In the dtype of the weights."""
        return self.decoder(self.post_quant_conv(self._feature_map(mean)), past)

    def normalize(self, mean: Tensor) -> Tensor:
        """A posterior mean [T', Z, h, w] to the latents that a denoiser works on, of about unit variance."""
        return (mean - self._channels(self.params.latents_mean, mean)) / self._channels(self.params.latents_std, mean)

    def denormalize(self, latents: Tensor) -> Tensor:
        """A denoiser's latents [T', Z, h, w] to a posterior mean, which `decode` takes."""
        std, mean = (self._channels(each, latents) for each in (self.params.latents_std, self.params.latents_mean))
        return latents * std + mean

    def weight_blocks(self) -> list[WeightBlock]:
        """All weights, in the order in which they compute: the encoder's, then the decoder's."""
        encoder, decoder = self.encoder, self.decoder
        return [
            WeightBlock("encoder.ends", (encoder.conv_in, encoder.norm_out, encoder.conv_out, self.quant_conv)),
            *(WeightBlock(f"encoder.down_blocks.{index}", (each,)) for index, each in enumerate(encoder.down_blocks)),
            WeightBlock("encoder.mid_block", (encoder.mid_block,)),
            WeightBlock("decoder.ends", (self.post_quant_conv, decoder.conv_in, decoder.norm_out, decoder.conv_out)),
            WeightBlock("decoder.mid_block", (decoder.mid_block,)),
            *(WeightBlock(f"decoder.up_blocks.{index}", (each,)) for index, each in enumerate(decoder.up_blocks)),
        ]

    @staticmethod
    def _channels(values: Sequence[float], like: Tensor) -> Tensor:
        return like.new_tensor(values)[:, None, None]

    def _feature_map(self, x: Tensor) -> Tensor:
        return x.to(dtype=self.decoder.conv_in.weight.dtype, memory_format=torch.channels_last)


def film_pieces(frames: Tensor) -> Iterator[Tensor]:
    """A film [1 + 4 n, 3, H, W] in the pieces that make one latent frame each."""
    yield frames[:1]
    for start in range(1, len(frames), FRAMES_PER_LATENT):
        yield frames[start : start + FRAMES_PER_LATENT]


def encode_film(vae: WanVAE, frames: Iterable[Tensor]) -> Tensor:
    """The latents [1 + n, Z, h, w], float32 and normalised, of a film's pieces, one after the other."""
    past = Past()
    return torch.cat([vae.normalize(vae.encode(piece, past).float()) for piece in frames])


def decode_film(vae: WanVAE, latents: Tensor) -> Iterator[Tensor]:
    """The frames of a denoiser's latents [1 + n, Z, h, w], those of a latent frame at a time: one, then four each."""
    past = Past()
    for mean in vae.denormalize(latents.float()):
        yield vae.decode(mean[None], past)


# The latents of Wan2.1's VAE, which Qwen-Image shares; no file of the original layout tells them.
WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

# What the config of a diffusers folder may say. These would change the film, and other values are not implemented:
_ONLY_VALUES: Mapping[str, object] = {
    "attn_scales": [],
    "decoder_base_dim": None,
    "in_channels": IMAGE_CHANNELS,
    "is_residual": False,
    "out_channels": IMAGE_CHANNELS,
    "patch_size": None,
}
# These change nothing here: what only training has, and what follows from the number of levels.
_WITHOUT_EFFECT = {"dropout", "scale_factor_spatial", "scale_factor_temporal"}
_READ = {"base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "latents_mean", "latents_std"}


def params_from_config(config: Mapping[str, Any]) -> WanVAEParams:
    """The params that a diffusers `vae/config.json` describes. Raises CheckpointError for what is not implemented."""
    known = _ONLY_VALUES.keys() | _WITHOUT_EFFECT | _READ
    refused = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and (name not in known or value != _ONLY_VALUES.get(name, value))
    }
    if refused:
        raise CheckpointError(f"the config of the VAE has options that Wan2.1's has not: {refused}")
    try:
        return WanVAEParams(
            widths=tuple(config["base_dim"] * factor for factor in config["dim_mult"]),
            blocks_per_level=config["num_res_blocks"],
            latent_channels=config["z_dim"],
            halves_frames=tuple(config["temperal_downsample"]),
            latents_mean=tuple(config["latents_mean"]),
            latents_std=tuple(config["latents_std"]),
        )
    except KeyError as error:
        raise CheckpointError(f"the config of the VAE lacks {error}") from error


def params_from_shapes(checkpoint: Checkpoint, layout: Layout) -> WanVAEParams:
    """The params of a file without a config: sizes from its shapes, the latents' scale as in Wan2.1.

    Raises CheckpointError for a VAE of another number of latent channels, whose scale is not known.
    """

    def source(layer: str) -> str:
        return layout.source(f"{layer}.weight", blocks_per_level=0)  # the number plays no part in what is asked here

    latent_channels = checkpoint.shape(source("decoder.conv_in"))[1]
    if latent_channels != len(WAN21_MEAN):
        raise CheckpointError(f"{checkpoint} has {latent_channels} latent channels; their scale must come in a config")
    blocks = [f"encoder.down_blocks.{number}" for number in range(len(checkpoint))]
    halvings = [number for number, block in enumerate(blocks) if source(f"{block}.conv") in checkpoint]
    blocks_per_level = halvings[0] if halvings else 1
    firsts = blocks[: len(halvings) * (blocks_per_level + 1) + 1 : blocks_per_level + 1]
    return WanVAEParams(
        widths=tuple(checkpoint.shape(source(f"{block}.conv1"))[0] for block in firsts),
        blocks_per_level=blocks_per_level,
        latent_channels=latent_channels,
        halves_frames=tuple(source(f"{blocks[number]}.time_conv") in checkpoint for number in halvings),
        latents_mean=WAN21_MEAN,
        latents_std=WAN21_STD,
    )


def load_wan_vae(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, *, device: torch.device, dtype: torch.dtype
) -> WanVAE:
    """The VAE of Wan's own file (in safetensors), or of a diffusers `vae` folder with its `config`.

    Raises CheckpointError for a layout, an option or a tensor that does not fit.
    """
    layout = find_layout(checkpoint)
    params = params_from_shapes(checkpoint, layout) if config is None else params_from_config(config)
    with torch.device("meta"):
        vae = WanVAE(params)
    sources = {name: (layout.source(name, params.blocks_per_level),) for name in vae.state_dict()}
    load_weights(vae, checkpoint, sources, device=device, dtype=dtype)
    convert_conv2d_weight_memory_format(vae, torch.channels_last)
    return vae.eval()
