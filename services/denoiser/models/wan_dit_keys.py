"""Where each tensor of `WanDiT` lies in the two checkpoint layouts: Wan's original one and diffusers'."""

from services.denoiser.models.dit_layout import Layout, layout_of
from services.modeling.weights import Checkpoint

_PROBE = "blocks.0.cross.text.to_kv.weight"

# Our layers and theirs, then our parameters that are no layers; `{}` is the number of a block. What several of theirs
# make is joined on dimension 0.
_ORIGINAL = {
    "patch_in": ("patch_embedding",),
    "text_in.in_layer": ("text_embedding.0",),
    "text_in.out_layer": ("text_embedding.2",),
    "time_in.in_layer": ("time_embedding.0",),
    "time_in.out_layer": ("time_embedding.2",),
    "modulation": ("time_projection.1",),
    "image_in.norm_in": ("img_emb.proj.0",),
    "image_in.in_layer": ("img_emb.proj.1",),
    "image_in.out_layer": ("img_emb.proj.3",),
    "image_in.norm_out": ("img_emb.proj.4",),
    "blocks.{}.to_qkv": tuple(f"blocks.{{}}.self_attn.{part}" for part in "qkv"),
    "blocks.{}.to_out": ("blocks.{}.self_attn.o",),
    "blocks.{}.cross_norm": ("blocks.{}.norm3",),
    "blocks.{}.cross.to_q": ("blocks.{}.cross_attn.q",),
    "blocks.{}.cross.text.to_kv": tuple(f"blocks.{{}}.cross_attn.{part}" for part in "kv"),
    "blocks.{}.cross.image.to_kv": tuple(f"blocks.{{}}.cross_attn.{part}_img" for part in "kv"),
    "blocks.{}.cross.to_out": ("blocks.{}.cross_attn.o",),
    "blocks.{}.mlp_in": ("blocks.{}.ffn.0",),
    "blocks.{}.mlp_out": ("blocks.{}.ffn.2",),
    "head.proj_out": ("head.head",),
    "image_in.positions": ("img_emb.emb_pos",),
    "blocks.{}.modulation": ("blocks.{}.modulation",),
    "blocks.{}.qk_norm": tuple(f"blocks.{{}}.self_attn.norm_{part}.weight" for part in "qk"),
    "blocks.{}.cross.q_norm": ("blocks.{}.cross_attn.norm_q.weight",),
    "blocks.{}.cross.text.k_norm": ("blocks.{}.cross_attn.norm_k.weight",),
    "blocks.{}.cross.image.k_norm": ("blocks.{}.cross_attn.norm_k_img.weight",),
    "head.modulation": ("head.modulation",),
}
_DIFFUSERS = {
    "patch_in": ("patch_embedding",),
    "text_in.in_layer": ("condition_embedder.text_embedder.linear_1",),
    "text_in.out_layer": ("condition_embedder.text_embedder.linear_2",),
    "time_in.in_layer": ("condition_embedder.time_embedder.linear_1",),
    "time_in.out_layer": ("condition_embedder.time_embedder.linear_2",),
    "modulation": ("condition_embedder.time_proj",),
    "image_in.norm_in": ("condition_embedder.image_embedder.norm1",),
    "image_in.in_layer": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "image_in.out_layer": ("condition_embedder.image_embedder.ff.net.2",),
    "image_in.norm_out": ("condition_embedder.image_embedder.norm2",),
    "blocks.{}.to_qkv": tuple(f"blocks.{{}}.attn1.to_{part}" for part in "qkv"),
    "blocks.{}.to_out": ("blocks.{}.attn1.to_out.0",),
    "blocks.{}.cross_norm": ("blocks.{}.norm2",),
    "blocks.{}.cross.to_q": ("blocks.{}.attn2.to_q",),
    "blocks.{}.cross.text.to_kv": tuple(f"blocks.{{}}.attn2.to_{part}" for part in "kv"),
    "blocks.{}.cross.image.to_kv": tuple(f"blocks.{{}}.attn2.add_{part}_proj" for part in "kv"),
    "blocks.{}.cross.to_out": ("blocks.{}.attn2.to_out.0",),
    "blocks.{}.mlp_in": ("blocks.{}.ffn.net.0.proj",),
    "blocks.{}.mlp_out": ("blocks.{}.ffn.net.2",),
    "head.proj_out": ("proj_out",),
    "image_in.positions": ("condition_embedder.image_embedder.pos_embed",),
    "blocks.{}.modulation": ("blocks.{}.scale_shift_table",),
    "blocks.{}.qk_norm": tuple(f"blocks.{{}}.attn1.norm_{part}.weight" for part in "qk"),
    "blocks.{}.cross.q_norm": ("blocks.{}.attn2.norm_q.weight",),
    "blocks.{}.cross.text.k_norm": ("blocks.{}.attn2.norm_k.weight",),
    "blocks.{}.cross.image.k_norm": ("blocks.{}.attn2.norm_added_k.weight",),
    "head.modulation": ("scale_shift_table",),
}

ORIGINAL = Layout(layers=_ORIGINAL)
DIFFUSERS = Layout(layers=_DIFFUSERS)


def find_layout(checkpoint: Checkpoint) -> Layout:
    """The layout, with its prefix, that `checkpoint` has. Raises CheckpointError if it holds no Wan transformer."""
    return layout_of(checkpoint, (ORIGINAL, DIFFUSERS), _PROBE, "Wan transformer")
