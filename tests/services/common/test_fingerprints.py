"""Laws of fingerprints: a stage works with the weights that the request was planned with, or not at all."""

from __future__ import annotations

import pytest

from safelight.errors import FingerprintMismatchError
from safelight.v1.tensor_pb2 import Conditioning, NamedTensor, TensorHeader, TensorRef
from safelight.v1.work_pb2 import WorkContext
from services.common.fingerprints import (
    check_conditioning_fingerprints,
    check_own_fingerprint,
    check_tensor_fingerprint,
    joint_fingerprint,
)

PLANNED = WorkContext(fingerprints={"encoder": "e1", "denoiser": "d1"})


def test_a_stage_takes_what_was_planned_with_its_weights_or_with_any() -> None:
    check_own_fingerprint(PLANNED, "denoiser", "d1")
    check_own_fingerprint(PLANNED, "decoder", "anything")
    check_own_fingerprint(WorkContext(), "denoiser", "d1")


def test_a_stage_refuses_what_was_planned_with_other_weights_and_says_which() -> None:
    with pytest.raises(FingerprintMismatchError, match=r"d1.*d2") as caught:
        check_own_fingerprint(PLANNED, "denoiser", "d2")
    assert caught.value.metadata == {"field": "context.fingerprints[denoiser]", "stage": "denoiser"}


@pytest.mark.parametrize(("maker", "fingerprint"), [("encoder", "e1"), ("encoder", ""), ("decoder", "any")])
def test_a_tensor_of_the_planned_weights_or_of_none_is_taken(maker: str, fingerprint: str) -> None:
    check_tensor_fingerprint(PLANNED, maker, TensorHeader(fingerprint=fingerprint), "latents")


def test_a_tensor_of_other_weights_is_refused_by_its_field_and_maker() -> None:
    with pytest.raises(FingerprintMismatchError, match=r"e2.*e1") as caught:
        check_tensor_fingerprint(PLANNED, "encoder", TensorHeader(fingerprint="e2"), "image_embeds")
    assert caught.value.metadata == {"field": "image_embeds", "stage": "encoder"}


def test_every_tensor_of_a_conditioning_is_looked_at() -> None:
    good, bad = (
        NamedTensor(name=name, tensor=TensorRef(header=TensorHeader(fingerprint=fingerprint)))
        for name, fingerprint in (("prompt_embeds", "e1"), ("pooled", "e2"))
    )
    check_conditioning_fingerprints(PLANNED, Conditioning(tensors=[good]), "conditioning")
    with pytest.raises(FingerprintMismatchError, match=r"conditioning\.pooled"):
        check_conditioning_fingerprints(PLANNED, Conditioning(tensors=[good, bad]), "conditioning")


def test_asking_for_a_fingerprint_does_not_add_one_to_the_request() -> None:
    context = WorkContext()
    check_own_fingerprint(context, "denoiser", "d1")
    assert context == WorkContext()


def test_a_joint_fingerprint_depends_on_every_network_and_on_their_order() -> None:
    assert joint_fingerprint(["a", "a"]) == "a"
    assert len({joint_fingerprint(pair) for pair in (["a", "b"], ["b", "a"], ["a", "c"], ["ab", ""])}) == 4
    assert len(joint_fingerprint(["a", "b"])) == 32
