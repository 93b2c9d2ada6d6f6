"""The denoiser of Wan2.1 and Wan2.2: a transformer over the frames of a film, told of text and, some, of a picture.

Paper: Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models", section 4.2,
https://arxiv.org/abs/2503.20314. Reference code: Wan-Video/Wan2.1, wan/modules/model.py.

Shapes: B batch, C channels of a latent, T, h and w its frames, height and width, S = T * h/2 * w/2 tokens of the film,
L tokens of the text, P tokens of the picture, W width, H heads, D channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from services.denoiser.models.dit_blocks import NORM_EPS, Embedder, modulated_norm, rotate, rotations
from services.denoiser.models.dit_loading import Architecture, DiT
from services.denoiser.models.unet_blocks import time_features
from services.denoiser.models.wan_dit_keys import DIFFUSERS, ORIGINAL, find_layout
from services.denoiser.models.wan_dit_params import PATCH, WanDiTParams, params_from_config, params_from_shapes
from services.modeling.attention import Attention, attention
from services.modeling.layers import GeluLinear, Linear, TensorModule
from services.modeling.lora.layouts import DENOISER
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.lora.targets import Naming, weight_names
from services.modeling.parallel.mesh import ONE_RANK_MESH, Axis, ParallelMesh
from services.modeling.parallel.sharing import share
from services.modeling.parallel.tensor_parallel import ByInputs, ByOutputs, TensorPlan
from services.modeling.parallel.token_split import TokenSplit
from services.modeling.placement import Placed
from services.modeling.weight_streaming import WeightBlock
from services.modeling.weights import Checkpoint, WholeWeights

PICTURE_NORM_EPS = 1e-5
TIME_FEATURES = 256

# The modulation, which may be asked for each token, the embedders and the head stay whole on each rank: they are small.
TENSOR_PLAN: TensorPlan = {
    "blocks.{}.to_qkv": ByOutputs(parts=(1, 1, 1)),
    "blocks.{}.qk_norm": ByOutputs(parts=(1, 1)),
    "blocks.{}.to_out": ByInputs(),
    "blocks.{}.cross.to_q": ByOutputs(),
    "blocks.{}.cross.q_norm": ByOutputs(),
    "blocks.{}.cross.text.to_kv": ByOutputs(parts=(1, 1)),
    "blocks.{}.cross.text.k_norm": ByOutputs(),
    "blocks.{}.cross.image.to_kv": ByOutputs(parts=(1, 1)),
    "blocks.{}.cross.image.k_norm": ByOutputs(),
    "blocks.{}.cross.to_out": ByInputs(),
    "blocks.{}.mlp_in": ByOutputs(),
    "blocks.{}.mlp_out": ByInputs(),
}


@dataclass(frozen=True)
class WanContext:
    """What the network is told beside the latent and the timestep, computed once a request.

    text_kv: [B, blocks, L, 2 W], the keys and values of each block's attention to the text.
    image_kv: [B, blocks, P, 2 W], those of its attention to the picture; None: the model takes none.
    image_latents: [B, C', T, h, w], joined to the latent: where the frames that are given lie, and their latents.
    rope: [S, D/2] complex, the rotation of each token's pairs of channels.
    """

    text_kv: Tensor
    image_kv: Tensor | None
    image_latents: Tensor | None
    rope: Tensor

    def to(self, device: torch.device) -> "WanContext":
        """The context on another device."""
        image_kv, image_latents = (None if x is None else x.to(device) for x in (self.image_kv, self.image_latents))
        return WanContext(self.text_kv.to(device), image_kv, image_latents, self.rope.to(device))


def stack_context(rows: Sequence[WanContext]) -> WanContext:
    """Joins the contexts of several requests with latents of one size, by one model."""
    if len(rows) == 1:
        return rows[0]
    return WanContext(
        torch.cat([row.text_kv for row in rows]),
        _join([row.image_kv for row in rows]),
        _join([row.image_latents for row in rows]),
        rows[0].rope,
    )


class TextEmbedder(TensorModule):
    """Linear, GELU, linear: [B, L, in] -> [B, L, W]."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.in_layer = GeluLinear(width_in, width)
        self.out_layer = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.in_layer(x))


