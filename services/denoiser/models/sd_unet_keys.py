"""Where each tensor of `SDUNet` lies in the two checkpoint layouts: the original single file (ldm) and diffusers.

An ldm file may also hold averaged weights (`model_ema.*`, their names without dots); they are left alone and
`model.diffusion_model.*` is loaded, as everybody does.
"""

from collections.abc import Collection, Mapping

from services.denoiser.models.sd_unet_params import LDM_PREFIX, SDUNetParams

Sources = dict[str, tuple[str, ...]]

# Our layers' names and theirs; each has a weight and most have a bias.
_LDM_ENDS = {
    "time.0": "time_embed.0",
    "time.2": "time_embed.2",
    "added.0": "label_emb.0.0",
    "added.2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
_LDM_RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_DIFFUSERS_ENDS = {
    "time.0": "time_embedding.linear_1",
    "time.2": "time_embedding.linear_2",
    "added.0": "add_embedding.linear_1",
    "added.2": "add_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_DIFFUSERS_RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
# Both layouts call a transformer's layers alike. Where we name several of theirs, they are joined on dimension 0.
_TRANSFORMER: Sources = {"norm": ("norm",), "proj_in": ("proj_in",), "proj_out": ("proj_out",)}
_TRANSFORMER_BLOCK: Sources = {
    "norm1": ("norm1",),
    "self_attention.to_qkv": tuple(f"attn1.to_{part}" for part in "qkv"),
    "self_attention.to_out": ("attn1.to_out.0",),
    "norm2": ("norm2",),
    "cross_attention.to_q": ("attn2.to_q",),
    "cross_attention.to_kv": tuple(f"attn2.to_{part}" for part in "kv"),
    "cross_attention.to_out": ("attn2.to_out.0",),
    "norm3": ("norm3",),
    "mlp.proj": ("ff.net.0.proj",),
    "mlp.to_out": ("ff.net.2",),
}


def is_ldm(names: Collection[str]) -> bool:
    """Whether a checkpoint with these names is in the single-file layout."""
    return f"{LDM_PREFIX}{_LDM_ENDS['conv_in']}.weight" in names


def ldm_sources(names: Collection[str], params: SDUNetParams) -> Sources:
    """For each of the UNet's tensor names, the names in the original single file that make it."""
    places = {ours: f"{LDM_PREFIX}{theirs}" for ours, theirs in _ldm_places(params).items()}
    layers = {ours: f"{LDM_PREFIX}{theirs}" for ours, theirs in (_LDM_ENDS | _ldm_resamplers(params)).items()}
    return _sources(names, layers, places, _in_block(_LDM_RES_BLOCK, params))


def diffusers_sources(names: Collection[str], params: SDUNetParams) -> Sources:
    """For each of the UNet's tensor names, the names in diffusers' `unet` folder that make it."""
    layers = _DIFFUSERS_ENDS | _diffusers_resamplers(params)
    return _sources(names, layers, _diffusers_places(params), _in_block(_DIFFUSERS_RES_BLOCK, params))


def _in_block(res_block: Mapping[str, str], params: SDUNetParams) -> Sources:
    """The layers of a residual block and of a transformer as deep as they come, under their names in the block."""
    layers: Sources = {**{ours: (theirs,) for ours, theirs in res_block.items()}, **_TRANSFORMER}
    for index in range(max(*params.layers, params.middle_layers)):
        for ours, theirs in _TRANSFORMER_BLOCK.items():
            layers[f"blocks.{index}.{ours}"] = tuple(f"transformer_blocks.{index}.{layer}" for layer in theirs)
    return layers


def _sources(
    names: Collection[str], layers: Mapping[str, str], places: Mapping[str, str], in_block: Sources
) -> Sources:
    """Joins single layers with the layers of the blocks at `places`, and keeps what is among `names`."""
    found: Sources = {ours: (theirs,) for ours, theirs in layers.items()}
    for our_place, their_place in places.items():
        for ours, theirs in in_block.items():
            found[f"{our_place}.{ours}"] = tuple(f"{their_place}.{layer}" for layer in theirs)
    return {
        f"{ours}.{kind}": tuple(f"{layer}.{kind}" for layer in theirs)
        for ours, theirs in found.items()
        for kind in ("weight", "bias")
        if f"{ours}.{kind}" in names
    }


def _ldm_places(params: SDUNetParams) -> dict[str, str]:
    """Residual blocks and transformers in the original's flat lists, which also count the first convolution."""
    places = {
        "middle_in.res": "middle_block.0",
        "middle_in.transformer": "middle_block.1",
        "middle_out": "middle_block.2",
    }
    period = params.blocks_per_level + 1
    for level in range(len(params.widths)):
        for block in range(period):
            stage = level * period + block
            for kind, index in (("res", 0), ("transformer", 1)):
                places[f"down.{level}.blocks.{block}.{kind}"] = f"input_blocks.{stage + 1}.{index}"
                places[f"up.{level}.blocks.{block}.{kind}"] = f"output_blocks.{stage}.{index}"
    return places


def _ldm_resamplers(params: SDUNetParams) -> dict[str, str]:
    """The convolutions between the levels: a stage of their own on the way down, the last of a stage on the way up."""
    layers = {}
    period = params.blocks_per_level + 1
    for level, depth in enumerate(reversed(params.layers)):
        layers[f"down.{level}.downsample.conv"] = f"input_blocks.{(level + 1) * period}.0.op"
        layers[f"up.{level}.upsample.conv"] = f"output_blocks.{(level + 1) * period - 1}.{1 + bool(depth)}.conv"
    return layers


def _diffusers_places(params: SDUNetParams) -> dict[str, str]:
    """Residual blocks and transformers in diffusers' nested lists."""
    places = {
        "middle_in.res": "mid_block.resnets.0",
        "middle_in.transformer": "mid_block.attentions.0",
        "middle_out": "mid_block.resnets.1",
    }
    for level in range(len(params.widths)):
        for block in range(params.blocks_per_level + 1):
            for way in ("down", "up"):
                places[f"{way}.{level}.blocks.{block}.res"] = f"{way}_blocks.{level}.resnets.{block}"
                places[f"{way}.{level}.blocks.{block}.transformer"] = f"{way}_blocks.{level}.attentions.{block}"
    return places


def _diffusers_resamplers(params: SDUNetParams) -> dict[str, str]:
    """The convolutions between the levels."""
    return {
        f"{way}.{level}.{way}sample.conv": f"{way}_blocks.{level}.{way}samplers.0.conv"
        for level in range(len(params.widths))
        for way in ("down", "up")
    }
