"""The LoRAs that every replica shall have: told to all of them, also to those that come later or come back."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from gateway.catalog import Stages
from gateway.replicas import Replica
from safelight.errors import SafelightError, StageUnavailableError, UnknownAdapterError, from_rpc_error
from safelight.v1.adapter_service_pb2 import (
    AdapterDescription,
    ListAdaptersRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from safelight.v1.adapter_service_pb2_grpc import AdapterServiceStub
from safelight.v1.work_pb2 import Adapter

_log = logging.getLogger("safelight.adapters")
_LOAD_SECONDS = 300.0
_CALL_SECONDS = 10.0

Key = tuple[str, str]
"""Model and name of an adapter."""
Answer = TypeVar("Answer")


class Adapters:
    """Loads, lists and unloads on every replica of the encoder and the denoiser; confined to the event loop.

    What was loaded through this gateway is loaded again on replicas that lack it, and what was unloaded through it is
    unloaded on those that have it again.

    Args:
        stages: the replicas.
        interval_seconds: time between two looks at what replicas have.
    """

    def __init__(self, stages: Stages, interval_seconds: float) -> None:
        self._stages = stages
        self._interval_seconds = interval_seconds
        self._paths: dict[Key, str] = {}
        self._unloaded: set[Key] = set()
        self._users: Counter[Key] = Counter()
        self._ended = asyncio.Event()
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Keep replicas as they shall be, in the background."""
        self._begin(self._keep_restoring())

    async def close(self) -> None:
        """Stop that."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def load(self, request: LoadAdapterRequest) -> AdapterDescription:
        """Load a file on every replica of the model, or on none.

        Raises:
            SafelightError: of the kinds that AdapterService.LoadAdapter documents, as one of the replicas has put it.
        """
        model = self._stages.find(request.model).name
        key, request = (model, request.name), LoadAdapterRequest(model=model, name=request.name, path=request.path)
        async with self._changing:
            replicas = self._replicas(model)
            new = [replica for replica in replicas if request.name not in replica.adapters(model)]
            outcomes = await _all(_load(replica, request) for replica in replicas)
            failures = [outcome for outcome in outcomes if isinstance(outcome, SafelightError)]
            if failures:
                await _all(_unload(replica, key) for replica in new)
            else:
                self._paths[key] = request.path
                self._unloaded.discard(key)
            await self._look()
        if failures:
            raise next((each for each in failures if not isinstance(each, StageUnavailableError)), failures[0])
        return _merged([outcome for outcome in outcomes if isinstance(outcome, AdapterDescription)])[0]

    async def listing(self, model: str) -> list[AdapterDescription]:
        """A model's adapters by name, with what each replica made of them."""
        model = self._stages.find(model).name
        listings = await _all(_list(replica, model) for replica in self._replicas(model))
        return _merged([each for listing in listings if not isinstance(listing, SafelightError) for each in listing])

    async def unload(self, model: str, name: str) -> None:
        """Refuse an adapter to further requests, and forget it everywhere when those that use it have ended.

        It is forgotten also if the caller does not wait for that.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        model = self._stages.find(model).name
        key, replicas = (model, name), self._replicas(model)
        if key in self._unloaded or not any(name in replica.adapters(model) for replica in replicas):
            raise UnknownAdapterError(f"adapter {name!r} of model {model!r} is not loaded", adapter=name, model=model)
        self._paths.pop(key, None)
        self._unloaded.add(key)
        await asyncio.shield(self._begin(self._unload_unused(key)))

    @contextmanager
    def used(self, model: str, adapters: Sequence[Adapter]) -> Iterator[None]:
        """Within it, these adapters of a request stay loaded.

        Raises:
            UnknownAdapterError: one of them is being unloaded.
        """
        keys = [(model, adapter.name) for adapter in adapters]
        for _, name in self._unloaded.intersection(keys):
            raise UnknownAdapterError(f"adapter {name!r} of model {model!r} is being unloaded", adapter=name)
        self._users.update(keys)
        try:
            yield
        finally:
            self._users.subtract(keys)
            self._ended.set()

    async def _unload_unused(self, key: Key) -> None:
        while self._users[key] > 0:
            self._ended.clear()
            await self._ended.wait()
        async with self._changing:
            await _all(_unload(replica, key) for replica in self._available(key[0]))
            await self._look()

    async def _keep_restoring(self) -> None:
        while True:
            await asyncio.sleep(self._interval_seconds)
            async with self._changing:
                if work := list(self._lacking()):
                    await _all(work)
                    await self._look()

    def _lacking(self) -> Iterator[Coroutine[Any, Any, object]]:
        """Calls that bring replicas to what they shall have."""
        for (model, name), path in self._paths.items():
            request = LoadAdapterRequest(model=model, name=name, path=path)
            for replica in self._available(model):
                if name not in replica.adapters(model):
                    yield _load(replica, request)
        for key in self._unloaded:
            model, name = key
            for replica in self._available(model):
                if name in replica.adapters(model) and self._users[key] <= 0:
                    yield _unload(replica, key)

    def _replicas(self, model: str) -> list[Replica]:
        """The replicas of a model's encoder and denoiser; raises where there is none of either."""
        return [replica for stage in self._stages.adaptable for replica in stage.serving(model)]

    def _available(self, model: str) -> list[Replica]:
        """The same, if there are any."""
        return [replica for stage in self._stages.adaptable for replica in stage.available if model in replica.models]

    async def _look(self) -> None:
        """Read anew what the replicas have."""
        await asyncio.gather(*(stage.refresh() for stage in self._stages.adaptable))

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _all(calls: Iterable[Awaitable[Answer]]) -> list[Answer | SafelightError]:
    """The answers of all calls, or what they failed with."""
    return await asyncio.gather(*map(_outcome, calls))


async def _outcome(call: Awaitable[Answer]) -> Answer | SafelightError:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)


async def _load(replica: Replica, request: LoadAdapterRequest) -> AdapterDescription:
    response = await AdapterServiceStub(replica.channel).LoadAdapter(request, timeout=_LOAD_SECONDS)
    return _told_by(replica, response.adapter)


async def _list(replica: Replica, model: str) -> list[AdapterDescription]:
    request = ListAdaptersRequest(model=model)
    response = await AdapterServiceStub(replica.channel).ListAdapters(request, timeout=_CALL_SECONDS)
    return [_told_by(replica, adapter) for adapter in response.adapters]


async def _unload(replica: Replica, key: Key) -> None:
    model, name = key
    request = UnloadAdapterRequest(model=model, name=name)
    await AdapterServiceStub(replica.channel).UnloadAdapter(request, timeout=_CALL_SECONDS)


def _told_by(replica: Replica, adapter: AdapterDescription) -> AdapterDescription:
    """The adapter with the replica's address in its report."""
    for report in adapter.reports:
        report.replica = replica.address
    return adapter


def _merged(adapters: Sequence[AdapterDescription]) -> list[AdapterDescription]:
    """One of each name, with all reports, sorted by name."""
    by_name: dict[str, AdapterDescription] = {}
    for adapter in adapters:
        if known := by_name.get(adapter.name):
            known.reports.extend(adapter.reports)
        else:
            by_name[adapter.name] = adapter
    return [by_name[name] for name in sorted(by_name)]
