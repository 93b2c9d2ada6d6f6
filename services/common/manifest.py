"""The manifest: which models a deployment serves, and where their weights are. Every stage reads the same one.

models:
  - name: majicflus
    path: /weights/majicmix.safetensors   # a file, a list of files, or a folder in the diffusers layout
    encoder: {dtype: float16}              # optional, a stage each: dtype, device, offload, memory_budget, path
                                           # and of a stage of several networks: parts: {t5: {path: …, dtype: …}}
    denoiser: {dtype: float16, parallelism: 2}   # and of the denoiser: GPUs that share it, or parallel: {cfg: 2, …}
    decoder: {path: /weights/vae.safetensors, dtype: float32}
    tokenizer: /weights/tokenizer          # optional: a folder with vocab.json and merges.txt
    latent_preview: /weights/preview.json  # optional: the map that previews are made with
    defaults: {steps: 30, guidance_scale: 6}   # optional: of requests that do not say
    adapters:                              # optional: LoRAs that are loaded at the start
      - {name: ghibli, path: /weights/ghibli.safetensors}
  - name: from-a-hub
    source: {model: owner/name, revision: v1, path: unet.safetensors, hub: huggingface}   # in place of any path
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from safelight.byte_sizes import parse_byte_size
from safelight.hub import HUBS
from services.common.parallel_degrees import ParallelDegrees

DEMO_MODEL_PATH = Path(__file__).resolve().parents[1] / "demo_model"
_STAGES = ("encoder", "denoiser", "decoder")
_NESTED = (*_STAGES, "defaults", "parts", "source", "adapters", "parallel", "parallelism")
PARALLELISM = (1, 2, 4, 8)
_KINDS = {bool: "true or false", int: "a whole number"}
FLOAT8 = "float8_e4m3fn"
DTYPES = ("auto", "float32", "float16", "bfloat16", FLOAT8)
CPU_OFFLOAD, SEQUENTIAL = "cpu_offload", "sequential_cpu_offload"
OFFLOADS = ("none", CPU_OFFLOAD, SEQUENTIAL)

WeightsPath = str | tuple[str, ...]
"""A file or folder, or several files that are one checkpoint, of which the later go before the earlier."""


class ManifestError(Exception):
    """The manifest can't be read; the message names the file and the entry."""


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Files of a model at a hub; fetched by the stages that need them.

    Args:
        model: its name there, "owner/name".
        hub: "modelscope" or "huggingface".
        path: a file's or folder's name, a wildcard, or a list of these; empty: what a stage reads of the repository.
        revision: branch, tag or commit; empty: the hub's default branch.
    """

    model: str
    hub: str = "modelscope"
    path: WeightsPath = ""
    revision: str = ""

    def __str__(self) -> str:
        paths = self.path if isinstance(self.path, str) else ", ".join(self.path)
        return f"{self.model}{f'@{self.revision}' if self.revision else ''} {paths}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network of a model.

    Args:
        path: weights of this network alone; empty: they are in the model's own path.
        source: where to fetch them, in place of a path.
        dtype: of the weights and the computation; auto is float16 on a GPU and float32 on a CPU. float8_e4m3fn is
            bfloat16 with the large matrices stored in float8.
        offload: when the weights leave the GPU; empty: as the stage's setting says.
        memory_budget: most bytes of them on the GPU; None: as the stage's setting says.
        allow_pickle: the files may be torch's own (.pth …), which are pickle.
    """

    path: WeightsPath = ""
    source: HubSource | None = None
    dtype: str = "auto"
    offload: str = ""
    memory_budget: int | None = None
    allow_pickle: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of the weights; none if they are in the model's own path."""
        return _paths(self.path)


