"""Checkpoints and how their tensors get into a module; knows no model.

A checkpoint is one or several safetensors or GGUF files, mapped into memory: opening it reads the headers only, and a
tensor's pages are read when it is placed. A module is built under `torch.device("meta")` and receives its tensors one
at a time, on their device and in their dtype, so that RAM never holds the weights twice. Pickle files are read only
where the operator allows it.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from safelight.errors import CheckpointError as CheckpointError
from services.common.weight_files import FOLDER_FILES
from services.modeling.gguf_file import GgufFile
from services.modeling.mapped_memory import release_mapped
from services.modeling.parallel.shards import WHOLE, Shard, Shares
from services.modeling.pickle_file import PICKLE_SUFFIXES, PickleFile
from services.modeling.scaled_file import ScaledFile
from services.modeling.tensor_file import Shape, TensorFile

_SAMPLE_BYTES = 4096
_NAMED_KEYS = 3


@dataclass(frozen=True)
class Piece:
    """A part of a checkpoint's tensor, where the layout has one tensor and the module several.

    Args:
        name: of the tensor.
        index: of the part.
        parts: equal ones along dimension 0.
        transposed: the matrix of it is meant.
        squeezed: its axes of length 1 are left out.
    """

    name: str
    index: int = 0
    parts: int = 1
    transposed: bool = False
    squeezed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The part: a view of the whole tensor, but a copy if it is transposed."""
        whole = tensor.squeeze() if self.squeezed else tensor
        vector_or_more = whole if whole.ndim else whole.reshape(1)
        part = vector_or_more.tensor_split(self.parts)[self.index]
        return part.movedim(0, -1).contiguous() if self.transposed else part


Source = str | Piece
"""What a module's tensor is made of: a tensor of the checkpoint by its name, or a piece of one."""


class SafetensorsFile:
    """A safetensors file, mapped into memory.

    Raises CheckpointError if it is damaged.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._handle: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a whole safetensors file ({error}); it may be cut short or of another format: "
                "download it again"
            ) from error

    def keys(self) -> Collection[str]:
        names: Collection[str] = self._handle.keys()
        return names

    def metadata(self) -> Mapping[str, str]:
        return self._handle.metadata() or {}

    def shape(self, name: str) -> Shape:
        return tuple(self._handle.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file, not a copy."""
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def stored(self, name: str) -> tuple[str, Tensor]:
        tensor = self.tensor(name)
        return str(tensor.dtype), tensor.reshape(-1).view(torch.uint8)


_TENSOR_FILES: dict[str, Callable[[Path], TensorFile]] = {
    ".safetensors": SafetensorsFile,
    ".gguf": GgufFile,
    **dict.fromkeys(PICKLE_SUFFIXES, PickleFile),
}


class Checkpoint:
    """A read-only mapping from tensor names to memory-mapped tensors; of files that share a name the last one wins."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._owner: dict[str, TensorFile] = {}
        self.metadata: dict[str, str] = {}
        """What the files' headers say in words."""
        for file in self.files:
            opened = ScaledFile(_TENSOR_FILES[file.suffix](file))
            self._owner.update(dict.fromkeys(opened.keys(), opened))
            self.metadata.update(opened.metadata())

    def __contains__(self, name: object) -> bool:
        return name in self._owner

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)

    def __str__(self) -> str:
        return ", ".join(str(file) for file in self.files)

    def keys(self) -> KeysView[str]:
        """The names of the tensors."""
        return self._owner.keys()

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, from the header alone."""
        return self._owner[name].shape(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU: a view of the mapped file in its dtype, not a copy; of a quantized one, float32."""
        return self._owner[name].tensor(name)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits: BLAKE2b over each tensor's name, dtype, shape and the first and last 2 KiB of its bytes.

        It tells checkpoints apart without reading them whole; it is no proof against a forger.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._owner):
            stored_type, data = self._owner[name].stored(name)
            digest.update(f"{name}\0{stored_type}\0{self.shape(name)}\0".encode())
            digest.update(_sample(data))
        return digest.hexdigest()


