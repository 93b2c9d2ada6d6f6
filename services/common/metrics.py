"""Prometheus metrics of one server. Names carry their unit; labels are bounded (no prompt, no request id)."""

from __future__ import annotations

from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """Every metric a server of any stage writes; each server has its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._http: WSGIServer | None = None
        r = self.registry
        self.requests = Counter("safelight_requests", "Calls ended, by status code.", ["method", "code"], registry=r)
        self.request_seconds = Histogram(
            "safelight_request_seconds", "Duration of calls.", ["method"], buckets=_SECONDS_BUCKETS, registry=r
        )
        self.requests_running = Gauge("safelight_requests_running", "Calls in progress.", ["method"], registry=r)
        self.queue_depth = Gauge("safelight_queue_depth", "Work waiting for the stage.", ["stage"], registry=r)
        self.running = Gauge("safelight_running", "Work the stage computes now.", ["stage"], registry=r)
        self.stage_seconds = Histogram(
            "safelight_stage_seconds",
            "Seconds one unit of work computed in a stage, without its queue.",
            ["stage", "model"],
            buckets=_SECONDS_BUCKETS,
            registry=r,
        )
        self.queue_seconds = Histogram(
            "safelight_queue_seconds",
            "Seconds one unit of work waited in a stage's queue.",
            ["stage"],
            buckets=_SECONDS_BUCKETS,
            registry=r,
        )
        self.batch_size = Histogram(
            "safelight_batch_size",
            "Units of work that shared a forward pass.",
            ["stage"],
            buckets=_BATCH_BUCKETS,
            registry=r,
        )
        self.denoise_step_seconds = Histogram(
            "safelight_denoise_step_seconds",
            "Duration of one denoising step of a batch.",
            ["model"],
            buckets=_SECONDS_BUCKETS,
            registry=r,
        )
        self.denoise_steps = Counter("safelight_denoise_steps", "Denoising steps computed.", ["model"], registry=r)
        self.tensor_bytes = Counter(
            "safelight_tensor_bytes", "Tensor bytes received, by path (inline, local, stream).", ["path"], registry=r
        )
        self.leases = Gauge("safelight_leases", "Tensors held for consumers.", registry=r)
        self.leased_bytes = Gauge("safelight_leased_bytes", "Bytes of tensors held for consumers.", registry=r)
        self.cache_hits = Counter("safelight_cache_hits", "Answers from a cache.", ["cache"], registry=r)
        self.cache_misses = Counter("safelight_cache_misses", "Answers a cache lacked.", ["cache"], registry=r)
        self.cache_bytes = Gauge("safelight_cache_bytes", "Bytes a cache holds.", ["cache"], registry=r)
        self.replicas = Gauge("safelight_replicas", "Replicas known, by health.", ["stage", "healthy"], registry=r)
        self.retries = Counter("safelight_retries", "Stage calls repeated on another replica.", ["stage"], registry=r)
        self.file_bytes = Counter("safelight_file_bytes", "Bytes of result files sent to clients.", registry=r)

    def serve(self, host: str, port: int) -> int:
        """Serve /metrics over HTTP from a thread of its own; returns the port (0 asks for a free one).

        Raises:
            OSError: the address can't be bound.
        """
        self._http, _ = start_http_server(port, addr=host, registry=self.registry)
        return self._http.server_port

    def close(self) -> None:
        """Stop serving /metrics, if it is served."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None
