"""Laws of channels: one a target, and no message grows beyond the limit."""

from __future__ import annotations

import gc
import weakref

import grpc
import pytest

from safelight.v1.encoder_service_pb2 import EncodeRequest, EncodeResponse
from safelight.v1.encoder_service_pb2_grpc import EncoderServiceStub
from services.common.channels import MAX_MESSAGE_BYTES, MAX_TARGETS, ChannelPool
from tests.serving import Serve, unary


async def test_a_pool_has_one_channel_a_target() -> None:
    pool = ChannelPool()
    first, again, other = pool.get("unix:/a"), pool.get("unix:/a"), pool.get("unix:/b")
    await pool.close()
    assert first is again
    assert first is not other


async def test_a_closed_pool_opens_anew() -> None:
    pool = ChannelPool()
    first = pool.get("unix:/a")
    await pool.close()
    assert pool.get("unix:/a") is not first
    await pool.close()


async def test_tensors_have_a_channel_of_their_own() -> None:
    pool = ChannelPool()
    assert pool.bulk("unix:/a") is pool.bulk("unix:/a")
    assert pool.bulk("unix:/a") is not pool.get("unix:/a")
    await pool.close()


async def test_a_pool_lets_go_of_the_target_that_was_longest_unused() -> None:
    pool = ChannelPool()
    kept, dropped = pool.get("unix:/kept"), weakref.ref(pool.get("unix:/dropped"))
    for number in range(MAX_TARGETS - 1):
        pool.get("unix:/kept")
        pool.get(f"unix:/{number}")
    gc.collect()
    assert dropped() is None
    assert pool.get("unix:/kept") is kept
    await pool.close()


@pytest.mark.parametrize(("size", "code"), [(MAX_MESSAGE_BYTES // 2, "OK"), (MAX_MESSAGE_BYTES, "RESOURCE_EXHAUSTED")])
async def test_a_message_beyond_the_limit_is_refused(serve: Serve, size: int, code: str) -> None:
    async def encode(request: EncodeRequest) -> EncodeResponse:
        return EncodeResponse()

    running = await serve(unary(encode))
    call = EncoderServiceStub(running.channel).Encode(EncodeRequest(prompts=["x" * size]))
    assert await call.code() is grpc.StatusCode[code]