def open_checkpoint(path: Path | Sequence[Path], *, allow_pickle: bool = False) -> Checkpoint:
    """Opens a safetensors or GGUF file, several merged in order, a sharded checkpoint's index, or a folder with one.

    With `allow_pickle`, which is the operator's word, files that torch saved may be among them.

    Raises CheckpointError when there is no such file, when it is of another format, or when it is damaged.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    files = [file for entry in paths for file in _resolve(entry)]
    for file in files:
        _check_format(file, allow_pickle)
    return Checkpoint(files)


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, tuple[Source, ...]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    prefix: str = "",
    ignored: Collection[str] = (),
    float8: bool = False,
    shares: Shares = WHOLE,
) -> None:
    """Fills `module`, built on the meta device, with tensors of `checkpoint` on `device` in `dtype`.

    `sources` says of which checkpoint tensors, or pieces of them, each of the module's own is made; several are joined
    on dimension 0 (fused q, k, v). Trailing dimensions of size 1 are folded, so a 1x1 convolution's weight fits a
    linear layer. A tensor that is on `device` in `dtype` already stays the mapped file; with `float8`, so does a
    layer's matrix that the file has in float8_e4m3fn (`place` makes a layer of it that can compute). Names under
    `prefix` belong to this module: one that is neither used nor `ignored` on purpose is an error. Of a parameter that
    the module has a shard of, as `shares` say, only that shard's bytes are read, if the file has them as numbers.

    Raises CheckpointError with the first missing, unexpected and mis-shaped names and the counts of all.
    """
    targets = module.state_dict()
    if targets.keys() != sources.keys():
        raise ValueError(f"sources and module differ in {sorted(targets.keys() ^ sources.keys())[:_NAMED_KEYS]}")
    shapes = {name: _whole_shape(target, shares.shards.get(name)) for name, target in targets.items()}
    _check_fit(shapes, checkpoint, sources, prefix, ignored, type(module).__name__)
    matrices = _matrices(module) if float8 else set()
    state = {}
    for name, target in targets.items():
        parts = _read(checkpoint, sources[name])
        keeps = name in matrices and all(part.dtype == torch.float8_e4m3fn for part in parts)
        kept = parts[0].dtype if keeps else dtype
        if shard := shares.shards.get(name):
            state[name] = _join(_sharded(parts, shard, shapes[name]), target.shape, device, kept)
        else:
            state[name] = _assemble(parts, target.shape, device, kept)
        for part in parts:
            if part.data_ptr() != state[name].data_ptr():
                release_mapped(part)
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)


@dataclass(frozen=True)
class WholeWeights:
    """A network's tensors as its checkpoint has them, for a rank that has shards of them.

    Args:
        checkpoint: that the network was loaded from.
        sources: as `load_weights` had them.
    """

    checkpoint: Checkpoint
    sources: Mapping[str, tuple[Source, ...]]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of a name on the CPU, in the dtype that it was loaded in."""
        return torch.cat([part.to(dtype) for part in _read(self.checkpoint, self.sources[name])])


def _resolve(path: Path) -> list[Path]:
    """The files that `path` stands for."""
    if path.is_dir():
        return _resolve(_file_in_folder(path))
    if path.suffix == ".json":
        _check_exists(path)
        return _shards(path)
    return [path]


def _check_format(file: Path, allow_pickle: bool) -> None:
    if file.suffix in PICKLE_SUFFIXES and not allow_pickle:
        raise CheckpointError(
            f"{file} is a pickle file, which can run code while it loads, so it is not read; convert it once: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors'), or allow it in the "
            "manifest for the network that is in it: {path: …, allow_pickle: true}"
        )
    if file.suffix not in _TENSOR_FILES:
        raise CheckpointError(
            f"{file} has an unknown suffix; give a .safetensors or .gguf file, an index .json or a folder"
        )
    _check_exists(file)


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; check the path or download the file first")


def _file_in_folder(folder: Path) -> Path:
    """The checkpoint of a component's folder: a file with one of the usual names, or the only safetensors file."""
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} .safetensors files and none named {FOLDER_FILES[0]} or the like; "
            "name the file or the list of files"
        )
    return found[0]


