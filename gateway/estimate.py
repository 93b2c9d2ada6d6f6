"""How long work will take: arithmetic on what the stages have measured and have queued. Pure.

An estimate is the time of a queue in which nobody overtakes, or of sharing the device with everyone there, whichever is
shorter. It leaves out transfers, which are short beside the computations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gateway.costs import Costs
from gateway.work import Work


@dataclass(frozen=True)
class ReplicaLoad:
    """What a replica has to do at one moment.

    Args:
        backlog_seconds: seconds of work that it has accepted.
        requests: how many requests that is.
        costs: what it has measured.
    """

    backlog_seconds: float
    requests: int
    costs: Costs


@dataclass
class Pending:
    """Work that is to come: how many seconds, and how many pieces."""

    seconds: float = 0.0
    pieces: int = 0

    def add(self, seconds: float, pieces: int) -> None:
        """Count pieces of so many seconds each in, or with a negative number out again."""
        self.pieces += pieces
        self.seconds = self.seconds + seconds * pieces if self.pieces else 0.0


@dataclass(frozen=True)
class StageLoad:
    """What a stage has to do at one moment.

    Args:
        replicas: those that take work.
        pending: work that the gateway has admitted and given to no replica yet.
    """

    replicas: Sequence[ReplicaLoad]
    pending: Pending = field(default_factory=Pending)

    def spread(self) -> list[ReplicaLoad]:
        """The replicas' loads when the work that is pending has been spread over them."""
        count = len(self.replicas)
        return [
            replace(
                load,
                backlog_seconds=load.backlog_seconds + self.pending.seconds / count,
                requests=load.requests + round(self.pending.pieces / count),
            )
            for load in self.replicas
        ]


@dataclass(frozen=True)
class StageTime:
    """What a request's work takes in one stage.

    Args:
        ahead: seconds until the first replica would begin with it, if nobody shared.
        each: seconds of the fastest replica's device for one piece, among others.
        busy: seconds that all pieces take of the stage, among others.
        alone: seconds until all are done on an idle stage.
        done: seconds until they are done.
    """

    ahead: float
    each: float
    busy: float
    alone: float
    done: float


def stage_time(stage: StageLoad, work: Work, count: int, shared: bool) -> StageTime | None:
    """What so many equal pieces of work take in a stage; None: no replica has measured anything like it.

    A replica that has not is taken to be as fast as one that has.

    Args:
        stage: its load.
        work: one piece.
        count: pieces.
        shared: whether replicas take turns between all that they have, pass by pass, as denoisers do.
    """
    spread = stage.spread()
    measured = [(load.costs, load.costs.device_seconds(work)) for load in spread]
    known = {costs: seconds for costs, seconds in measured if seconds is not None}
    if not known:
        return None
    each, usual = min(known.values()), next(iter(known))
    loads = [load if load.costs in known else replace(load, costs=usual) for load in spread]
    idle = [ReplicaLoad(0.0, 0, load.costs) for load in loads]
    return StageTime(
        ahead=min(load.backlog_seconds for load in loads),
        each=each,
        busy=each * count / len(loads),
        alone=_done(idle, work, count, shared),
        done=_done(loads, work, count, shared),
    )


def _done(loads: Sequence[ReplicaLoad], work: Work, count: int, shared: bool) -> float:
    """Seconds until the last of the pieces is done, each given to the replica that is done with it first."""
    queues = [_Queue(load, work) for load in loads]
    for _ in range(count):
        min(queues, key=lambda queue: queue.done(queue.pieces + 1)).pieces += 1
    used = [queue for queue in queues if queue.pieces]
    return max(queue.shared_done() if shared else queue.done(queue.pieces) for queue in used)


class _Queue:
    """A replica's queue with pieces of a request at its end."""

    def __init__(self, load: ReplicaLoad, work: Work) -> None:
        self.pieces = 0
        self._load = load
        self._work = work
        self._alone = load.costs.seconds(work) or 0.0
        self._each = load.costs.device_seconds(work) or 0.0

    def done(self, pieces: int) -> float:
        """Seconds until so many pieces are done when nobody overtakes."""
        return self._load.backlog_seconds + self._alone + (pieces - 1) * self._each

    def shared_done(self) -> float:
        """The same when all take turns: then the request is done long before what is longer than it."""
        sharing = self._load.costs.seconds(self._work, self._load.requests + self.pieces) or 0.0
        return min(self.done(self.pieces), sharing)


@dataclass(frozen=True)
class RequestWork:
    """What a whole request asks of the stages.

    Args:
        encode: its prompts.
        denoise: one of its latents.
        decode: one of its latents.
        images: how many latents there are.
        encode_image: its input picture or film; None: it has none.
    """

    encode: Work
    denoise: Work
    decode: Work
    images: int
    encode_image: Work | None = None


@dataclass(frozen=True)
class Estimate:
    """What a request will take.

    Args:
        seconds: until its result, by what the stages have measured.
        idle_seconds: the same, if there were no other work.
        stages: what it takes in each stage that has measured anything like it; in the denoiser always.
        extra_seconds: what such requests took beyond that of late.
    """

    seconds: float
    idle_seconds: float
    stages: Mapping[str, StageTime]
    extra_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        """Seconds until its result."""
        return self.seconds + self.extra_seconds


def estimate(work: RequestWork, encoder: StageLoad, denoiser: StageLoad, decoder: StageLoad) -> Estimate | None:
    """What a request will take; None: no denoiser has measured anything like it.

    An encoder or a decoder that has measured nothing yet counts nothing: its part is small.
    """
    denoise = stage_time(denoiser, work.denoise, work.images, shared=True)
    if denoise is None:
        return None
    encode = stage_time(encoder, work.encode, 1, shared=False)
    image = stage_time(decoder, work.encode_image, 1, shared=False) if work.encode_image else None
    decode = stage_time(decoder, work.decode, work.images, shared=False)
    inputs = [time for time in (encode, image) if time is not None]  # they are encoded at once
    done = max((time.done for time in inputs), default=0.0)
    idle = max((time.alone for time in inputs), default=0.0)
    for time in filter(None, (denoise, decode)):
        done = max(done + time.alone, time.done)  # it begins when it has come and those ahead of it have gone
        idle += time.alone
    times = {"encoder": encode, "denoiser": denoise, "decoder": _decoder_time(image, decode, work.images)}
    return Estimate(done, idle, {stage: time for stage, time in times.items() if time is not None})


def _decoder_time(image: StageTime | None, decode: StageTime | None, images: int) -> StageTime | None:
    """What encoding the input picture and decoding so many latents take in the decoder; a piece takes their mean."""
    if image is None or decode is None:
        return image or decode
    return StageTime(
        ahead=decode.ahead,
        each=(image.each + decode.each * images) / (1 + images),
        busy=image.busy + decode.busy,
        alone=image.alone + decode.alone,
        done=decode.done,
    )
