"""Laws of the manifest: every documented field is read, and every mistake is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.manifest import (
    DEMO_MODEL,
    Component,
    Defaults,
    HubSource,
    ManifestError,
    ModelEntry,
    Part,
    load_manifest,
    with_offload,
)
from services.common.parallel_degrees import ParallelDegrees


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "models.yaml"


def test_without_a_file_there_is_the_demo_model() -> None:
    assert load_manifest("") == (DEMO_MODEL,)


def test_every_field_is_read(file: Path) -> None:
    file.write_text("""
models:
  - name: majicflus
    path: /weights/majicmix.safetensors
    family: sd15
    tokenizer: /weights/tokenizer
    latent_preview: /weights/preview.json
    encoder: {dtype: float16}
    denoiser: {dtype: bfloat16, path: /weights/unet.safetensors}
    decoder: {path: /weights/vae.safetensors, dtype: float32}
    defaults: {steps: 4, guidance_scale: 1}
  - name: plain
    path: /weights/plain
""")
    majicflus = ModelEntry(
        name="majicflus",
        path="/weights/majicmix.safetensors",
        family="sd15",
        tokenizer="/weights/tokenizer",
        latent_preview="/weights/preview.json",
        encoder=Component(dtype="float16"),
        denoiser=Component(dtype="bfloat16", path="/weights/unet.safetensors"),
        decoder=Component(path="/weights/vae.safetensors", dtype="float32"),
        defaults={"steps": 4, "guidance_scale": 1},
    )
    assert load_manifest(str(file)) == (majicflus, ModelEntry(name="plain", path="/weights/plain"))


def test_a_denoiser_may_be_shared_over_several_devices(file: Path) -> None:
    file.write_text("""
models:
  - {name: a, path: b, denoiser: {parallelism: 4}}
  - {name: c, path: d, denoiser: {parallel: {cfg: 2, ulysses: 2, fsdp: true}}}
""")
    usual, chosen = load_manifest(str(file))
    assert (usual.denoiser.parallelism, usual.denoiser.parallel) == (4, None)
    assert chosen.denoiser.parallel == ParallelDegrees(cfg=2, ulysses=2, fsdp=True)


def test_in_place_of_a_path_there_may_be_a_source_or_a_family_whose_networks_are_elsewhere(file: Path) -> None:
    file.write_text("""
models:
  - name: fetched
    source: {model: owner/name, hub: huggingface, revision: v1, path: [a.safetensors, b.safetensors]}
    encoder: {parts: {t5: {source: {model: owner/t5}}}}
  - name: parts
    family: flux
    denoiser: {path: dit.safetensors, device: "cuda:1"}