@dataclass(frozen=True, kw_only=True)
class Component(Part):
    """One stage's part of a model.

    Args:
        device: where it computes; empty: the stage's device.
        parts: its networks by name, where it has several that differ in path or dtype: "clip_l", "clip_g", "t5" …
        parallelism: of the denoiser, how many devices share it in the family's usual way.
        parallel: of the denoiser, in which ways, in place of `parallelism`.
    """

    device: str = ""
    parts: Mapping[str, Part] = field(default_factory=dict)
    parallelism: int = 1
    parallel: ParallelDegrees | None = None

    def part(self, name: str) -> Part:
        """The network of that name; what is not said of it is the component's."""
        part = self.parts.get(name, Part())
        dtype = self.dtype if part.dtype == "auto" else part.dtype
        files = part if part.path else self
        part = replace(part, path=files.path, allow_pickle=files.allow_pickle, dtype=dtype)
        return offloaded(part, self.offload, self.memory_budget)


SomePart = TypeVar("SomePart", bound=Part)


def offloaded(part: SomePart, offload: str, memory_budget: int | None) -> SomePart:
    """The part with these where it says neither."""
    if part.offload or part.memory_budget is not None:
        return part
    return replace(part, offload=offload, memory_budget=memory_budget)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request gets that does not say. distilled_scale: None for a model that takes none as an input."""

    steps: int
    guidance_scale: float
    distilled_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterEntry:
    """A LoRA: what requests call it, and its file."""

    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model of the manifest.

    Args:
        name: what requests call it.
        path: a single file, several that make one, or a folder in the diffusers layout; empty: every network has a
            path or source of its own, or is fetched as what the family usually has.
        source: where to fetch it, in place of a path.
        family: "sd15" …; empty: told by the keys of the weights.
        tokenizer: folder with the tokenizer's files; empty: the model's own, else the family's usual one.
        latent_preview: file with the map from latents to colours; empty: latent_preview.json in the model's folder.
        defaults: of requests, by the names in `Defaults`; what is missing is the family's own value.
        adapters: LoRAs that are loaded at the start.
        load_text_encoder: False: no text encoder is loaded, and every prompt is zeros; FLUX.1 only.
    """

    name: str
    path: WeightsPath = ""
    source: HubSource | None = None
    family: str = ""
    tokenizer: str = ""
    latent_preview: str = ""
    encoder: Component = Component()
    denoiser: Component = Component()
    decoder: Component = Component()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    adapters: tuple[AdapterEntry, ...] = ()
    load_text_encoder: bool = True

    def defaults_over(self, family: Defaults) -> Defaults:
        """The defaults of requests: the manifest's over the family's.

        Raises:
            ManifestError: the model takes no such thing.
        """
        if untaken := [name for name in self.defaults if getattr(family, name) is None]:
            raise ManifestError(f"model {self.name!r}: defaults.{untaken[0]}: the model takes none; leave it out")
        return replace(family, **self.defaults)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of the weights; a folder in the diffusers layout is the only one."""
        return _paths(self.path)

    def component(self, stage: str) -> Component:
        """The part of "encoder", "denoiser" or "decoder"."""
        component: Component = getattr(self, stage)
        return component

    def with_component(self, stage: str, component: Component) -> ModelEntry:
        """The same with another part of that stage."""
        changed: dict[str, Any] = {stage: component}
        return replace(self, **changed)


def _paths(path: WeightsPath) -> tuple[Path, ...]:
    return tuple(map(Path, [path] if isinstance(path, str) else path)) if path else ()


DEMO_MODEL = ModelEntry(name="demo", path=str(DEMO_MODEL_PATH), defaults={"guidance_scale": 4.0})


def load_manifest(path: str) -> tuple[ModelEntry, ...]:
    """The models of a manifest file; of no file, the demo model.

    Raises:
        ManifestError: the file can't be read, or an entry has unknown, missing or wrong fields.
    """
    if not path:
        return (DEMO_MODEL,)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ManifestError(f"manifest {path}: can't be read: {error}") from error
    entries = content.get("models") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ManifestError(f"manifest {path}: must have a list 'models' with at least one entry")
    models = tuple(_parse_model(entry, f"manifest {path}: models[{index}]") for index, entry in enumerate(entries))
    _refuse_duplicates(path, models)
    return models


def with_offload(models: Iterable[ModelEntry], offload: str, memory_budget: int | None) -> tuple[ModelEntry, ...]:
    """The models with these where a stage's part says neither."""
    return tuple(
        replace(model, **{stage: offloaded(getattr(model, stage), offload, memory_budget) for stage in _STAGES})
        for model in models
    )