def _shards(index: Path) -> list[Path]:
    """The files that a `*.safetensors.index.json` lists, all of them present."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of a sharded checkpoint (no weight_map: {error!r})") from error
    files = [index.parent / name for name in names]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{index} lists {_first(absent)}, which is not beside it; download the missing shards")
    return files


def _sample(data: Tensor) -> bytes:
    """The first and last 2 KiB of a tensor's bytes, or all of them if they are no more."""
    count = _SAMPLE_BYTES // 2
    return torch.cat([data[:count], data[max(count, data.numel() - count) :]]).numpy().tobytes()


def _check_fit(
    shapes: Mapping[str, Shape],
    checkpoint: Checkpoint,
    sources: Mapping[str, tuple[Source, ...]],
    prefix: str,
    ignored: Collection[str],
    module_name: str,
) -> None:
    """Raises one CheckpointError for every name that is missing, unexpected or mis-shaped."""
    used = set(map(_name, chain.from_iterable(sources.values())))
    missing = sorted(used - checkpoint.keys())
    unexpected = sorted(
        name for name in checkpoint if name.startswith(prefix) and name not in used and name not in ignored
    )
    misshaped = [
        f"{' + '.join(map(_name, parts))} ({[list(_shape(checkpoint, part)) for part in parts]} "
        f"instead of {list(shapes[own])})"
        for own, parts in sources.items()
        if checkpoint.keys() >= set(map(_name, parts))
        and not _fits([_shape(checkpoint, part) for part in parts], shapes[own])
    ]
    faults = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    report = "; ".join(f"{len(names)} {fault}: {_first(names)}" for fault, names in faults.items() if names)
    if report:
        raise CheckpointError(f"{checkpoint} does not fit {module_name}: {report}")


def _name(source: Source) -> str:
    return source if isinstance(source, str) else source.name


def _shape(checkpoint: Checkpoint, source: Source) -> Shape:
    """The shape of a source, without its bytes."""
    shape = checkpoint.shape(_name(source))
    return shape if isinstance(source, str) else tuple(source.of(torch.empty(shape, device="meta")).shape)


def _read(checkpoint: Checkpoint, sources: Sequence[Source]) -> list[Tensor]:
    """The sources, as views of the mapped file; what several are pieces of is dequantized once."""
    whole = {name: checkpoint.tensor(name) for name in map(_name, sources)}
    return [whole[source] if isinstance(source, str) else source.of(whole[source.name]) for source in sources]


def _whole_shape(target: Tensor, shard: Shard | None) -> Shape:
    """The shape of a parameter of which the module may have a shard."""
    return tuple(target.shape) if shard is None else shard.whole(target.shape)


def _sharded(parts: Sequence[Tensor], shard: Shard, shape: Shape) -> list[Tensor]:
    """A shard of what the parts make, which is of that shape."""
    return shard.of([part.reshape(-1, *shape[1:]) for part in parts])


def _fits(shapes: Sequence[Shape], target: Shape) -> bool:
    """Whether tensors of these shapes, joined on dimension 0, are the target up to trailing dimensions of size 1."""
    tails = {_folded(shape[1:]) for shape in shapes}
    rows = sum(shape[0] if shape else 1 for shape in shapes)
    return tails == {_folded(target[1:])} and rows == (target[0] if target else 1)


def _folded(shape: Shape) -> Shape:
    """The shape without its trailing ones."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _assemble(parts: Sequence[Tensor], shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor that `parts` make, on the device in the dtype (integers keep theirs); one part isn't copied on it."""
    if len(parts) > 1:
        return _join(parts, shape, device, dtype)
    dtype = dtype if parts[0].is_floating_point() else parts[0].dtype
    return parts[0].reshape(shape).to(device=device, dtype=dtype)


def _join(parts: Sequence[Tensor], shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same, always in memory of its own."""
    dtype = dtype if parts[0].is_floating_point() else parts[0].dtype
    whole = torch.empty(shape, device=device, dtype=dtype)
    for piece, part in zip(torch.split(whole, [len(part) for part in parts]), parts, strict=True):
        piece.copy_(part.reshape(piece.shape))
    return whole


def _matrices(module: nn.Module) -> set[str]:
    """The names of the weights of linear maps and convolutions."""
    layers = (name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return {f"{name}.weight" for name in layers}


def _first(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - _NAMED_KEYS
    return ", ".join(names[:_NAMED_KEYS]) + (f" and {rest} more" if rest > 0 else "")
