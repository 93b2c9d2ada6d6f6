"""The LoRAs that a stage has loaded, by model and name, within bounds of number and bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol
from weakref import WeakSet

from safelight.errors import (
    CheckpointError,
    FieldViolation,
    InvalidRequestError,
    OutOfMemoryError,
    UnknownAdapterError,
)
from safelight.v1.adapter_service_pb2 import AdapterDescription, AdapterReport, LoadAdapterRequest
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.work_pb2 import Adapter as AdapterChoice
from services.common.executor import DeviceExecutor
from services.common.manifest import ModelEntry
from services.common.metrics import Metrics
from services.common.model_servicer import find_model
from services.modeling.lora.adapter import Adapter, Applied
from services.modeling.lora.settings import AdapterSettings

_REPORTED_KEYS = 20


class AdapterNetworks(Protocol):
    """The networks of a model that are a stage's, wherever they are."""

    def read(self, name: str, path: str) -> Adapter:
        """The LoRA of a file, read for them; raises InvalidRequestError as `read_adapter`."""
        ...

    def forget(self, adapter: Adapter) -> None:
        """Drop what was made of an adapter that is unloaded, on the device's thread."""
        ...


class AdapterLibrary:
    """Loads, lists, finds and unloads; confined to the event loop, but for reading files.

    A request holds the adapters that it found, so one that is unloaded meanwhile lives until the request ends.

    Args:
        networks: of each model.
        executor: of the device's thread.
        models: what is served; their lists of adapters are kept up to date.
        settings: the stage's, which say how much to hold.
        metrics: where the bytes are shown.
    """

    def __init__(
        self,
        networks: Mapping[str, AdapterNetworks],
        executor: DeviceExecutor,
        models: dict[str, ModelDescription],
        settings: AdapterSettings,
        metrics: Metrics,
    ) -> None:
        self._stage = settings.service
        self._networks = networks
        self._executor = executor
        self._models = models
        self._settings = settings
        self._metrics = metrics
        self._loaded: dict[str, dict[str, Adapter]] = {name: {} for name in models}
        self._alive: WeakSet[Adapter] = WeakSet()
        self._loading = asyncio.Lock()

    async def load(self, request: LoadAdapterRequest) -> AdapterDescription:
        """Read a file and give it its name; what it is, also if it was loaded before.

        Raises:
            UnknownModelError: the model is not served here.
            InvalidRequestError: the name is taken, or the file is not what it must be.
            OutOfMemoryError: there are as many already as the limits allow.
        """
        find_model(self._models, request.model)
        _check_names(request)
        async with self._loading:
            known = self._loaded[request.model].get(request.name)
            self._check_room(known is None)
            read = await asyncio.to_thread(self._networks[request.model].read, request.name, request.path)
            if known is None:
                self._keep(request.model, read)
            elif known.fingerprint != read.fingerprint:
                raise InvalidRequestError.of(
                    "name", f"{known.name!r} is taken, by {known.path}: unload that first, or give another name"
                )
            return self._describe(known or read)

    def load_manifest(self, entries: Iterable[ModelEntry]) -> None:
        """Load what the manifest names, before anything is served.

        Raises:
            CheckpointError: a file is not what it must be, or there are more than the settings allow.
        """
        for entry in entries:
            for adapter in entry.adapters:
                try:
                    self._check_room(is_new=True)
                    self._keep(entry.name, self._networks[entry.name].read(adapter.name, adapter.path))
                except (InvalidRequestError, OutOfMemoryError) as error:
                    where = f"model {entry.name!r}: adapter {adapter.name!r}"
                    raise CheckpointError(f"{where}: {error.message}", file=adapter.path) from error

    def listing(self, model: str) -> list[AdapterDescription]:
        """A model's adapters, sorted by name.

        Raises:
            UnknownModelError: the model is not served here.
        """
        find_model(self._models, model)
        return [self._describe(adapter) for _, adapter in sorted(self._loaded[model].items())]

    async def unload(self, model: str, name: str) -> None:
        """Forget an adapter; the requests that have found it keep it.

        Raises:
            UnknownModelError: the model is not served here.
            UnknownAdapterError: it has no adapter of that name.
        """
        find_model(self._models, model)
        async with self._loading:
            adapter = self._loaded[model].pop(name, None)
            if adapter is None:
                raise self._unknown(model, name, "is not loaded")
            self._changed(model)
            await self._executor.run(partial(self._networks[model].forget, adapter))

    def find(self, model: str, choices: Sequence[AdapterChoice]) -> tuple[Applied, ...]:
        """The adapters that a request names, with their scales, sorted by name; none for a scale of 0.

        Raises:
            UnknownAdapterError: one is not loaded, or is another file than the request was planned with.
        """
        found = []
        for choice in sorted(choices, key=lambda choice: choice.name):
            adapter = self._loaded[model].get(choice.name)
            if adapter is None:
                raise self._unknown(model, choice.name, "is not loaded")
            if choice.fingerprint not in ("", adapter.fingerprint):
                raise self._unknown(model, choice.name, f"is {adapter.fingerprint} here, not {choice.fingerprint}")
            found.append(Applied(adapter, adapter_scale(choice)))
        return tuple(applied for applied in found if applied.scale)

    def _keep(self, model: str, adapter: Adapter) -> None:
        self._check_bytes(adapter)
        self._loaded[model][adapter.name] = adapter
        self._alive.add(adapter)
        self._changed(model)

    def _changed(self, model: str) -> None:
        """Tell everybody what the model has now."""
        loaded = sorted(self._loaded[model].items())
        description = self._models[model]
        del description.adapters[:]
        description.adapters.extend(AdapterChoice(name=name, fingerprint=each.fingerprint) for name, each in loaded)
        self._metrics.adapter_bytes.labels(self._stage).set(self._bytes())

    def _bytes(self) -> int:
        """Of all adapters that anybody holds."""
        return sum(adapter.nbytes for adapter in self._alive)

    def _check_room(self, is_new: bool) -> None:
        count = sum(map(len, self._loaded.values()))
        if is_new and count >= self._settings.max_adapters:
            raise OutOfMemoryError(
                f"this {self._stage} holds {count} adapters, as many as it may: unload one, or raise max_adapters",
                stage=self._stage,
            )

    def _check_bytes(self, adapter: Adapter) -> None:
        total = self._bytes() + adapter.nbytes
        if total > self._settings.max_adapter_bytes:
            raise OutOfMemoryError(
                f"with {adapter.name!r} this {self._stage} would hold adapters of {total} bytes, more than the "
                f"{self._settings.max_adapter_bytes} allowed: unload one, or raise max_adapter_bytes",
                stage=self._stage,
            )

    def _unknown(self, model: str, name: str, what: str) -> UnknownAdapterError:
        loaded = ", ".join(sorted(self._loaded[model])) or "none"
        return UnknownAdapterError(
            f"adapter {name!r} of model {model!r} {what}; loaded are: {loaded}", adapter=name, model=model
        )

    def _describe(self, adapter: Adapter) -> AdapterDescription:
        match = adapter.match
        report = AdapterReport(
            stage=self._stage,
            layout=match.layout,
            matched_keys=match.matched,
            unmatched_keys=match.unmatched[:_REPORTED_KEYS],
            unmatched_count=len(match.unmatched),
            bytes=adapter.nbytes,
        )
        return AdapterDescription(
            name=adapter.name, path=adapter.path, fingerprint=adapter.fingerprint, reports=[report]
        )


def adapter_scale(choice: AdapterChoice) -> float:
    """Of a request's adapter; 1 if it says none."""
    return choice.scale if choice.HasField("scale") else 1.0


def _check_names(request: LoadAdapterRequest) -> None:
    if violations := [FieldViolation(field, "is empty") for field in ("name", "path") if not getattr(request, field)]:
        raise InvalidRequestError.of_all(violations)