def _parse_model(entry: object, where: str) -> ModelEntry:
    values = _checked(ModelEntry, entry, where)
    if not values.get("name"):
        raise ManifestError(f"{where}: 'name' is missing")
    _read_source(values, where)
    if not values.get("path") and not values.get("source") and not values.get("family"):
        raise ManifestError(f"{where}: 'path' is missing; or give a 'source', or a 'family' and its networks' paths")
    for stage in _STAGES:
        if stage in values:
            values[stage] = _parse_component(values[stage], f"{where}.{stage}")
            _refuse_ranks(values[stage], stage, f"{where}.{stage}")
    if "defaults" in values:
        values["defaults"] = _parse_defaults(values["defaults"], f"{where}.defaults")
    if "adapters" in values:
        values["adapters"] = _parse_adapters(values["adapters"], f"{where}.adapters")
    return ModelEntry(**values)


def _parse_defaults(entry: object, where: str) -> dict[str, Any]:
    defaults = _known(Defaults, entry, where)
    for name, value in defaults.items():
        if name == "steps":
            if type(value) is not int or value < 1:
                raise ManifestError(f"{where}.steps: {value!r} must be a whole number, at least 1")
        elif type(value) not in (int, float) or not 0 <= value <= 100:
            raise ManifestError(f"{where}.{name}: {value!r} must be a number from 0 to 100")
    return defaults


def _parse_adapters(entry: object, where: str) -> tuple[AdapterEntry, ...]:
    if not isinstance(entry, list):
        raise ManifestError(f"{where}: must be a list of adapters, each with a name and a path")
    adapters = []
    for index, each in enumerate(entry):
        values = _checked(AdapterEntry, each, f"{where}[{index}]")
        if not all(isinstance(values.get(required), str) and values[required] for required in ("name", "path")):
            raise ManifestError(f"{where}[{index}]: needs a 'name' and a 'path', both texts")
        adapters.append(AdapterEntry(**values))
    if len({adapter.name for adapter in adapters}) < len(adapters):
        raise ManifestError(f"{where}: two adapters have one name")
    return tuple(adapters)


def _parse_component(entry: object, where: str) -> Component:
    values = _checked(Component, entry, where)
    _read_source(values, where)
    if "parts" in values:
        values["parts"] = _parse_parts(values["parts"], f"{where}.parts")
    _read_parallel(values, where)
    component = Component(**values)
    _check_part(component, where)
    return component


def _parse_parts(entry: object, where: str) -> dict[str, Part]:
    if not isinstance(entry, Mapping):
        raise ManifestError(f"{where}: must be a mapping from a network's name to its path and dtype")
    return {str(name): _parse_part(part, f"{where}.{name}") for name, part in entry.items()}


def _parse_part(entry: object, where: str) -> Part:
    values = _checked(Part, entry, where)
    _read_source(values, where)
    part = Part(**values)
    _check_part(part, where)
    return part


def _read_source(values: dict[str, Any], where: str) -> None:
    """Puts a HubSource in place of what stands under `source`, if it does."""
    if "source" not in values:
        return
    source = _checked(HubSource, values["source"], f"{where}.source")
    if values.get("path"):
        raise ManifestError(f"{where}: 'path' and 'source': give one of the two")
    if not source.get("model"):
        raise ManifestError(f"{where}.source: 'model' is missing")
    if source.get("hub", "modelscope") not in HUBS:
        raise ManifestError(f"{where}.source.hub: {source['hub']!r} is not one of {', '.join(HUBS)}")
    values["source"] = HubSource(**source)


