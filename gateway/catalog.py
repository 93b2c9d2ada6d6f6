"""Which models can be served from end to end: the stages' descriptions, merged."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.replicas import ReplicaSet
from safelight.errors import InvalidRequestError
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.work_pb2 import Adapter
from services.common.model_servicer import find_model


@dataclass(frozen=True)
class Stages:
    """The replicas of the three stages."""

    encoder: ReplicaSet
    denoiser: ReplicaSet
    decoder: ReplicaSet

    @property
    def all(self) -> tuple[ReplicaSet, ReplicaSet, ReplicaSet]:
        """In the order of a request's road."""
        return (self.encoder, self.denoiser, self.decoder)

    @property
    def adaptable(self) -> tuple[ReplicaSet, ReplicaSet]:
        """Those whose networks LoRAs change."""
        return (self.encoder, self.denoiser)

    @property
    def by_name(self) -> dict[str, ReplicaSet]:
        """The replicas by the name of their stage."""
        return {stage.stage: stage for stage in self.all}

    @property
    def capacity(self) -> int:
        """Pictures that the denoisers and the decoders both can take; 0: they have not told yet."""
        return min(self.denoiser.capacity, self.decoder.capacity)

    def models(self) -> list[ModelDescription]:
        """The models that every stage serves, each stage's part merged in."""
        parts = [stage.models for stage in self.all]
        complete = set.intersection(*(set(part) for part in parts))
        return [_merge([part[name] for part in parts], self.adapters(name)) for name in sorted(complete)]

    def adapters(self, model: str) -> list[Adapter]:
        """The LoRAs of a model that can be asked for: every stage has them, and the same ones."""
        names = [set(stage.adapters(model).items()) for stage in self.adaptable]
        return [Adapter(name=name, fingerprint=mark) for name, mark in sorted(set.intersection(*names))]

    def find(self, name: str) -> ModelDescription:
        """The model of that name; of no name, the only one.

        Raises:
            StageUnavailableError: a stage has no healthy replica.
            UnknownModelError: there is no such model.
            InvalidRequestError: no name, but several models.
        """
        for stage in self.all:
            if not stage.models:
                stage.pick(name)
        models = {model.name: model for model in self.models()}
        if not name and len(models) == 1:
            return next(iter(models.values()))
        if not name:
            raise InvalidRequestError.of("model", f"is empty; choose from {', '.join(models)}")
        return find_model(models, name)


def _merge(parts: list[ModelDescription], adapters: list[Adapter]) -> ModelDescription:
    merged = ModelDescription()
    for part in parts:
        merged.MergeFrom(part)
    del merged.adapters[:]
    merged.adapters.extend(adapters)
    return merged
