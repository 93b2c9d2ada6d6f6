"""Counts what a rank sends to others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _all_to_all(output: Tensor, leaving: Tensor, group: Any, coming: Sequence[int], *_: Any) -> int:
    """Of even splits."""
    return leaving.nbytes * (len(coming) - 1) // len(coming)


def _send(tensors: Sequence[Tensor], *_: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _all_gather(outputs: Sequence[Sequence[Tensor]], parts: Sequence[Tensor], *_: Any) -> int:
    return sum(part.nbytes * (len(gathered) - 1) for gathered, part in zip(outputs, parts, strict=True))


_SENT: dict[str, Callable[..., int]] = {
    "c10d::alltoall_base_": _all_to_all,
    "c10d::send": _send,
    "c10d::recv_": lambda *_: 0,
    "c10d::allgather_": _all_gather,
}


class SentBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is untyped
    """Within it, `total` grows by the bytes that this rank sends, from what torch.distributed is asked to do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator.namespace == "c10d":
            self.total += _SENT[operator.name().split(".")[0]](*args)
        return operator(*args, **(kwargs or {}))
