"""Laws of checkpoints: what opens, what is refused and in which words, and how tensors get into a module."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from services.modeling.weights import Checkpoint, CheckpointError, Piece, load_weights, open_checkpoint

CPU = torch.device("cpu")


class Pair(nn.Module):
    """A module whose first layer is made of two checkpoint tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(4, 6, bias=False)
        self.plain = nn.Linear(6, 2)


SOURCES = {
    "fused.weight": ("net.q.weight", "net.k.weight"),
    "plain.weight": ("net.out.weight",),
    "plain.bias": ("net.out.bias",),
}


def tensors() -> dict[str, Tensor]:
    return {
        "net.q.weight": torch.randn(2, 4),
        "net.k.weight": torch.randn(4, 4),
        "net.out.weight": torch.randn(2, 6, 1, 1),
        "net.out.bias": torch.randn(2),
    }


def saved(path: Path, content: Mapping[str, Tensor]) -> Path:
    save_file(dict(content), path)
    return path


def meta_pair() -> Pair:
    with torch.device("meta"):
        return Pair()


def load(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, ignored: tuple[str, ...] = ()) -> Pair:
    module = meta_pair()
    load_weights(module, checkpoint, SOURCES, device=CPU, dtype=dtype, prefix="net.", ignored=ignored)
    return module


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "model.safetensors", tensors())


def test_a_file_is_a_mapping_of_its_tensors(tmp_path: Path) -> None:
    content = tensors()
    checkpoint = open_checkpoint(saved(tmp_path / "model.safetensors", content))
    assert checkpoint.keys() == content.keys()
    assert checkpoint.files == (tmp_path / "model.safetensors",)
    assert all(checkpoint.shape(name) == tuple(tensor.shape) for name, tensor in content.items())
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in content.items())


def test_of_files_in_a_list_later_names_win(tmp_path: Path, file: Path) -> None:
    patch = saved(tmp_path / "patch.safetensors", {"net.out.bias": torch.ones(2)})
    checkpoint = open_checkpoint([file, patch])
    assert torch.equal(checkpoint.tensor("net.out.bias"), torch.ones(2))
    assert len(checkpoint) == len(SOURCES) + 1


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.fp16.safetensors", "model.safetensors", "anything.safetensors"]
)
def test_a_folder_stands_for_its_checkpoint(tmp_path: Path, name: str) -> None:
    saved(tmp_path / name, tensors())
    assert open_checkpoint(tmp_path).files == (tmp_path / name,)


def test_a_folder_with_both_precisions_opens_the_full_one(tmp_path: Path) -> None:
    saved(tmp_path / "diffusion_pytorch_model.fp16.safetensors", tensors())
    full = saved(tmp_path / "diffusion_pytorch_model.safetensors", tensors())
    assert open_checkpoint(tmp_path).files == (full,)


def sharded(folder: Path, content: Mapping[str, Tensor]) -> Path:
    weight_map = {name: f"model-{n:05}-of-00004.safetensors" for n, name in enumerate(content, 1)}
    for name, shard in weight_map.items():
        saved(folder / shard, {name: content[name]})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("by_folder", [False, True])
def test_shards_open_as_one_checkpoint(tmp_path: Path, by_folder: bool) -> None:
    content = tensors()
    index = sharded(tmp_path, content)
    assert open_checkpoint(tmp_path if by_folder else index).keys() == content.keys()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path, tensors())
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json lists model-00002-of-00004\.safetensors.*download"):
        open_checkpoint(index)


def test_an_index_without_a_weight_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no index of a sharded checkpoint"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match=r"pickle.*save_file"):
        open_checkpoint(tmp_path / f"model{suffix}")


def test_unknown_suffixes_absent_files_and_ambiguous_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.onnx has an unknown suffix"):
        open_checkpoint(tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match=r"absent\.safetensors does not exist"):
        open_checkpoint(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 0 \.safetensors files"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file_is_refused_by_name(file: Path, damage: str) -> None:
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-5], "garbage": b"\xff" * 100, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        open_checkpoint(file)


