"""Laws of tensors on the wire: torch's bits arrive as they were, numpy sees the same, NaN is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from safelight import tensors
from safelight.errors import LeaseExpiredError, NonFiniteError, TensorCorruptError
from safelight.v1.load_service_pb2 import GetLoadResponse
from safelight.v1.tensor_pb2 import DataType, TensorHeader, TensorRef
from services.common.channels import ChannelPool
from services.common.exchange import BytesPayload, TensorReader, TensorStore
from services.common.metrics import Metrics
from services.common.server import Service
from services.common.stage import stage_mounts
from services.modeling.wire import (
    DATA_TYPES,
    TORCH_DTYPES,
    TorchPayload,
    check_finite,
    make_header,
    read_tensor,
    to_tensor,
)
from tests.serving import Serve

data_types = pytest.mark.parametrize("data_type", TORCH_DTYPES, ids=DataType.Name)
LARGE = (3, 64, 512)


def every_pattern(dtype: torch.dtype) -> Tensor:
    """All bit patterns of a one- or two-byte dtype, among them every NaN payload; samples of a wider one."""
    if dtype is torch.bool:
        return torch.tensor([False, True])
    if dtype.itemsize <= 2:
        return torch.from_numpy(np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}")).view(dtype)
    special = np.array([0, 1, 2**31, 0x7F800001, 0xFFC12345, 2**32 - 1, 2**63, 2**64 - 1], dtype="<u8")
    random = np.random.default_rng(0).integers(0, 2**64, 1000, dtype="<u8")
    return torch.from_numpy(np.concatenate([special, random]).view("u1")).view(dtype)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def round_trip(tensor: Tensor) -> Tensor:
    """Through the messages as another process would read them."""
    header = TensorHeader.FromString(make_header(tensor).SerializeToString())
    return to_tensor(header, BytesPayload(bytes(TorchPayload(tensor).buffer())))


def exchange() -> tuple[TensorStore, TensorReader]:
    metrics = Metrics()
    store = TensorStore(60.0, metrics)
    return store, TensorReader(store, ChannelPool(), 2**30, metrics)


async def put(store: TensorStore, tensor: Tensor) -> TensorRef:
    return await store.put(make_header(tensor), TorchPayload(tensor))


def test_torch_and_numpy_have_the_same_data_types() -> None:
    assert TORCH_DTYPES.keys() == tensors.NUMPY_DTYPES.keys()
    assert {dtype: data_type for data_type, dtype in TORCH_DTYPES.items()} == DATA_TYPES


@data_types
def test_every_bit_pattern_survives(data_type: DataType.ValueType) -> None:
    tensor = every_pattern(TORCH_DTYPES[data_type])
    received = round_trip(tensor)
    assert received.dtype == tensor.dtype
    assert raw(received) == raw(tensor)


@data_types
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3), (1, 2, 3, 4, 5)])
def test_every_shape_survives(data_type: DataType.ValueType, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(TORCH_DTYPES[data_type])
    received = round_trip(tensor)
    assert (received.shape, received.dtype) == (tensor.shape, tensor.dtype)
    assert raw(received) == raw(tensor)


@data_types
def test_numpy_sees_the_bits_that_torch_sent_and_the_other_way_round(data_type: DataType.ValueType) -> None:
    tensor = every_pattern(TORCH_DTYPES[data_type])
    array = tensors.from_bytes(make_header(tensor), TorchPayload(tensor).buffer())
    assert array.tobytes() == raw(tensor)
    back = to_tensor(tensors.make_header(array), BytesPayload(tensors.to_bytes(array)))
    assert back.dtype == tensor.dtype
    assert raw(back) == raw(tensor)


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        lambda: torch.arange(24)[::3],
        lambda: torch.ones(1).expand(2, 2),
        lambda: torch.ones(2, 2, requires_grad=True),
        lambda: torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=["permuted", "strided", "expanded", "with gradient", "channels last"],
)
def test_the_layout_in_memory_does_not_matter(view: Callable[[], Tensor]) -> None:
    tensor = view()
    assert torch.equal(round_trip(tensor), tensor)


def test_a_header_says_the_layout_and_the_weights() -> None:
    header = make_header(torch.zeros(1, 4, 8, 8), "BCHW", "5f0c")
    assert header == TensorHeader(
        dtype=DataType.DATA_TYPE_FLOAT32, shape=[1, 4, 8, 8], layout="BCHW", fingerprint="5f0c"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int16])
def test_a_dtype_that_the_wire_lacks_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"{dtype} can't be sent"):
        make_header(torch.zeros(1, dtype=dtype))


def test_pulled_bytes_are_viewed_not_copied() -> None:
    data = bytearray(torch.zeros(4).numpy().tobytes())
    tensor = to_tensor(make_header(torch.zeros(4)), BytesPayload(data))
    data[0] = 1
    assert tensor.view(torch.uint8)[0] == 1


def test_inline_bytes_make_a_tensor_that_may_be_written() -> None:
    data = bytes(16)
    tensor = to_tensor(make_header(torch.zeros(4)), BytesPayload(data))
    tensor += 1
    assert data == bytes(16)


@pytest.mark.parametrize("shape", [[3], [5], [2, 3], [-4], [2**40], [2**62, 2**62], [0, 2**62, 2**62], [1] * 9])
def test_a_shape_that_lies_about_the_bytes_is_refused(shape: list[int]) -> None:
    with pytest.raises(TensorCorruptError) as caught:
        to_tensor(TensorHeader(dtype=DataType.DATA_TYPE_FLOAT32, shape=shape), BytesPayload(bytes(16)))
    assert caught.value.metadata == {"field": "shape"}


async def test_in_process_the_consumer_has_the_producer_s_storage() -> None:
    store, reader = exchange()
    tensor = torch.rand(LARGE)
    read = await read_tensor(reader, await put(store, tensor), "latents")
    assert read.data_ptr() == tensor.data_ptr()


async def test_in_process_no_bytes_are_made_again_for_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on a GPU would be copied to the host for each consumer."""
    store, reader = exchange()
    ref = await put(store, torch.rand(LARGE))
    monkeypatch.delattr(TorchPayload, "buffer")
    assert (await read_tensor(reader, ref, "latents")).shape == LARGE