class PictureEmbedder(TensorModule):
    """CLIP's tokens of one or two pictures, [B, P, in], to the transformer's [B, P, W]."""

    def __init__(self, width_in: int, width: int, positions: int | None) -> None:
        super().__init__()
        self.positions = None if positions is None else nn.Parameter(torch.empty(1, positions, width_in))
        self.norm_in = nn.LayerNorm(width_in, PICTURE_NORM_EPS)
        self.in_layer = Linear(width_in, width_in)
        self.out_layer = Linear(width_in, width)
        self.norm_out = nn.LayerNorm(width, PICTURE_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.positions is None else x + self.positions
        normed: Tensor = self.norm_out(self.out_layer(F.gelu(self.in_layer(self.norm_in(x)))))
        return normed


class KeysAndValues(TensorModule):
    """The keys, normed, and the values of what a film attends to: [B, L, W] -> [B, L, 2 W], of this rank's heads."""

    def __init__(self, width: int, heads: Axis) -> None:
        super().__init__()
        self._heads = heads
        self.to_kv = Linear(width, 2 * width)
        self.k_norm = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return torch.cat([rms_norm(k, self.k_norm, self._heads), v], dim=-1)


class CrossAttention(TensorModule):
    """Every token of the film attends to the text and, in models that start from a picture, to that as well.

    `text` and `image` make their keys and values, once a request.
    """

    def __init__(self, params: WanDiTParams, mesh: ParallelMesh) -> None:
        super().__init__()
        width, self.heads, self._tensor = params.width, params.heads // mesh.tensor.size, mesh.tensor
        self.to_q = Linear(width, width)
        self.q_norm = nn.Parameter(torch.empty(width))
        self.text = KeysAndValues(width, mesh.tensor)
        self.image = None if params.image_width is None else KeysAndValues(width, mesh.tensor)
        self.to_out = Linear(width, width)

    def forward(self, x: Tensor, text_kv: Tensor, image_kv: Tensor | None, residual: Tensor) -> Tensor:
        """x and residual: [B, S, W], text_kv: [B, L, 2 W], image_kv: [B, P, 2 W] -> [B, S, W]."""
        q = rms_norm(self.to_q(x), self.q_norm, self._tensor)
        k, v = text_kv.chunk(2, dim=-1)
        attended = attention(q, k, v, self.heads)
        if image_kv is not None:
            k, v = image_kv.chunk(2, dim=-1)
            attended = attended + attention(q, k, v, self.heads)
        return self.to_out(attended, residual=residual)


class Block(TensorModule):
    """Self-attention, cross-attention and an MLP; the first and the last are modulated by the time."""

    def __init__(self, params: WanDiTParams, mesh: ParallelMesh) -> None:
        super().__init__()
        width, self.heads, self._tensor = params.width, params.heads // mesh.tensor.size, mesh.tensor
        self.modulation = nn.Parameter(torch.empty(1, 6, width))
        self.to_qkv = Linear(width, 3 * width)
        self.qk_norm = nn.Parameter(torch.empty(2 * width))
        self.to_out = Linear(width, width)
        self.cross_norm = nn.LayerNorm(width, NORM_EPS)
        self.cross = CrossAttention(params, mesh)
        self.mlp_in = GeluLinear(width, params.mlp_width)
        self.mlp_out = Linear(params.mlp_width, width)

    def forward(
        self, x: Tensor, time: Tensor, text_kv: Tensor, image_kv: Tensor | None, rope: Tensor, self_attention: Attention
    ) -> Tensor:
        """x: [B, S, W], time: [B, 1 or S, 6, W], the keys and values of this block -> [B, S, W].

        self_attention: of these tokens to all of the film, on other ranks too.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(self.modulation, time)
        attended = self._attend(modulated_norm(x, shift, scale), rope, self_attention)
        x = torch.addcmul(x, gate, self.to_out(attended))
        x = self.cross(self.cross_norm(x), text_kv, image_kv, residual=x)
        hidden = self.mlp_in(modulated_norm(x, mlp_shift, mlp_scale))
        return torch.addcmul(x, mlp_gate, self.mlp_out(hidden))

    def _attend(self, x: Tensor, rope: Tensor, self_attention: Attention) -> Tensor:
        """Self-attention of tokens [B, S, W], queries and keys normed and turned by their positions."""
        qkv = torch.unflatten(self.to_qkv(x), 2, (3, -1))
        qk = rms_norm(qkv[:, :, :2].float(), self.qk_norm.float().view(2, -1), self._tensor)
        q, k = rotate(torch.unflatten(qk, 3, (self.heads, -1)), rope).to(x.dtype).flatten(3).unbind(2)
        return self_attention(q, k, qkv[:, :, 2], self.heads)


class Head(TensorModule):
    """The last norm, modulated by the time, and the way back to latents: [B, S, W] -> [B, S, 4 C]."""

    def __init__(self, params: WanDiTParams) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 2, params.width))
        self.proj_out = Linear(params.width, params.out_channels * PATCH[1] * PATCH[2])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """time: [B, 1 or S, W]."""
        shift, scale = modulation(self.modulation, time[:, :, None])
        return self.proj_out(modulated_norm(x, shift, scale))


class WanDiT(DiT):
    """Predicts the velocity from a film to noise, given the time between them, the text and perhaps a picture."""

    def __init__(self, params: WanDiTParams, mesh: ParallelMesh = ONE_RANK_MESH) -> None:
        super().__init__()
        self.params, self.mesh, width = params, mesh, params.width
        self.patch_in = nn.Conv3d(params.in_channels, width, PATCH, stride=PATCH)
        self.text_in = TextEmbedder(params.text_width, width)
        self.time_in = Embedder(TIME_FEATURES, width)
        self.modulation = Linear(width, 6 * width)
        self.image_in = (
            None if params.image_width is None else PictureEmbedder(params.image_width, width, params.image_positions)
        )
        self.blocks = nn.ModuleList(Block(params, mesh) for _ in range(params.blocks))
        self.head = Head(params)
        self.shares = share(self, mesh, TENSOR_PLAN, params.heads)

    def prepare(
        self, prompt_embeds: Tensor, image_embeds: Tensor | None, image_latents: Tensor | None, size: Sequence[int]
    ) -> WanContext:
        """prompt_embeds: UMT5's [B, L, D], image_embeds: CLIP's [B, P, D'], image_latents: [B, C', T, h, w] (the last
        two where the model takes them), size: T, h and w."""
        text, image_kv = self.text_in(prompt_embeds), None
        if self.image_in is not None:
            assert image_embeds is not None
            image = self.image_in(image_embeds)
            image_kv = torch.stack([cross.image(image) for cross in self._cross_attentions() if cross.image], dim=1)
        text_kv = torch.stack([cross.text(text) for cross in self._cross_attentions()], dim=1)
        rope = token_rotations(size, self.params.width // self.params.heads).to(text.device)
        return WanContext(text_kv, image_kv, image_latents, rope)

    def forward(self, latents: Tensor, timesteps: Tensor, context: WanContext) -> Tensor:
        """latents: [B, C, T, h, w], timesteps: [B] in 0..1000, or [B, S] with one for each token -> velocity [B, C, T,
        h, w]."""
        if context.image_latents is not None:
            latents = torch.cat([latents, context.image_latents.to(latents.dtype)], dim=1)
        size = latents.shape[2:]
        split = TokenSplit(self.mesh, (len(context.rope),))
        x, rope = split.part(self.patch_in(latents).flatten(2).mT).contiguous(), split.part(context.rope, dim=0)
        timesteps = timesteps if timesteps.dim() == 1 else split.part(timesteps)
        features = time_features(timesteps.flatten(), TIME_FEATURES).to(x.dtype)
        time = self.time_in(features).view(len(x), -1, x.shape[-1])
        time_modulation = self.modulation(F.silu(time)).view(*time.shape[:2], 6, -1)
        image_kvs = [None] * len(self.blocks) if context.image_kv is None else context.image_kv.unbind(1)
        self_attention = split.attention()
        for block, text_kv, image_kv in zip(self.blocks, context.text_kv.unbind(1), image_kvs, strict=True):
            x = block(x, time_modulation, text_kv, image_kv, rope, self_attention)
        return to_latents(split.whole(self.head(x, time)), size)

    def weight_blocks(self) -> list[WeightBlock]:
        """All weights, in the order in which they compute: what is asked once a request, both ends, the blocks."""
        embedders = [module for module in (self.text_in, self.image_in) if module is not None]
        keys_and_values = enumerate(map(_once, self._cross_attentions()))
        return [
            WeightBlock("embedders", tuple(embedders)),
            *(WeightBlock(f"blocks.{index}.cross", tuple(once)) for index, once in keys_and_values),
            WeightBlock("ends", (self.patch_in, self.time_in, self.modulation, self.head)),
            *(WeightBlock(f"blocks.{index}", (block,)) for index, block in enumerate(self.blocks)),
        ]

    def full_precision(self) -> list[nn.Module]:
        """What is never stored in eight bits: both ends, and what makes the modulation that reaches every position."""
        ends = [self.patch_in, self.text_in, self.image_in, self.time_in, self.modulation, self.head]
        return [module for module in ends if module is not None]

    def _cross_attentions(self) -> list[CrossAttention]:
        """Those of the blocks, in order."""
        return [module for module in self.modules() if isinstance(module, CrossAttention)]


def modulation(table: Tensor, time: Tensor) -> tuple[Tensor, ...]:
    """The shifts, scales and gates of a block: its own n, [1, n, W], plus those of the time, [B, 1 or S, 1 or n, W], in
    float32 because their sum is small against its parts -> n times [B, 1 or S, W]."""
    return (table.float() + time.float()).to(time.dtype).unbind(2)


def rms_norm(x: Tensor, weight: Tensor, heads: Axis) -> Tensor:
    """Root mean square norm over the whole width: all heads together, of which each rank of the axis has some."""
    if heads.size == 1:
        return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS) * weight
    square = x.float().square().mean(-1, keepdim=True)
    distributed.all_reduce(square, group=heads.group)
    return (x * (square / heads.size + NORM_EPS).rsqrt()).to(x.dtype) * weight


def token_rotations(size: Sequence[int], head_width: int) -> Tensor:
    """Rotations [S, D/2] of the tokens of a latent of T, h and w.

    A head's channels turn with the frame, the row and the column: a third each, rounded so that the frame has the rest.
    """
    counts = [side // patch for side, patch in zip(size, PATCH, strict=True)]
    third = 2 * (head_width // 6)
    positions = torch.cartesian_prod(*(torch.arange(count, dtype=torch.float64) for count in counts))
    return rotations(positions, (head_width - 2 * third, third, third))


def to_latents(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """[B, S, 4 C] -> [B, C, T, h, w] with size = (T, h, w); channels are innermost in a token."""
    frames, rows, columns = (side // patch for side, patch in zip(size, PATCH, strict=True))
    x = tokens.view(len(tokens), frames, rows, columns, PATCH[1], PATCH[2], -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


load_wan_dit = Architecture(find_layout, params_from_shapes, params_from_config, WanDiT).load
"""See `Architecture.load`."""


def _once(cross: CrossAttention) -> list[KeysAndValues]:
    """What computes keys and values, once a request."""
    return [cross.text] if cross.image is None else [cross.text, cross.image]


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


def wan_adaptable_network(dit: Placed[WanDiT], checkpoint: Checkpoint) -> AdaptableNetwork:
    """The transformer for LoRAs, which name its layers as either checkpoint layout does."""
    names = weight_names(dit.network)
    namings = [Naming(layout.sources(names)) for layout in (ORIGINAL, DIFFUSERS)]
    whole = WholeWeights(checkpoint, find_layout(checkpoint).sources(names))
    return AdaptableNetwork([DENOISER], dit, namings, whole)
