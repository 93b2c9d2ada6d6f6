"""From a LoRA's file to an adapter on the device, or to a sentence that says why not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from safelight.errors import CheckpointError, InvalidRequestError
from services.modeling.lora.adapter import Adapter, Change, Match
from services.modeling.lora.deltas import Delta
from services.modeling.lora.kinds import BIAS, Layer, MisfitError, Scale, make_delta, make_offset
from services.modeling.lora.layouts import Reading, Role, read_layout
from services.modeling.lora.network import AdaptableNetwork
from services.modeling.lora.scales import PeftConfig, read_configs
from services.modeling.lora.targets import Target
from services.modeling.weights import Checkpoint, open_checkpoint

_NAMED_KEYS = 3


@torch.inference_mode()
def read_adapter(name: str, path: str, networks: Sequence[AdaptableNetwork], components: Collection[str]) -> Adapter:
    """The LoRA of a safetensors file, or of a folder with one.

    Args:
        name: what requests will call it.
        path: of the file.
        networks: the stage's.
        components: of all that are the stage's; what belongs to others is left to other stages.

    Raises:
        InvalidRequestError: the file can't be read, is of no known layout, does not fit, or nothing of it matches.
    """
    try:
        checkpoint = open_checkpoint(Path(path))
        configs = read_configs(checkpoint)
    except (CheckpointError, OSError, ValueError) as error:
        raise InvalidRequestError.of("path", str(error)) from error
    reading = read_layout(checkpoint.keys())
    if reading is None:
        raise _refusal(path, f"is no LoRA of a known layout; it has {_first(list(checkpoint.keys()))}")
    by_component = {component: network for network in networks for component in network.components}
    changes: dict[str, list[Change]] = defaultdict(list)
    matched, unmatched = 0, list(reading.unknown)
    for (component, layer), keys in _layers(reading, components).items():
        network = by_component.get(component)
        targets = network.targets.get(layer) if network else None
        if network is None or targets is None:
            unmatched += keys.values()
            continue
        scale = configs.get(component, PeftConfig()).scale(layer)
        for delta in _deltas(path, checkpoint, keys, network, targets, scale):
            for each in targets:
                changes[network.component] += network.changes(each, delta.rows(each.source_start, each.source_stop))
        matched += len(keys)
    if unmatched and not matched and len(unmatched) > len(reading.unknown):
        raise _refusal(path, f"fits nothing of the model: it is for another family, with {_first(unmatched)}")
    return Adapter(
        name,
        path,
        checkpoint.fingerprint,
        {component: tuple(found) for component, found in changes.items()},
        Match(reading.layout, matched, tuple(unmatched)),
        sum(change.delta.nbytes for found in changes.values() for change in found),
    )


@dataclass(frozen=True)
class StageNetworks:
    """The networks of a model that are a stage's, as those that adapters are read for.

    Args:
        networks: all of them.
        components: see `read_adapter`.
    """

    networks: Sequence[AdaptableNetwork]
    components: Collection[str]

    def read(self, name: str, path: str) -> Adapter:
        """The LoRA of a file; see `read_adapter`."""
        return read_adapter(name, path, self.networks, self.components)

    def forget(self, adapter: Adapter) -> None:
        """Drop what the networks have fused of it; called on the device's thread."""
        for network in self.networks:
            network.forget(adapter)


def _layers(reading: Reading, components: Collection[str]) -> dict[tuple[str, str], dict[Role, str]]:
    """The names of each layer's tensors by their roles, of the layers that are the stage's; layers by component."""
    layers: dict[tuple[str, str], dict[Role, str]] = defaultdict(dict)
    for key, place in reading.places.items():
        if place.component in components:
            layers[place.component, place.layer][place.role] = key
    return layers


def _deltas(
    path: str,
    checkpoint: Checkpoint,
    keys: Mapping[Role, str],
    network: AdaptableNetwork,
    targets: Sequence[Target],
    scale: Scale,
) -> list[Delta]:
    """The changes of a layer's weight and bias, on the network's device.

    Raises:
        InvalidRequestError: its tensors do not fit each other or the layer.
    """
    tensors = {role: checkpoint.tensor(key).to(network.device) for role, key in keys.items()}
    bias = tensors.pop(BIAS, None)
    layer = Layer(network.weight_shape(targets), lambda: network.weight(targets))
    try:
        changes: list[Delta] = [] if bias is None else [make_offset(bias, layer)]
        if tensors or bias is None:
            changes.append(make_delta(tensors, scale, layer))
    except MisfitError as error:
        raise _refusal(path, f"{_first(sorted(keys.values()))}: {error}. Is it for another model?") from error
    return [change.to(network.dtype) for change in changes]


def _refusal(path: str, sentence: str) -> InvalidRequestError:
    return InvalidRequestError.of("path", f"{path} {sentence}")


def _first(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - _NAMED_KEYS
    return ", ".join(names[:_NAMED_KEYS]) + (f" and {rest} more" if rest > 0 else "")
