"""A rank: joins its group, reads its part of the network, and does what the service says until that hangs up."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is documented there

from safelight.errors import SafelightError, UnknownAdapterError
from services.common.logs import configure_logs
from services.denoiser.ranks.commands import (
    AdapterFile,
    AdapterReading,
    Answer,
    Command,
    Failed,
    Leave,
    Load,
    Loaded,
    Order,
    Predict,
    Prepare,
    ReadAdapter,
    RowFiles,
)
from services.denoiser.ranks.dealing import dealt
from services.denoiser.ranks.meeting import LOOPBACK, loopback_interface
from services.denoiser.ranks.messages import Channel, pack
from services.denoiser.registry import LocalDenoiser, loaders_over
from services.modeling.loading import load_models
from services.modeling.lora.adapter import Adapter, Applied
from services.modeling.lora.layouts import DENOISER
from services.modeling.lora.reading import read_adapter
from services.modeling.memory import is_out_of_memory
from services.modeling.parallel.mesh import ParallelMesh, mesh_of

_log = logging.getLogger("safelight.ranks")

# The service ends a group that hangs; torch's own clocks shall not run out before.
_NEVER = timedelta(days=1)


def obey(channel: Channel) -> None:
    """Everything that a rank does; returns never: the process ends when the service closes the channel."""
    orders: SimpleQueue[Order] = SimpleQueue()
    Thread(target=_receive, args=(channel, orders), daemon=True).start()
    load = orders.get().command
    assert isinstance(load, Load), "the first command is to load"
    try:
        rank = _join(load)
    except Exception as error:  # the process's boundary: the service says what becomes of it
        channel.send(pack(Failed(_told(error, load.rank))))
        orders.get()  # there is none: the service hangs up
        return
    channel.send(pack(rank.loaded()))
    while True:
        channel.send(pack(rank.answer(orders.get())))


def _receive(channel: Channel, orders: SimpleQueue[Order]) -> None:
    """Read ahead of the work, to see at once when the service is gone, whatever the rank waits for then."""
    try:
        while True:
            orders.put(channel.receive())
    except (EOFError, OSError):
        os._exit(0)


def _join(load: Load) -> Rank:
    """Raises CheckpointError when the network can't be read, or shared so."""
    configure_logs("denoiser", load.log_level)
    torch.set_num_threads(load.threads)
    device = torch.device(load.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    host, port = load.store
    if host == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    store = TCPStore(host, port, is_master=False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=load.rank, world_size=load.degrees.ranks, timeout=_NEVER)
    mesh = mesh_of(load.degrees, device)
    (model,) = load_models([load.entry], loaders_over(mesh), device).values()
    return Rank(model, mesh)


class Rank:
    """A network of which this process has a part, and what it keeps for the service.

    Args:
        model: the network.
        mesh: this rank's place among those that share it.
    """

    def __init__(self, model: LocalDenoiser, mesh: ParallelMesh) -> None:
        self._model = model
        self._mesh = mesh
        self._prepared: dict[int, Any] = {}
        self._adapters: dict[str, Adapter] = {}

    def loaded(self) -> Loaded:
        """What the service has to know of the model."""
        model = self._model
        return Loaded(
            model.describe("").SerializeToString(),
            model.sampling,
            model.fingerprint,
            model.preview_map,
            model.example_conditioning(),
            self._resident_bytes(),
        )

    def answer(self, order: Order) -> Answer | Failed:
        """What comes of an order; a failure is told when the device is done with what the order had begun."""
        try:
            self._keep_only(order)
            return self._obey(order.command)
        except Exception as error:  # the process's boundary: the service says what becomes of it
            if self._model.device.type == "cuda":
                torch.cuda.synchronize(self._model.device)
            return Failed(_told(error, self._mesh.all_ranks.rank))

    @torch.inference_mode()
    def _obey(self, command: Command) -> Answer:
        if isinstance(command, Predict):
            return self._predict(command)
        if isinstance(command, Prepare):
            return self._prepare(command)
        if isinstance(command, ReadAdapter):
            return self._read(command)
        assert isinstance(command, Leave), "loading comes first, and once"
        for weights in self._model.weights:
            weights.leave()
        return self._resident_bytes()

    def _keep_only(self, order: Order) -> None:
        for number in self._prepared.keys() - order.prepared:
            del self._prepared[number]
        for fingerprint in self._adapters.keys() - order.adapters:
            self._model.network.forget(self._adapters.pop(fingerprint))

    def _prepare(self, command: Prepare) -> Answer:
        with self._model.network.with_branches([self._applied(command.adapters)]):
            prepared = self._model.prepare(command.conditioning)
        self._prepared[command.number] = prepared
        return self._model.batch_key(prepared)

    def _predict(self, command: Predict) -> Tensor | None:
        """The predictions of the rows that are dealt to this rank's group; of the group's other ranks None.

        A group without rows is idle, unless other groups need its parts of the weights: then it computes a row along.
        """
        mine = dealt(len(command.rows), self._mesh.cfg.size)[self._mesh.cfg.rank]
        is_idle = mine.start == mine.stop
        if is_idle and not self._mesh.fsdp:
            return None
        predicted = self._predict_rows(command, slice(0, 1) if is_idle else mine)
        return predicted.cpu() if self._tells and not is_idle else None

    def _predict_rows(self, command: Predict, part: slice) -> Tensor:
        model = self._model
        adapters = [self._applied(row) for row in command.adapters[part]]
        rows = [self._prepared[number] for number in command.rows[part]]
        latents, timesteps = (tensor[part].to(model.device) for tensor in (command.latents, command.timesteps))
        with model.network.with_adapters(adapters, command.max_fused_bytes):
            return model.predict(latents, timesteps, rows)

    @property
    def _tells(self) -> bool:
        """Whether it is the first of the ranks that compute the same rows."""
        return not any(axis.rank for axis in (self._mesh.ring, self._mesh.ulysses, self._mesh.tensor))

    def _read(self, command: ReadAdapter) -> AdapterReading:
        adapter = self._read_file(command.name, command.path)
        return AdapterReading(adapter.fingerprint, adapter.match, adapter.nbytes)

    def _applied(self, files: RowFiles) -> tuple[Applied, ...]:
        return tuple(Applied(self._adapter(file), file.scale) for file in files)

    def _adapter(self, file: AdapterFile) -> Adapter:
        """The adapter of that fingerprint; a rank that was started after it was loaded reads it now.

        Raises:
            UnknownAdapterError: the file is another one by now.
        """
        adapter = self._adapters.get(file.fingerprint) or self._read_file(file.name, file.path)
        if adapter.fingerprint != file.fingerprint:
            raise UnknownAdapterError(
                f"adapter {file.name!r}: {file.path} has changed since it was loaded: unload it and load it again",
                adapter=file.name,
            )
        return adapter

    def _read_file(self, name: str, path: str) -> Adapter:
        adapter = read_adapter(name, path, [self._model.network], (DENOISER,))
        return self._adapters.setdefault(adapter.fingerprint, adapter)

    def _resident_bytes(self) -> int:
        return sum(weights.account.resident_bytes for weights in self._model.weights)


def _told(error: Exception, rank: int) -> Exception:
    """The error as the service gets it: those of requests as they are, others in words, as they may not travel."""
    if isinstance(error, SafelightError):
        return error
    if is_out_of_memory(error):
        return MemoryError(f"rank {rank}: {error}")
    _log.exception("a rank has failed", extra={"rank": rank})
    return RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
