"""Client channels between services: one an endpoint for calls, and one for tensors, kept open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import grpc

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Largest message of any call but of those that bring a film; tensors and results travel in chunks."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A silent peer (its node is gone) is noticed within seconds, not at TCP's time-out.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),  # of a ping that is under way already; by default a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Every replica gets a connection of its own, also when two names resolve to one address.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

_BULK_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Chunks arrive in few large pieces: each piece costs a wake-up, and on a busy machine that is most of the time.
    ("grpc.http2.max_frame_size", 1024 * 1024),
    ("grpc.http2.lookahead_bytes", 8 * 1024 * 1024),
    ("grpc.experimental.tcp_read_chunk_size", 1024 * 1024),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 * 1024 * 1024),
)


def open_channel(target: str, max_send_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A channel to another service, with this project's limits and keepalive."""
    options = (*CHANNEL_OPTIONS, ("grpc.max_send_message_length", max_send_bytes))
    return grpc.aio.insecure_channel(target, options=options)


def open_bulk_channel(target: str) -> grpc.aio.Channel:
    """A channel for tensors: the same, with larger pieces."""
    return grpc.aio.insecure_channel(target, options=_BULK_OPTIONS)


MAX_TARGETS = 256
"""Targets that a pool keeps channels to: replicas come and go, and what a lease names need not exist."""
_Channels = OrderedDict[str, grpc.aio.Channel]


class ChannelPool:
    """Channels by target, opened at first use; of targets that were long not used, they are let go.

    Tensors have connections of their own: what shares a connection with 64 MiB waits for its turn among them.

    Args:
        max_send_bytes: largest message that is sent.
    """

    def __init__(self, max_send_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._open_channel = partial(open_channel, max_send_bytes=max_send_bytes)
        self._control: _Channels = OrderedDict()
        self._bulk: _Channels = OrderedDict()

    def get(self, target: str) -> grpc.aio.Channel:
        """The channel to a target for calls, whose messages are small."""
        return _get_or_open(self._control, target, self._open_channel)

    def bulk(self, target: str) -> grpc.aio.Channel:
        """The channel to a target for the bytes of tensors."""
        return _get_or_open(self._bulk, target, open_bulk_channel)

    async def close(self) -> None:
        """Close every channel; calls in flight are cancelled."""
        for channels in (self._control, self._bulk):
            for channel in channels.values():
                await channel.close()
            channels.clear()


def _get_or_open(channels: _Channels, target: str, open_one: Callable[[str], grpc.aio.Channel]) -> grpc.aio.Channel:
    if target not in channels:
        channels[target] = open_one(target)
    channels.move_to_end(target)
    if len(channels) > MAX_TARGETS:
        channels.popitem(last=False)  # it closes when its last user lets go of it
    return channels[target]
