"""A receipt survives its JSON whole, and one that is not whole is refused with the field's name."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import InvalidRequestError, Receipt, StageSeconds

RECEIPT = Receipt(
    request_id="id",
    completed_at="2027-01-15T08:00:00.000+00:00",
    prompt="a cat, „ü“ 🐈",
    negative_prompt="",
    model="tiny",
    width=64,
    height=72,
    steps=7,
    sampler="ddim",
    sampler_parameters={"eta": 0.5},
    schedule="karras",
    schedule_parameters={},
    guidance_scale=3.5,
    distilled_guidance_scale=2.5,
    clip_skip=2,
    adapters={"style": 0.8},
    adapter_fingerprints={"style": "5f"},
    original_size=(4096, 2048),
    crop=(0, 16),
    target_size=None,
    seed=2**63 - 1,
    strength=0.6,
    inputs={"image": "ba78", "mask": "e3b0"},
    num_frames=None,
    fps=None,
    format="jpeg",
    quality=80,
    metadata=True,
    determinism="exact",
    fingerprints={"decoder": "d", "denoiser": "n", "encoder": "e"},
    steps_run=9,
    steps_recomputed=2,
    steps_saved=0,
    stages=(StageSeconds("encoder", "a:1", 0.0, 0.5, 0, 0), StageSeconds("denoiser", "b:1", 0.1, 2.0, 9, 4096)),
    media_type="image/jpeg",
    file_size=3,
    file_sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    client_version="0.1.0",
)
VALUES: dict[str, Any] = json.loads(RECEIPT.to_json())


def test_a_receipt_is_the_same_after_its_json() -> None:
    assert Receipt.from_json(RECEIPT.to_json()) == RECEIPT


def test_a_receipt_knows_its_file() -> None:
    assert RECEIPT.is_of(b"abc")
    assert not RECEIPT.is_of(b"abd")


def test_other_weights_are_told_by_stage() -> None:
    assert RECEIPT.stages_with_other_weights(RECEIPT.fingerprints) == []
    assert RECEIPT.stages_with_other_weights({"encoder": "e", "denoiser": "other"}) == ["decoder", "denoiser"]


def test_the_options_of_a_receipt_are_its_parameters() -> None:
    options = RECEIPT.options()
    assert (options.prompt, options.seed, options.num_images, options.determinism) == (
        RECEIPT.prompt,
        RECEIPT.seed,
        1,
        "exact",
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"safelight_receipt": 2}, "^safelight_receipt: is 2; this release reads 1"),
        ({"safelight_receipt": True}, "^safelight_receipt: is True"),
        ({"seed": "5"}, "^receipt.seed: is '5'; must be of type int"),
        ({"seed": True}, "^receipt.seed: is True; must be of type int"),
        ({"quality": 1.5}, "^receipt.quality: is 1.5; must be of type int or null"),
        ({"metadata": 1}, "^receipt.metadata: is 1; must be of type bool"),
        ({"crop": [0, 1, 2]}, r"^receipt.crop: is \[0, 1, 2\]; must be a list of two whole numbers"),
        ({"target_size": "64x64"}, "^receipt.target_size: is '64x64'; must be a list of two"),
        ({"sampler_parameters": {"eta": "0.5"}}, "^receipt.sampler_parameters.eta: is '0.5'; must be of type float or"),
        ({"fingerprints": []}, r"^receipt.fingerprints: is \[\]; must be an object"),
        ({"fingerprints": {"encoder": None}}, "^receipt.fingerprints.encoder: is None; must be of type str"),
        ({"stages": {}}, "^receipt.stages: is {}; must be a list"),
        ({"stages": [3]}, r"^receipt.stages\[0\]: must be an object"),
        ({"stages": [{"stage": "encoder"}]}, r"^receipt.stages\[0\].replica: is missing"),
        ({"guidance_scale": float("nan")}, "^receipt: is no JSON: NaN is no number"),
        ({"colour": "red"}, "^receipt.colour: is not a field"),
    ],
)
def test_a_field_that_is_wrong_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        Receipt.from_json(json.dumps({**VALUES, **change}))


@pytest.mark.parametrize("field", sorted(set(VALUES) - {"safelight_receipt"}))
def test_a_field_that_is_missing_is_named(field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^receipt.{field}: is missing"):
        Receipt.from_json(json.dumps({name: value for name, value in VALUES.items() if name != field}))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"seed": 3}', "[" * 100_000])
def test_what_is_no_receipt_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^receipt: "):
        Receipt.from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(VALUES)), value=JSON)
def test_any_value_in_any_field_is_read_as_it_is_or_refused(field: str, value: Any) -> None:
    text = json.dumps({**VALUES, field: value})
    with suppress(InvalidRequestError):
        assert json.loads(Receipt.from_json(text).to_json()) == json.loads(text)
