"""The connection to a gateway: its stubs, and what a failed call of theirs means."""

from __future__ import annotations

import grpc

from safelight.errors import DeadlineExceededError, SafelightError, StageUnavailableError, from_rpc_error
from safelight.input_films import MAX_FILM_BYTES
from safelight.v1 import adapter_service_pb2_grpc, generation_service_pb2_grpc, model_service_pb2_grpc

# Trailer of every error that Safelight itself raises.
_STATUS_DETAILS = "grpc-status-details-bin"
# What gRPC says when a connection breaks or can't be made, and when a server stops in the middle of a call.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    ("grpc.max_send_message_length", MAX_FILM_BYTES + 8 * 1024 * 1024),
    # A connection that has died silently is told from a long step within 20 seconds. Keepalive's own timeout is not
    # enough: grpcio 1.85 gives a ping that is already under way a minute by default.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC answers calls with its last failure until it tries to connect again: sooner than it would by itself.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class Link:
    """A connection to a gateway.

    Args:
        endpoint: "host:port" or "unix:/path".
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._channel = grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
        self.generation = generation_service_pb2_grpc.GenerationServiceStub(self._channel)
        self.adapters = adapter_service_pb2_grpc.AdapterServiceStub(self._channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self.has_answered = False
        """Whether a gateway has ever been there."""

    async def close(self) -> None:
        """Close the connection; calls in progress are cancelled."""
        await self._channel.close()

    def is_lost(self, error: grpc.aio.AioRpcError) -> bool:
        """Whether a call failed because a gateway that was there before is gone.

        An endpoint that has never answered is not lost: it is wrong, and the caller shall hear of it at once.
        """
        return self.has_answered and error.code() in _LOST and not is_answer(error)

    def explained(self, error: grpc.aio.AioRpcError) -> SafelightError:
        """The exception of a failed call; where it is gRPC's own, with a sentence of ours."""
        known = from_rpc_error(error)
        if is_answer(error):
            return known
        if isinstance(known, DeadlineExceededError):
            return DeadlineExceededError(f"the gateway at {self.endpoint} was not done within timeout_seconds")
        if isinstance(known, StageUnavailableError):
            return StageUnavailableError(
                f"no gateway answers at {self.endpoint}: start one (safelight up), or correct the endpoint. "
                f"The cause: {known.message}"
            )
        return known


def is_answer(error: grpc.aio.AioRpcError) -> bool:
    """Whether the error is Safelight's own, and not gRPC's or a proxy's."""
    return any(key == _STATUS_DETAILS for key, _ in error.trailing_metadata() or ())
