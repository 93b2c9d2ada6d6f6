"""Whether weights and tensors are those that a request was planned with. Pure.

A request may carry the fingerprint of each stage's weights (`WorkContext.fingerprints`). During a rolling upgrade two
revisions of a model run side by side: a stage refuses a request that was planned with the other revision, and tensors
that the other revision made, rather than mix the two into one picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from safelight.errors import FingerprintMismatchError
from safelight.v1.tensor_pb2 import Conditioning, TensorHeader
from safelight.v1.work_pb2 import WorkContext


def joint_fingerprint(fingerprints: Sequence[str]) -> str:
    """32 hex digits for a stage of several networks, in their order; for networks of one checkpoint, that one's own."""
    different = list(dict.fromkeys(fingerprints))
    if len(different) == 1:
        return different[0]
    return hashlib.blake2b("\0".join(different).encode(), digest_size=16).hexdigest()


def check_own_fingerprint(context: WorkContext, stage: str, fingerprint: str) -> None:
    """Check that the request was planned with this stage's weights, or with any.

    Raises:
        FingerprintMismatchError: it was planned with others.
    """
    wanted = context.fingerprints.get(stage, "")
    if wanted and wanted != fingerprint:
        raise _mismatch(
            f"context.fingerprints[{stage}]",
            f"the request was planned with {wanted} and this {stage} has {fingerprint}: use another replica, or plan "
            "the request again",
            stage,
        )


def check_tensor_fingerprint(context: WorkContext, maker: str, header: TensorHeader, field: str) -> None:
    """Check that a tensor was made by the weights of the stage `maker` that the request was planned with.

    Tensors and requests without a fingerprint pass.

    Raises:
        FingerprintMismatchError: others made it.
    """
    wanted = context.fingerprints.get(maker, "")
    if wanted and header.fingerprint and header.fingerprint != wanted:
        raise _mismatch(
            field,
            f"was made by a {maker} with the weights {header.fingerprint}, the request was planned with {wanted}: run "
            f"the {maker} again",
            maker,
        )


def check_conditioning_fingerprints(context: WorkContext, conditioning: Conditioning, field: str) -> None:
    """`check_tensor_fingerprint` for every tensor that an encoder made of a prompt."""
    for named in conditioning.tensors:
        check_tensor_fingerprint(context, "encoder", named.tensor.header, f"{field}.{named.name}")


def _mismatch(field: str, sentence: str, stage: str) -> FingerprintMismatchError:
    return FingerprintMismatchError(f"{field}: {sentence}", field=field, stage=stage)
