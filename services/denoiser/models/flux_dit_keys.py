"""Where each tensor of `FluxDiT` lies in the two checkpoint layouts: Black Forest Labs' original one and diffusers'.

The original's names are the same in a file of its own, in GGUF files, and in ComfyUI's all-in-one files (there under
`model.diffusion_model.`). The two layouts differ in what is fused, and in the order of the last modulation's halves.
"""

from collections.abc import Collection

from services.denoiser.models.dit_layout import Layout, Sources, layout_of
from services.modeling.weights import Checkpoint

_PROBE = "single_blocks.0.to_out.weight"

# Our layers and theirs, and the norms' parameters, which are no layers; `{}` is the number of a block. What several of
# theirs make is joined on dimension 0.
_ORIGINAL = {
    "image_in": ("img_in",),
    "text_in": ("txt_in",),
    "time_in.in_layer": ("time_in.in_layer",),
    "time_in.out_layer": ("time_in.out_layer",),
    "vector_in.in_layer": ("vector_in.in_layer",),
    "vector_in.out_layer": ("vector_in.out_layer",),
    "guidance_in.in_layer": ("guidance_in.in_layer",),
    "guidance_in.out_layer": ("guidance_in.out_layer",),
    "double_blocks.{}.modulation": ("double_blocks.{}.img_mod.lin", "double_blocks.{}.txt_mod.lin"),
    "double_blocks.{}.image.to_qkv": ("double_blocks.{}.img_attn.qkv",),
    "double_blocks.{}.image.to_out": ("double_blocks.{}.img_attn.proj",),
    "double_blocks.{}.image.mlp_in": ("double_blocks.{}.img_mlp.0",),
    "double_blocks.{}.image.mlp_out": ("double_blocks.{}.img_mlp.2",),
    "double_blocks.{}.text.to_qkv": ("double_blocks.{}.txt_attn.qkv",),
    "double_blocks.{}.text.to_out": ("double_blocks.{}.txt_attn.proj",),
    "double_blocks.{}.text.mlp_in": ("double_blocks.{}.txt_mlp.0",),
    "double_blocks.{}.text.mlp_out": ("double_blocks.{}.txt_mlp.2",),
    "single_blocks.{}.modulation": ("single_blocks.{}.modulation.lin",),
    "single_blocks.{}.to_qkv": ("single_blocks.{}.linear1",),
    "single_blocks.{}.mlp_in": ("single_blocks.{}.linear1",),
    "single_blocks.{}.to_out": ("single_blocks.{}.linear2",),
    "modulation_out": ("final_layer.adaLN_modulation.1",),
    "proj_out": ("final_layer.linear",),
    "double_blocks.{}.image.qk_norm": tuple(
        f"double_blocks.{{}}.img_attn.norm.{p}_norm.scale" for p in ("query", "key")
    ),
    "double_blocks.{}.text.qk_norm": tuple(
        f"double_blocks.{{}}.txt_attn.norm.{p}_norm.scale" for p in ("query", "key")
    ),
    "single_blocks.{}.qk_norm": tuple(f"single_blocks.{{}}.norm.{p}_norm.scale" for p in ("query", "key")),
}
_DIFFUSERS = {
    "image_in": ("x_embedder",),
    "text_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "double_blocks.{}.modulation": ("transformer_blocks.{}.norm1.linear", "transformer_blocks.{}.norm1_context.linear"),
    "double_blocks.{}.image.to_qkv": tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
    "double_blocks.{}.image.to_out": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.image.mlp_in": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.image.mlp_out": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.text.to_qkv": tuple(f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.{}.text.to_out": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.text.mlp_in": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.text.mlp_out": ("transformer_blocks.{}.ff_context.net.2",),
    "single_blocks.{}.modulation": ("single_transformer_blocks.{}.norm.linear",),
    "single_blocks.{}.to_qkv": tuple(f"single_transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
    "single_blocks.{}.mlp_in": ("single_transformer_blocks.{}.proj_mlp",),
    "single_blocks.{}.to_out": ("single_transformer_blocks.{}.proj_out",),
    "modulation_out": ("norm_out.linear",),
    "proj_out": ("proj_out",),
    "double_blocks.{}.image.qk_norm": tuple(f"transformer_blocks.{{}}.attn.norm_{part}.weight" for part in "qk"),
    "double_blocks.{}.text.qk_norm": tuple(f"transformer_blocks.{{}}.attn.norm_added_{part}.weight" for part in "qk"),
    "single_blocks.{}.qk_norm": tuple(f"single_transformer_blocks.{{}}.attn.norm_{part}.weight" for part in "qk"),
}
# Of which parts of their layer ours is made: (0, 1, 2) of 7 are its first three sevenths.
_ORIGINAL_PARTS = {"single_blocks.{}.to_qkv": ((0, 1, 2), 7), "single_blocks.{}.mlp_in": ((3, 4, 5, 6), 7)}
_DIFFUSERS_PARTS = {"modulation_out": ((1, 0), 2)}  # theirs is scale, then shift; the original's and ours not


ORIGINAL = Layout(layers=_ORIGINAL, parts=_ORIGINAL_PARTS)
DIFFUSERS = Layout(layers=_DIFFUSERS, parts=_DIFFUSERS_PARTS)


def xlabs_sources(names: Collection[str]) -> Sources:
    """What XLabs' LoRAs have of the original's joint layers: the first rows of a single block's, by a name of ours."""
    return {
        name: (name.replace(".to_qkv.", ".linear1.qkv."),)
        for name in names
        if name.startswith("single_blocks.") and name.endswith(".to_qkv.weight")
    }


def find_layout(checkpoint: Checkpoint) -> Layout:
    """The layout, with its prefix, that `checkpoint` has. Raises CheckpointError if it holds no FLUX.1 transformer."""
    return layout_of(checkpoint, (ORIGINAL, DIFFUSERS), _PROBE, "FLUX.1 transformer")