def test_the_fingerprint_depends_on_content_not_on_the_path(tmp_path: Path) -> None:
    content = tensors()
    first, second = (open_checkpoint(saved(tmp_path / f"{n}.safetensors", content)) for n in "ab")
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 32


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_the_fingerprint_sees_every_kind_of_change(tmp_path: Path, change: str) -> None:
    content = {"weight": torch.zeros(100, 100)}
    changed = content["weight"].clone()
    changed[-1, -1] = 1
    variants = {
        "value": {"weight": changed},
        "name": {"weights": content["weight"]},
        "dtype": {"weight": content["weight"].to(torch.int32)},
        "shape": {"weight": content["weight"].reshape(50, 200)},
    }
    before = open_checkpoint(saved(tmp_path / "before.safetensors", content))
    after = open_checkpoint(saved(tmp_path / "after.safetensors", variants[change]))
    assert before.fingerprint != after.fingerprint


def test_loading_joins_parts_and_folds_trailing_ones(tmp_path: Path) -> None:
    content = tensors()
    module = load(open_checkpoint(saved(tmp_path / "model.safetensors", content)))
    assert torch.equal(module.fused.weight, torch.cat([content["net.q.weight"], content["net.k.weight"]]))
    assert torch.equal(module.plain.weight, content["net.out.weight"][:, :, 0, 0])
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_pieces_of_tensors_are_split_turned_and_joined(tmp_path: Path) -> None:
    whole, turned = torch.randn(6, 4), torch.randn(6, 2)
    file = saved(tmp_path / "model.safetensors", {"qk": whole, "proj": turned, "bias": torch.randn(4)})
    sources = {
        "fused.weight": (Piece("qk", index=1, parts=2), Piece("qk", index=0, parts=2)),
        "plain.weight": (Piece("proj", transposed=True),),
        "plain.bias": (Piece("bias", index=1, parts=2),),
    }
    pair = meta_pair()
    load_weights(pair, open_checkpoint(file), sources, device=CPU, dtype=torch.float32)
    assert torch.equal(pair.fused.weight, torch.cat([whole[3:], whole[:3]]))
    assert torch.equal(pair.plain.weight, turned.T)


@pytest.mark.parametrize("shape", [(), (3,), (4, 4), (5, 4)])
def test_a_piece_of_a_tensor_of_another_shape_is_told(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = saved(tmp_path / "model.safetensors", {**tensors(), "qk": torch.zeros(shape)})
    sources = SOURCES | {"fused.weight": (Piece("qk", index=1, parts=2),)}
    with pytest.raises(CheckpointError, match=r"1 mis-shaped: qk \(\[\[.*\]\] instead of \[6, 4\]\)"):
        load_weights(meta_pair(), open_checkpoint(file), sources, device=CPU, dtype=torch.float32)


def test_loading_casts_to_the_dtype_asked_for(file: Path) -> None:
    module = load(open_checkpoint(file), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_a_tensor_in_the_right_dtype_stays_the_mapped_file(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    assert load(checkpoint).plain.weight.data_ptr() == checkpoint.tensor("net.out.weight").data_ptr()


def test_every_fault_is_told_in_one_error(tmp_path: Path) -> None:
    content = tensors() | {"net.extra": torch.zeros(1), "net.out.weight": torch.zeros(3, 6)}
    del content["net.q.weight"]
    checkpoint = open_checkpoint(saved(tmp_path / "odd.safetensors", content))
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert str(caught.value) == (
        f"{tmp_path / 'odd.safetensors'} does not fit Pair: 1 missing: net.q.weight; 1 unexpected: net.extra; "
        "1 mis-shaped: net.out.weight ([[3, 6]] instead of [2, 6])"
    )


def test_long_lists_of_faults_are_cut_and_counted(tmp_path: Path) -> None:
    content = tensors() | {f"net.extra{n}": torch.zeros(1) for n in range(9)}
    with pytest.raises(CheckpointError, match=r"9 unexpected: net\.extra0, net\.extra1, net\.extra2 and 6 more"):
        load(open_checkpoint(saved(tmp_path / "model.safetensors", content)))


def test_names_of_other_components_and_ignored_ones_are_left_alone(tmp_path: Path) -> None:
    content = tensors() | {"vae.weight": torch.zeros(1), "net.position_ids": torch.zeros(1)}
    load(open_checkpoint(saved(tmp_path / "model.safetensors", content)), ignored=("net.position_ids",))


def test_sources_must_cover_the_module(file: Path) -> None:
    with pytest.raises(ValueError, match=r"plain\.bias"):
        load_weights(
            meta_pair(),
            open_checkpoint(file),
            {name: SOURCES[name] for name in ("fused.weight", "plain.weight")},
            device=CPU,
            dtype=torch.float32,
        )
