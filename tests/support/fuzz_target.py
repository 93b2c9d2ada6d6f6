"""A deployment to throw nonsense at: it runs on an event loop of its own, and is called with any bytes."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Any

import grpc

from safelight.v1.model_service_pb2 import GetModelRequest, GetModelResponse
from tests.support.cluster import Cluster, run_cluster

SECONDS = 20.0
"""Longest time of a call before it counts as hung."""
SHORT_LEASES: dict[str, Any] = {"lease_seconds": 3.0}
GAUGES = (
    "safelight_requests_running",
    "safelight_running",
    "safelight_queue_depth",
    "safelight_leases",
    "safelight_leased_bytes",
    "safelight_checkpoint_bytes",
)


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    code: grpc.StatusCode
    details: str
    seconds: float


class FuzzTarget:
    """A deployment on an event loop of its own, and plain channels to its servers that carry any bytes."""

    def __init__(self, manifest: str) -> None:
        self._manifest = manifest
        self._ready, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self._cluster: Cluster | None = None
        self._channels: dict[str, grpc.Channel] = {}

    async def _serve(self) -> None:
        try:
            async with run_cluster(
                self._manifest,
                encoder=SHORT_LEASES,
                denoiser={**SHORT_LEASES, "max_steps": 8, "max_latent_area": 1024, "warm_up_steps": 0},
                decoder={**SHORT_LEASES, "max_film_frames": 17, "max_frame_pixels": 4096},
                gateway={"max_images_in_flight": 4, "replica_wait_seconds": 1.0, "reattach_seconds": 0.1},
            ) as self._cluster:
                self._ready.set()
                await asyncio.to_thread(self._end.wait)
        finally:
            self._ready.set()

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()
        cluster = self.cluster
        assert cluster.gateway is not None
        servers = {"encoder": cluster.encoders[0], "denoiser": cluster.denoisers[0], "decoder": cluster.decoders[0]}
        for name, server in (*servers.items(), ("gateway", cluster.gateway)):
            self._channels[name] = grpc.insecure_channel(server.address)

    def stop(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._end.set()
        self._thread.join()

    @property
    def cluster(self) -> Cluster:
        assert self._cluster is not None, "the deployment did not start"
        return self._cluster

    def call(self, server: str, method: str, request: bytes) -> Outcome:
        """Send bytes as a request; a unary answer is a stream of one."""
        started = time.monotonic()
        send: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channels[server].unary_stream(
            f"/safelight.v1.{method}"
        )
        call = send(request, timeout=SECONDS)
        try:
            for _ in call:
                pass
        except grpc.RpcError:
            pass
        return Outcome(call.code(), call.details() or "", time.monotonic() - started)

    @property
    def denoiser_fingerprint(self) -> str:
        """Of the denoiser's weights."""
        send: grpc.UnaryUnaryMultiCallable[GetModelRequest, GetModelResponse] = self._channels["denoiser"].unary_unary(
            "/safelight.v1.ModelService/GetModel", GetModelRequest.SerializeToString, GetModelResponse.FromString
        )
        return send(GetModelRequest(name="tiny"), timeout=SECONDS).model.denoiser.fingerprint

    def left_behind(self) -> dict[str, float]:
        """What is not back at 0."""
        values = {name: self.cluster.total(name) for name in GAUGES}
        return {name: value for name, value in values.items() if value}

    def until_quiet(self) -> dict[str, float]:
        """What is left behind when leases have had the time to end."""
        give_up = time.monotonic() + SECONDS
        while (left := self.left_behind()) and time.monotonic() < give_up:
            time.sleep(0.02)
        return left