""")
    fetched, parts = load_manifest(str(file))
    assert fetched.source == HubSource(
        model="owner/name", hub="huggingface", revision="v1", path=("a.safetensors", "b.safetensors")
    )
    assert fetched.encoder.parts == {"t5": Part(source=HubSource(model="owner/t5"))}
    assert (parts.paths, parts.denoiser.device) == ((), "cuda:1")


def test_several_files_may_be_one_checkpoint(file: Path) -> None:
    file.write_text("models: [{name: a, path: [/w/sd15.safetensors, /w/patch.safetensors]}]")
    (entry,) = load_manifest(str(file))
    assert entry.paths == (Path("/w/sd15.safetensors"), Path("/w/patch.safetensors"))
    assert entry.encoder.paths == ()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "must have a list 'models' with at least one entry"),
        ("models:", "must have a list 'models'"),
        ("models: []", "must have a list 'models'"),
        ("models: {name: a}", "must have a list 'models'"),
        ("- name: a", "must have a list 'models'"),
        ("models: [", "can't be read"),
        ("models: [a]", r"models\[0\]: must be a mapping"),
        ("models: [{name: a, path: b}, {path: b}]", r"models\[1\]: 'name' is missing"),
        ("models: [{name: a}]", r"models\[0\]: 'path' is missing"),
        ("models: [{}]", r"models\[0\]: 'name' is missing"),
        ("models: [{name: '', path: b}]", r"models\[0\]: 'name' is missing"),
        ("models: [{name: a, path: b, dtype: float16}]", r"models\[0\]: 'dtype' is not a field; there are name, path"),
        ("models: [{name: 15, path: b}]", r"models\[0\]\.name: 15 must be a text"),
        ("models: [{name: a, path: []}]", r"models\[0\]: 'path' is missing"),
        ("models: [{name: a, path: [b, 2]}]", r"models\[0\]\.path: \['b', 2\] must be a text, or a list of texts"),
        ("models: [{name: [a], path: b}]", r"models\[0\]\.name: \['a'\] must be a text"),
        ("models: [{name: a, path: }]", r"models\[0\]\.path: None must be a text"),
        ("models: [{name: a, path: b, encoder: float16}]", r"models\[0\]\.encoder: must be a mapping"),
        ("models: [{name: a, path: b, encoder: {size: 1}}]", r"models\[0\]\.encoder: 'size' is not a field"),
        ("models: [{name: a, path: b, encoder: {dtype: 16}}]", r"models\[0\]\.encoder\.dtype: 16 must be a text"),
        ("models: [{name: a, path: b, decoder: {dtype: fp16}}]", r"decoder\.dtype: 'fp16' is not one of auto, float32"),
        ("models: [{name: a, path: b, encoder: {offload: gpu}}]", r"encoder\.offload: 'gpu' is not one of none, cpu_"),
        (
            "models: [{name: a, path: b, encoder: {memory_budget: much}}]",
            r"memory_budget: 'much' is not a size",
        ),
        (
            "models: [{name: a, path: b, encoder: {offload: sequential_cpu_offload, memory_budget: 1GiB}}]",
            r"encoder\.memory_budget: sequential_cpu_offload keeps nothing on the GPU",
        ),
        ("models: [{name: a, path: b, decoder: {allow_pickle: 'yes'}}]", r"allow_pickle: 'yes' must be true or false"),
        (
            "models: [{name: a, path: b, denoiser: {parallelism: 3}}]",
            r"denoiser\.parallelism: 3 is not one of 1, 2, 4, 8",
        ),
        ("models: [{name: a, path: b, denoiser: {parallel: 2}}]", r"denoiser\.parallel: must be a mapping"),
        (
            "models: [{name: a, path: b, denoiser: {parallel: {dp: 2}}}]",
            r"parallel: 'dp' is not a field; there are cfg",
        ),
        (
            "models: [{name: a, path: b, denoiser: {parallel: {cfg: two}}}]",
            r"parallel\.cfg: 'two' must be a whole number",
        ),
        ("models: [{name: a, path: b, denoiser: {parallel: {fsdp: 2}}}]", r"parallel\.fsdp: 2 must be true or false"),
        ("models: [{name: a, path: b, denoiser: {parallel: {cfg: 0}}}]", r"parallel: parallel degree 'cfg' is 0"),
        (
            "models: [{name: a, path: b, denoiser: {parallelism: 2, parallel: {cfg: 2}}}]",
            r"denoiser: 'parallelism' and 'parallel': give one of the two",
        ),
        ("models: [{name: a, path: b, decoder: {parallelism: 2}}]", r"decoder: only the denoiser is shared"),
        ("models: [{name: a, path: b, defaults: 4}]", r"models\[0\]\.defaults: must be a mapping"),
        ("models: [{name: a, path: b, defaults: {stepps: 4}}]", r"defaults: 'stepps' is not a field"),
        ("models: [{name: a, path: b, defaults: {steps: 0}}]", r"defaults\.steps: 0 must be a whole number"),
        ("models: [{name: a, path: b, defaults: {steps: 4.5}}]", r"defaults\.steps: 4.5 must be a whole number"),
        ("models: [{name: a, path: b, defaults: {distilled_scale: -1}}]", r"distilled_scale: -1 must be a number"),
        ("models: [{name: a, path: b, defaults: {guidance_scale: x}}]", r"guidance_scale: 'x' must be a number"),
        ("models: [{name: a, source: b}]", r"models\[0\]\.source: must be a mapping"),
        ("models: [{name: a, source: {}}]", r"models\[0\]\.source: 'model' is missing"),
        ("models: [{name: a, path: b, source: {model: o/m}}]", r"models\[0\]: 'path' and 'source': give one"),
        ("models: [{name: a, source: {model: o/m, hub: x}}]", r"source\.hub: 'x' is not one of modelscope, hugging"),
        ("models: [{name: a, source: {model: o/m, file: x}}]", r"\.source: 'file' is not a field; there are model"),
        ("models: [{name: a, path: b, decoder: {source: {}}}]", r"decoder\.source: 'model' is missing"),
        ("models: [{name: a, path: b, encoder: {parts: {t5: {source: {}}}}}]", r"parts\.t5\.source: 'model' is miss"),
        ("models: [{name: a, path: b, encoder: {parts: {t5: {device: cpu}}}}]", r"t5: 'device' is not a field"),
        ("models: [{name: a, path: b}, {name: a, path: c}]", "two models have one name among a, a"),
    ],
)
def test_a_mistake_is_named_with_its_place(file: Path, content: str, sentence: str) -> None:
    file.write_text(content)
    with pytest.raises(ManifestError, match=rf"^manifest {file}: .*{sentence}"):
        load_manifest(str(file))


def test_a_file_that_is_not_there_or_is_no_text_is_named(file: Path) -> None:
    with pytest.raises(ManifestError, match=f"^manifest {file}: can't be read"):
        load_manifest(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match=f"^manifest {file}: can't be read"):
        load_manifest(str(file))


def test_defaults_go_over_the_family_s() -> None:
    family = Defaults(steps=30, guidance_scale=1.0, distilled_scale=3.5)
    entry = ModelEntry(name="a", path="b", defaults={"steps": 4, "distilled_scale": 2.0})
    assert entry.defaults_over(family) == Defaults(steps=4, guidance_scale=1.0, distilled_scale=2.0)


def test_a_default_that_the_model_takes_not_is_refused() -> None:
    entry = ModelEntry(name="a", path="b", defaults={"distilled_scale": 2.0})
    with pytest.raises(ManifestError, match=r"model 'a': defaults\.distilled_scale: the model takes none"):
        entry.defaults_over(Defaults(steps=20, guidance_scale=7.5))


def test_a_network_is_offloaded_as_it_says_else_as_its_stage_s_part_says_else_as_the_setting_says(file: Path) -> None:
    file.write_text("models: [{name: a, path: b, encoder: {offload: cpu_offload, parts: {t5: {memory_budget: 6GiB}}}}]")
    (entry,) = with_offload(load_manifest(str(file)), "sequential_cpu_offload", None)
    parts = entry.encoder.part("t5"), entry.encoder.part("clip_l"), entry.denoiser
    assert [(part.offload, part.memory_budget) for part in parts] == [
        ("", 6 * 2**30),
        ("cpu_offload", None),
        ("sequential_cpu_offload", None),
    ]


def test_pickle_is_allowed_for_the_files_that_it_stands_beside(file: Path) -> None:
    file.write_text("models: [{name: a, path: b, encoder: {path: c, allow_pickle: true, parts: {t5: {path: d}}}}]")
    (entry,) = load_manifest(str(file))
    assert [entry.encoder.part(name).allow_pickle for name in ("clip_l", "t5")] == [True, False]
