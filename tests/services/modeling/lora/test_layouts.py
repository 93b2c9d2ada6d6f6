"""What names of tensors mean, and which layout they are of."""

from __future__ import annotations

import pytest

from services.modeling.lora.layouts import DENOISER, Place, read_layout

LAYER = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
FLAT_TEXT = TEXT.replace(".", "_")
PROCESSOR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"


def in_denoiser(layer: str, role: str) -> Place:
    return Place(DENOISER, layer, role)


@pytest.mark.parametrize(
    ("name", "layout", "place"),
    [
        (f"lora_unet_{LAYER}.lora_down.weight", "kohya", in_denoiser(LAYER, "down")),
        (f"lora_unet_{LAYER}.lora_up.weight", "kohya", in_denoiser(LAYER, "up")),
        (f"lora_unet_{LAYER}.lora_mid.weight", "kohya", in_denoiser(LAYER, "mid")),
        (f"lora_unet_{LAYER}.alpha", "kohya", in_denoiser(LAYER, "alpha")),
        (f"lora_unet_{LAYER}.dora_scale", "kohya", in_denoiser(LAYER, "dora_scale")),
        (f"lora_unet_{LAYER}.hada_w1_a", "kohya", in_denoiser(LAYER, "hada_w1_a")),
        (f"lora_unet_{LAYER}.lokr_t2", "kohya", in_denoiser(LAYER, "lokr_t2")),
        (f"lora_unet_{LAYER}.diff", "kohya", in_denoiser(LAYER, "diff")),
        (f"lora_te_{FLAT_TEXT}.alpha", "kohya", Place("text_encoder", FLAT_TEXT, "alpha")),
        ("lora_te1_a_b.alpha", "kohya", Place("text_encoder", "a_b", "alpha")),
        ("lora_te2_a_b.alpha", "kohya", Place("text_encoder_2", "a_b", "alpha")),
        ("lora_te3_a_b.alpha", "kohya", Place("text_encoder_3", "a_b", "alpha")),
        ("lora_transformer_a_b.lora_up.weight", "kohya", in_denoiser("a_b", "up")),
        ("lycoris_a_b.lokr_w1", "kohya", in_denoiser("a_b", "lokr_w1")),
        (f"unet.{DOTTED}.lora_A.weight", "diffusers", in_denoiser(LAYER, "down")),
        (f"unet.{DOTTED}.lora.up.weight", "diffusers", in_denoiser(LAYER, "up")),
        (f"{PROCESSOR}.to_q_lora.down.weight", "diffusers", in_denoiser(LAYER, "down")),
        (f"{PROCESSOR}.to_out_lora.up.weight", "diffusers", in_denoiser(f"{LAYER[:-1]}out_0", "up")),
        ("transformer.a.b.lora_B.weight", "diffusers", in_denoiser("a_b", "up")),
        (f"text_encoder.{TEXT}.lora_linear_layer.up.weight", "diffusers", Place("text_encoder", FLAT_TEXT, "up")),
        ("text_encoder_2.a.lora_A.weight", "diffusers", Place("text_encoder_2", "a", "down")),
        (f"base_model.model.{DOTTED}.lora_B.weight", "peft", in_denoiser(LAYER, "up")),
        (f"base_model.model.{DOTTED}.lora_A.default.weight", "peft", in_denoiser(LAYER, "down")),
        (f"base_model.model.{DOTTED}.lora_magnitude_vector", "peft", in_denoiser(LAYER, "magnitude")),
        (f"base_model.model.{DOTTED}.lora_magnitude_vector.x.weight", "peft", in_denoiser(LAYER, "magnitude")),
        ("diffusion_model.txt_in.lora_A.weight", "comfyui", in_denoiser("txt_in", "down")),
        ("double_blocks.3.processor.qkv_lora1.up.weight", "xlabs", in_denoiser("double_blocks_3_img_attn_qkv", "up")),
        ("double_blocks.3.processor.proj_lora2.up.weight", "xlabs", in_denoiser("double_blocks_3_txt_attn_proj", "up")),
        ("single_blocks.7.processor.qkv_lora.up.weight", "xlabs", in_denoiser("single_blocks_7_linear1_qkv", "up")),
        ("single_blocks.7.processor.proj_lora.down.weight", "xlabs", in_denoiser("single_blocks_7_linear2", "down")),
        (f"{DOTTED}.lora_A.weight", "bare", in_denoiser(LAYER, "down")),
    ],
)  # fmt: skip
def test_a_name_says_layout_component_layer_and_role(name: str, layout: str, place: Place) -> None:
    reading = read_layout([name])
    assert reading is not None
    assert (reading.layout, reading.places, reading.unknown) == (layout, {name: place}, ())


def test_the_layout_that_knows_most_names_is_the_file_s() -> None:
    kohya = [f"lora_unet_{LAYER}.{kind}" for kind in ("lora_down.weight", "lora_up.weight", "alpha")]
    reading = read_layout([*kohya, f"unet.{DOTTED}.lora_A.weight"])
    assert reading is not None
    assert reading.layout == "kohya"
    assert reading.unknown == (f"unet.{DOTTED}.lora_A.weight",)


@pytest.mark.parametrize("name", ["model.diffusion_model.out.2.weight", "conv_in.weight", "lora_unet_a.weight", ""])
def test_other_names_are_of_no_layout(name: str) -> None:
    assert read_layout([name]) is None