@pytest.mark.parametrize("shape", [(2,), LARGE], ids=["inline", "leased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
async def test_another_process_reads_an_equal_tensor(serve: Serve, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    store, _ = exchange()
    running = await serve(Service("denoiser", stage_mounts(store, [], GetLoadResponse)))
    store.advertise(running.server.address)
    tensor, channels = torch.rand(shape).to(dtype), ChannelPool()
    elsewhere = TensorReader(exchange()[0], channels, 2**30, Metrics())
    assert torch.equal(await read_tensor(elsewhere, await put(store, tensor), "latents"), tensor)
    await channels.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(5,), LARGE], ids=["inline", "in process"])
async def test_a_tensor_that_is_not_finite_is_refused_by_name(
    value: float, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    store, reader = exchange()
    tensor = torch.zeros(shape)
    tensor.view(-1)[-1] = value
    ref = await put(store, tensor.to(dtype))
    with pytest.raises(NonFiniteError, match=r"^conditioning\.prompt_embeds is not finite") as caught:
        await read_tensor(reader, ref, "conditioning.prompt_embeds")
    assert caught.value.metadata == {"field": "conditioning.prompt_embeds"}


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_finite_tensors_of_every_dtype_pass(dtype: torch.dtype) -> None:
    check_finite(torch.ones(3).to(dtype), "latents")


@pytest.mark.parametrize(
    ("shape", "data_type"),
    [([3, 64, 511], "DATA_TYPE_FLOAT32"), ([*LARGE], "DATA_TYPE_INT32"), ([9, 9], "DATA_TYPE_BOOL")],
)
async def test_a_header_changed_on_the_way_is_refused_in_process_too(shape: list[int], data_type: str) -> None:
    store, reader = exchange()
    ref = await put(store, torch.rand(LARGE))
    ref.header.shape[:] = shape
    ref.header.dtype = DataType.Value(data_type)
    with pytest.raises(TensorCorruptError, match="latents: the header promises") as caught:
        await read_tensor(reader, ref, "latents")
    assert caught.value.metadata == {"field": "latents"}


async def test_a_released_tensor_can_t_be_read() -> None:
    store, reader = exchange()
    ref = await put(store, torch.rand(LARGE))
    store.release([ref.lease.ticket])
    with pytest.raises(LeaseExpiredError):
        await read_tensor(reader, ref, "latents")
