"""What the tensor names of a LoRA's file mean: the layouts in use, told apart by the names themselves. Pure.

A layer is called by its name in the checkpoint that the LoRA was trained on, with underscores in place of dots: kohya's
files have it so, and the dots carry nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

Role: TypeAlias = str
"""What a tensor is to its layer: "down", "mid", "up", "alpha", "diff", "diff_b" (of its bias), "magnitude" (DoRA's, of
rows), "dora_scale" (of rows or columns), or one of LyCORIS' own, as they are called there: "hada_w1_a", "lokr_t2" …"""

DENOISER = "denoiser"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs.

    Args:
        component: DENOISER, or one of TEXT_ENCODERS.
        layer: name of the layer in the layout that it was trained on, underscores for dots.
        role: what the tensor is to the layer.
    """

    component: str
    layer: str
    role: Role


@dataclass(frozen=True)
class Reading:
    """What a layout makes of a file's names.

    Args:
        layout: its name.
        places: what is known, by the name in the file.
        unknown: the names that mean nothing in the layout.
    """

    layout: str
    places: Mapping[str, Place]
    unknown: tuple[str, ...]


_KOHYA_COMPONENTS = {
    "lora_unet": DENOISER,
    "lora_transformer": DENOISER,
    "lycoris": DENOISER,
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}
_DOTTED_COMPONENTS = {
    "unet.": DENOISER,
    "transformer.": DENOISER,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}
_LYCORIS_ROLE = r"(?P<lycoris>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)"
_KOHYA_ROLES: Mapping[str, Role] = {
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora_up.weight": "up",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "diff": "diff",
    "diff_b": "diff_b",
}
_KOHYA = re.compile(
    rf"(?P<component>{'|'.join(_KOHYA_COMPONENTS)})_(?P<layer>\w+)\."
    rf"(?:(?P<role>{'|'.join(map(re.escape, _KOHYA_ROLES))})|{_LYCORIS_ROLE})"
)
_LYCORIS = re.compile(rf"(?P<layer>.+)\.{_LYCORIS_ROLE}")
# What follows a layer's dotted name. PEFT puts the adapter's name between, diffusers of old its processors' own.
_DOTTED_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = tuple(
    (re.compile(rf"(?P<layer>.+?){suffix}"), role)
    for suffix, role in (
        (r"\.lora_A(\.\w+)?\.weight", "down"),
        (r"\.lora_B(\.\w+)?\.weight", "up"),
        (r"\.lora_(?:down|linear_layer\.down)\.weight", "down"),
        (r"\.lora_(?:up|linear_layer\.up)\.weight", "up"),
        (r"[._]lora\.down\.weight", "down"),
        (r"[._]lora\.up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.lora_magnitude_vector(\.\w+)*", "magnitude"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.alpha", "alpha"),
        (r"\.diff", "diff"),
        (r"\.diff_b", "diff_b"),
    )
)
_XLABS = re.compile(
    r"(?P<block>(?P<kind>double|single)_blocks\.\d+)\.processor\.(?P<layer>qkv|proj)_lora(?P<stream>[12]?)\."
    r"(?P<role>down|up)\.weight"
)
_XLABS_LAYERS = {
    ("double", "qkv", "1"): "img_attn.qkv",
    ("double", "proj", "1"): "img_attn.proj",
    ("double", "qkv", "2"): "txt_attn.qkv",
    ("double", "proj", "2"): "txt_attn.proj",
    ("single", "qkv", ""): "linear1.qkv",  # the first rows of linear1
    ("single", "proj", ""): "linear2",
}


def read_layout(names: Iterable[str]) -> Reading | None:
    """The layout that knows most of the names, and what they mean in it; None: no layout knows any.

    One that comes earlier in the list goes before one that knows as many.
    """
    names = list(names)
    known = {layout: {name: place for name in names if (place := read(name))} for layout, read in _LAYOUTS.items()}
    layout, places = max(known.items(), key=lambda item: len(item[1]))
    if not places:
        return None
    return Reading(layout, places, tuple(name for name in names if name not in places))


def flat(name: str) -> str:
    """A layer's name as `Place` has it."""
    return name.replace(".", "_")


def _kohya(name: str) -> Place | None:
    """lora_unet_<layer>.lora_down.weight and the like: kohya's sd-scripts, LyCORIS, most files of civitai."""
    if (match := _KOHYA.fullmatch(name)) is None:
        return None
    role = _KOHYA_ROLES[match["role"]] if match["role"] else match["lycoris"]
    return Place(_KOHYA_COMPONENTS[match["component"]], match["layer"], role)


def _diffusers(name: str) -> Place | None:
    """<component>.<layer>.lora_A.weight: diffusers' `save_lora_weights`, of now and of old."""
    for prefix, component in _DOTTED_COMPONENTS.items():
        if name.startswith(prefix):
            return _dotted(component, name.removeprefix(prefix))
    return None


def _peft(name: str) -> Place | None:
    """base_model.model.<layer>.lora_A.weight: what PEFT saves, of a network that it is not told the name of."""
    prefix = "base_model.model."
    return _dotted(DENOISER, name.removeprefix(prefix)) if name.startswith(prefix) else None


def _comfy(name: str) -> Place | None:
    """diffusion_model.<layer>.lora_A.weight: layers named as in the original checkpoints."""
    prefix = "diffusion_model."
    return _dotted(DENOISER, name.removeprefix(prefix)) if name.startswith(prefix) else None


def _xlabs(name: str) -> Place | None:
    """double_blocks.0.processor.qkv_lora1.down.weight: XLabs' FLUX; 1 is the picture's stream, 2 the text's."""
    if (match := _XLABS.fullmatch(name)) is None:
        return None
    layer = _XLABS_LAYERS.get((match["kind"], match["layer"], match["stream"]))
    if layer is None:
        return None
    return Place(DENOISER, flat(f"{match['block']}.{layer}"), "down" if match["role"] == "down" else "up")


def _bare(name: str) -> Place | None:
    """<layer>.lora_A.weight: a denoiser's layers without any prefix."""
    is_prefixed = name.startswith((*_DOTTED_COMPONENTS, *(f"{prefix}_" for prefix in _KOHYA_COMPONENTS)))
    return None if is_prefixed or _xlabs(name) else _dotted(DENOISER, name)


def _dotted(component: str, name: str) -> Place | None:
    if match := _LYCORIS.fullmatch(name):
        return Place(component, flat(match["layer"]), match["lycoris"])
    for pattern, role in _DOTTED_ROLES:
        if match := pattern.fullmatch(name):
            return Place(component, flat(_without_processor(match["layer"])), role)
    return None


def _without_processor(layer: str) -> str:
    """attn1.processor.to_q as attn1.to_q, attn1.processor.to_out as attn1.to_out.0."""
    named_beside = layer.replace(".processor.", ".")
    return f"{named_beside}.0" if named_beside != layer and layer.endswith(".to_out") else named_beside


_LAYOUTS: Mapping[str, Callable[[str], Place | None]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
    "peft": _peft,
    "comfyui": _comfy,
    "xlabs": _xlabs,
    "bare": _bare,
}