def _read_parallel(values: dict[str, Any], where: str) -> None:
    """Checks `parallelism`, and puts ParallelDegrees in place of what stands under `parallel`, if it does."""
    parallelism = values.get("parallelism", 1)
    if type(parallelism) is not int or parallelism not in PARALLELISM:
        raise ManifestError(f"{where}.parallelism: {parallelism!r} is not one of {', '.join(map(str, PARALLELISM))}")
    if "parallel" not in values:
        return
    if "parallelism" in values:
        raise ManifestError(f"{where}: 'parallelism' and 'parallel': give one of the two")
    degrees = _known(ParallelDegrees, values["parallel"], f"{where}.parallel")
    for name, value in degrees.items():
        wanted = bool if name == "fsdp" else int
        if type(value) is not wanted:
            raise ManifestError(f"{where}.parallel.{name}: {value!r} must be {_KINDS[wanted]}")
    try:
        values["parallel"] = ParallelDegrees(**degrees)
    except ValueError as error:
        raise ManifestError(f"{where}.parallel: {error}") from error


def _refuse_ranks(component: Component, stage: str, where: str) -> None:
    if stage != "denoiser" and (component.parallel or component.parallelism > 1):
        raise ManifestError(f"{where}: only the denoiser is shared over several devices; move 'parallel…' there")


def _check_part(part: Part, where: str) -> None:
    if part.dtype not in DTYPES:
        raise ManifestError(f"{where}.dtype: {part.dtype!r} is not one of {', '.join(DTYPES)}")
    if part.offload and (fault := offload_fault(part.offload, part.memory_budget)):
        raise ManifestError(f"{where}.{fault}")


def offload_fault(offload: str, memory_budget: int | None) -> str | None:
    """What is wrong with these two, the field's name first; None: nothing."""
    if offload not in OFFLOADS:
        return f"offload: {offload!r} is not one of {', '.join(OFFLOADS)}"
    if offload == SEQUENTIAL and memory_budget:
        return f"memory_budget: {SEQUENTIAL} keeps nothing on the GPU; leave one of the two out"
    return None


def _checked(cls: type[Any], entry: object, where: str) -> dict[str, Any]:
    """The entry as keyword arguments of a dataclass whose fields are texts but for the nested ones and a few."""
    values = _known(cls, entry, where)
    return {name: value if name in _NESTED else _read(name, value, f"{where}.{name}") for name, value in values.items()}


def _read(name: str, value: object, where: str) -> WeightsPath | int:
    return _READERS[name](value, where) if name in _READERS else _text(name, value, where)


def _size(value: Any, where: str) -> int:
    try:
        return parse_byte_size(value)
    except ValueError as error:
        raise ManifestError(f"{where}: {value!r} is not a size such as 12GiB or 500MB, or a number of bytes") from error


def _switch(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ManifestError(f"{where}: {value!r} must be true or false")
    return value


_READERS: Mapping[str, Callable[[Any, str], int]] = {
    "memory_budget": _size,
    "allow_pickle": _switch,
    "load_text_encoder": _switch,
}


def _known(cls: type[Any], entry: object, where: str) -> dict[str, Any]:
    """The entry as keyword arguments of a dataclass, their values unread."""
    if not isinstance(entry, Mapping):
        raise ManifestError(f"{where}: must be a mapping")
    known = [field.name for field in fields(cls)]
    if unknown := [name for name in entry if name not in known]:
        raise ManifestError(f"{where}: '{unknown[0]}' is not a field; there are {', '.join(known)}")
    return dict(entry)


def _text(name: str, value: object, where: str) -> WeightsPath:
    """The value, if it is a text or, for a path, a list of them."""
    if isinstance(value, str):
        return value
    if name != "path":
        raise ManifestError(f"{where}: {value!r} must be a text; put it in quotes")
    if not isinstance(value, list) or not all(isinstance(path, str) and path for path in value):
        raise ManifestError(f"{where}: {value!r} must be a text, or a list of texts")
    return tuple(value)


def _refuse_duplicates(path: str, models: tuple[ModelEntry, ...]) -> None:
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ManifestError(f"manifest {path}: two models have one name among {', '.join(names)}")
