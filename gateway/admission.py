"""Who is let in: what can't meet its deadline, or would wait too long, is refused before any stage is called.

Only a request that allows it (`sampling.min_steps`) is given fewer steps instead: the most that still fit. Where no
denoiser has measured anything like a request there is no estimate, and it is let in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from gateway.admission_rules import AdmissionRules, most_steps
from gateway.admitted import Admitted
from gateway.calibration import Calibration
from gateway.catalog import Stages
from gateway.estimate import Estimate, RequestWork, estimate
from gateway.plan import GenerationPlan
from gateway.retry_times import RetryTimes
from gateway.settings import GatewaySettings
from gateway.work import Work, encode_image_work, model_calls, steps_work
from safelight.errors import (
    DeadlineExceededError,
    DeadlineUnreachableError,
    InvalidRequestError,
    OverloadedError,
)
from safelight.v1.work_pb2 import DETERMINISM_CLASS_EXACT, GenerationParameters, SamplingOptions
from services.common.metrics import Metrics
from services.common.strength import steps_run

# gRPC ends a call at its deadline by a clock of its own.
_TICK_SECONDS = 0.05
# Steps are chosen for so much of the time: with as many as just fit, half of the requests would be late.
_SPARE = 0.8

Expected = Callable[[int], Estimate | None]
"""The estimate of a request when it is run with so many steps."""


class Admission:
    """Lets requests in and knows what they have to come.

    Args:
        stages: the replicas and their load.
        settings: the bounds.
        metrics: where refusals, missed deadlines and the quality of the estimates are counted.
    """

    def __init__(self, stages: Stages, settings: GatewaySettings, metrics: Metrics) -> None:
        self._stages = stages
        self._max_images = settings.max_images_in_flight
        self._rules = AdmissionRules(settings.max_queue_seconds, settings.deadline_factor)
        self._metrics = metrics
        self._max_input_bytes = settings.max_input_bytes
        self._images = self._input_bytes = 0
        self._retry_times = RetryTimes(time.monotonic)
        self._calibration = Calibration(time.monotonic)

    @contextmanager
    def hold_inputs(self, input_bytes: int) -> Iterator[None]:
        """Count a request's input files for as long as the context lasts, which begins before they are opened.

        Raises:
            OverloadedError: with them, all requests' files would have more bytes than are allowed.
        """
        if input_bytes and self._input_bytes + input_bytes > self._max_input_bytes:
            raise self._too_large()
        self._input_bytes += input_bytes
        try:
            yield
        finally:
            self._input_bytes -= input_bytes

    @contextmanager
    def admit(self, plan: GenerationPlan, remaining_seconds: float | None) -> Iterator[Admitted]:
        """Let a request in for as long as the context lasts.

        Args:
            plan: what is asked for.
            remaining_seconds: time it has; None: no limit.

        Raises:
            InvalidRequestError: it asks for more pictures than are ever made at once.
            DeadlineUnreachableError: it would take longer than that.
            OverloadedError: too much other work is ahead of it.
        """
        started = time.monotonic()
        admitted = self._check(plan, remaining_seconds)
        images = len(plan.images)
        self._images += images
        admitted.start()
        try:
            yield admitted
        except (DeadlineExceededError, asyncio.CancelledError) as error:
            spent = time.monotonic() - started + _TICK_SECONDS
            late = remaining_seconds is not None and spent >= remaining_seconds
            if late or isinstance(error, DeadlineExceededError):
                self._metrics.deadline_missed.labels(admitted.stage).inc()
            raise
        else:
            self._learn(admitted, time.monotonic() - started)
        finally:
            admitted.end()
            self._images -= images

    def _learn(self, admitted: Admitted, seconds: float) -> None:
        if admitted.estimate:
            self._calibration.note(admitted.estimate.seconds, seconds)
            self._metrics.estimate_ratio.observe(seconds / admitted.estimated_seconds)

    def _check(self, plan: GenerationPlan, remaining_seconds: float | None) -> Admitted:
        sampling = plan.images[0].sampling
        loads = [stage.load(plan.model.name) for stage in self._stages.all]

        def expected(steps: int) -> Estimate | None:
            found = estimate(request_work(plan, steps), *loads)
            return found and replace(found, extra_seconds=self._calibration.extra_seconds(found.seconds))

        if len(plan.images) > self._max_images:
            raise InvalidRequestError.of(
                "num_images",
                f"is {len(plan.images)}; this gateway makes at most {self._max_images} at once: ask for fewer",
            )
        known = expected(sampling.steps)
        if self._images + len(plan.images) > self._max_images:
            raise self._too_many(plan, known)
        if known is None or self._rules.fits(known, remaining_seconds):
            return Admitted(plan, known, self._stages)
        steps = self._fewer_steps(sampling, expected, remaining_seconds)
        if steps is None:
            raise self._refusal(expected(sampling.min_steps or sampling.steps) or known, remaining_seconds)
        return Admitted(_with_steps(plan, steps), expected(steps), self._stages)

    def _fewer_steps(
        self, sampling: SamplingOptions, expected: Expected, remaining_seconds: float | None
    ) -> int | None:
        """The most steps that fit of those that the request allows; None: none do."""
        if not 0 < sampling.min_steps < sampling.steps:
            return None

        def fit(steps: int, seconds: float | None) -> bool:
            known = expected(steps)
            return known is None or self._rules.fits(known, seconds)

        spare = None if remaining_seconds is None else remaining_seconds * _SPARE
        if most := most_steps(sampling.min_steps, sampling.steps - 1, lambda steps: fit(steps, spare)):
            return most
        return sampling.min_steps if fit(sampling.min_steps, remaining_seconds) else None

    def _refusal(self, best: Estimate, remaining_seconds: float | None) -> DeadlineUnreachableError | OverloadedError:
        if remaining_seconds is not None and not self._rules.in_time(best.total_seconds, remaining_seconds):
            return self._unreachable(best, remaining_seconds)
        return self._overloaded(best)

    def _unreachable(self, best: Estimate, remaining_seconds: float) -> DeadlineUnreachableError:
        self._metrics.admission_refused.labels("deadline").inc()
        needed = best.total_seconds
        again = self._rules.in_time(best.idle_seconds, remaining_seconds)
        return DeadlineUnreachableError(
            f"the request would take about {needed:.1f} s and has {remaining_seconds:.1f} s: allow more time, ask for "
            "fewer steps or a smaller picture, or allow fewer steps under load with sampling.min_steps",
            retry_after_seconds=self._retry_after(best, needed - remaining_seconds) if again else None,
            estimated_seconds=f"{needed:.3f}",
            remaining_seconds=f"{remaining_seconds:.3f}",
        )

    def _overloaded(self, best: Estimate) -> OverloadedError:
        self._metrics.admission_refused.labels("overload").inc()
        stage = self._rules.full_stage(best) or "denoiser"
        ahead, room = best.stages[stage].ahead, self._rules.room(best, stage)
        return OverloadedError(
            f"the {stage} has {ahead:.1f} s of work ahead of this request and {room:.1f} are allowed: retry later, or "
            "add replicas",
            retry_after_seconds=self._retry_after(best, ahead - room),
            stage=stage,
            queue_seconds=f"{ahead:.3f}",
        )

    def _too_many(self, plan: GenerationPlan, known: Estimate | None) -> OverloadedError:
        self._metrics.admission_refused.labels("credits").inc()
        excess = self._images + len(plan.images) - self._max_images
        wait = 1.0
        if known is not None and self._images:
            wait = excess * max(part.ahead for part in known.stages.values()) / self._images
        return OverloadedError(
            f"{self._images} pictures are in work and {self._max_images} are allowed: retry later",
            retry_after_seconds=self._retry_after(known, wait),
            stage="gateway",
            capacity=str(self._max_images),
        )

    def _too_large(self) -> OverloadedError:
        self._metrics.admission_refused.labels("credits").inc()
        return OverloadedError(
            f"the requests in work have {self._input_bytes} bytes of input files and {self._max_input_bytes} are "
            "allowed: retry later",
            retry_after_seconds=self._retry_after(None, 1.0),
            stage="gateway",
            capacity=str(self._max_input_bytes),
        )

    def _retry_after(self, known: Estimate | None, wait_seconds: float) -> float:
        """Seconds until there will be room, later for each further request that is refused meanwhile."""
        busy = max(part.busy for part in known.stages.values()) if known else 0.0
        return self._retry_times.after(wait_seconds, busy)


def request_work(plan: GenerationPlan, steps: int) -> RequestWork:
    """What a plan asks of the stages when its schedule has so many steps."""
    model, shape = plan.model.name, plan.latent_shape
    exact = plan.determinism == DETERMINISM_CLASS_EXACT
    calls = model_calls(steps_run(steps, plan.strength), plan.calls_per_step)
    return RequestWork(
        encode=Work(model, rows=2),  # the prompt and the negative prompt
        denoise=steps_work(model, shape, calls, plan.images[0].guidance.scale, exact),
        decode=Work(model, shape),
        images=len(plan.images),
        encode_image=encode_image_work(model, shape) if plan.inputs.size else None,
    )


def _with_steps(plan: GenerationPlan, steps: int) -> GenerationPlan:
    """The same plan with fewer steps."""
    images = []
    for asked in plan.images:
        image = GenerationParameters()
        image.CopyFrom(asked)
        image.sampling.steps = steps
        images.append(image)
    return replace(plan, images=images, steps_saved=plan.images[0].sampling.steps - steps)
