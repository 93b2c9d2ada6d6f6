"""Prometheus metrics of one server. Names carry their unit; labels are bounded (no prompt, no request id)."""

from __future__ import annotations

from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 10)
_BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """Every metric a server of any stage writes; each server has its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._http: WSGIServer | None = None
        self._of_calls(self.registry)
        self._of_denoising(self.registry)
        self._of_memory(self.registry)
        self._of_a_gateway(self.registry)

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

    def _of_calls(self, r: CollectorRegistry) -> None:
        """Calls, and work on the device."""
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

    def _of_denoising(self, r: CollectorRegistry) -> None:
        """Steps, and what is done between them."""
        self.denoise_step_seconds = Histogram(
            "safelight_denoise_step_seconds",
            "Duration of one denoising step of a batch.",
            ["model"],
            buckets=_SECONDS_BUCKETS,
            registry=r,
        )
        self.denoise_steps = Counter(
            "safelight_denoise_steps",
            "Denoising steps computed; wasted: the request had been cancelled, or had expired, when the step ended.",
            ["model", "outcome"],
            registry=r,
        )
        self.checkpoint_seconds = Histogram(
            "safelight_checkpoint_seconds",
            "Seconds of making one checkpoint.",
            buckets=_SECONDS_BUCKETS,
            registry=r,
        )
        self.preview_seconds = Histogram(
            "safelight_preview_seconds", "Seconds of making one preview.", buckets=_SECONDS_BUCKETS, registry=r
        )
        self.spilled_requests = Counter(
            "safelight_spilled_requests", "Requests that yielded and whose latents left the device.", registry=r
        )
        self.ranks = Gauge("safelight_ranks", "Processes that share a model and are up.", ["model"], registry=r)
        self.rank_restarts = Counter(
            "safelight_rank_restarts", "Times that the processes of a model were started again.", ["model"], registry=r
        )

    def _of_memory(self, r: CollectorRegistry) -> None:
        """What is held: weights, LoRAs, tensors for others, caches."""
        self.weights_resident_bytes = Gauge(
            "safelight_weights_resident_bytes", "Weights on the device now.", ["stage", "model"], registry=r
        )
        self.weights_peak_bytes = Gauge(
            "safelight_weights_peak_bytes", "Most weights on the device so far.", ["stage", "model"], registry=r
        )
        self.weights_streamed_bytes = Counter(
            "safelight_weights_streamed_bytes",
            "Weights copied to the device because they do not stay there.",
            ["stage", "model"],
            registry=r,
        )
        self.adapter_bytes = Gauge("safelight_adapter_bytes", "Bytes of loaded LoRAs.", ["stage"], registry=r)
        self.tensor_bytes = Counter(
            "safelight_tensor_bytes",
            "Tensor bytes received, by path (inline, local, shared, stream).",
            ["path"],
            registry=r,
        )
        self.shared_memory_fallbacks = Counter(
            "safelight_shared_memory_fallbacks", "Tensors streamed that a process of this host held.", registry=r
        )
        self.pulls_continued = Counter(
            "safelight_pulls_continued", "Chunk streams that broke and went on from there.", registry=r
        )
        self.leases = Gauge("safelight_leases", "Tensors held for consumers.", registry=r)
        self.leased_bytes = Gauge("safelight_leased_bytes", "Bytes of tensors held for consumers.", registry=r)
        self.cache_hits = Counter("safelight_cache_hits", "Answers from a cache.", ["cache"], registry=r)
        self.cache_misses = Counter("safelight_cache_misses", "Answers a cache lacked.", ["cache"], registry=r)
        self.cache_bytes = Gauge("safelight_cache_bytes", "Bytes a cache holds.", ["cache"], registry=r)

    def _of_a_gateway(self, r: CollectorRegistry) -> None:
        """Replicas, what is kept for requests, and how they are admitted."""
        self.replicas = Gauge("safelight_replicas", "Replicas known, by health.", ["stage", "healthy"], registry=r)
        self.retries = Counter("safelight_retries", "Stage calls repeated on another replica.", ["stage"], registry=r)
        self.resumes = Counter(
            "safelight_resumes", "Pictures that went on elsewhere after a loss.", ["reason"], registry=r
        )
        self.recomputed_steps = Counter(
            "safelight_denoise_recomputed_steps", "Denoising steps computed again after a loss.", registry=r
        )
        self.checkpoint_bytes = Gauge("safelight_checkpoint_bytes", "Bytes of checkpoints kept.", registry=r)
        self.journal_bytes = Gauge("safelight_journal_bytes", "Bytes of events kept for clients.", registry=r)
        self.admission_refused = Counter(
            "safelight_admission_refused",
            "Requests refused before any stage was called (deadline, overload, credits).",
            ["reason"],
            registry=r,
        )
        self.credits = Gauge(
            "safelight_credits", "Pictures on their way through the stages, and those that wait.", ["state"], registry=r
        )
        self.stage_backlog_seconds = Gauge(
            "safelight_stage_backlog_seconds",
            "Seconds of work that a stage has to do, as estimated.",
            ["stage"],
            registry=r,
        )
        self.deadline_missed = Counter(
            "safelight_deadline_missed", "Requests whose time was up, by the stage reached.", ["stage"], registry=r
        )
        self.estimate_ratio = Histogram(
            "safelight_estimate_ratio",
            "Seconds that a request took over those estimated when it was admitted.",
            buckets=_RATIO_BUCKETS,
            registry=r,
        )
        self.file_bytes = Counter("safelight_file_bytes", "Bytes of result files sent to clients.", registry=r)
