"""`safelight replay`: the same bytes from a receipt, in the exact class whatever else the gateway computes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safelight import Client, GeneratedImage, GenerationResult, Receipt
from safelight.cli import run

SMALL = ["--steps", "2", "--width", "64", "--height", "72"]


@pytest.fixture(scope="module")
def image(endpoint: str) -> GeneratedImage:
    """A picture of the exact class."""
    with Client(endpoint) as client:
        result = client.generate("a cat", steps=2, width=64, height=72, seed=7, determinism="exact")
    return result.images[0]


def write_receipt(folder: Path, image: GeneratedImage, **changes: Any) -> str:
    """The path of a picture's receipt, some of its fields changed."""
    path = folder / "receipt.json"
    path.write_text(json.dumps({**json.loads(image.receipt.to_json()), **changes}))
    return str(path)


def replayed(client: Client, receipt: Receipt) -> GeneratedImage:
    """The receipt's picture once more, with the SDK alone."""
    *_, last = client.stream(receipt.options())
    assert isinstance(last, GenerationResult)
    return last.images[0]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "safetensors"])
def test_a_receipt_gives_the_same_file_in_every_format(
    suffix: str, endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, receipt = (tmp_path / name for name in (f"cat.{suffix}", f"again.{suffix}", "receipt.json"))
    options = [*SMALL, "--determinism", "exact", "--endpoint", endpoint, "--receipt", str(receipt)]
    options += ["--sampler", "euler_ancestral", "--sampler-parameter", "eta=0.7", "--schedule", "karras"]
    options += ["--schedule-parameter", "rho=6", "--guidance-scale", "4.3", "--negative-prompt", "a dog"]
    assert run(["generate", "a „cat“ 🐈", "-o", str(first), *options]) == 0
    assert run(["replay", str(receipt), "-o", str(second), "--endpoint", endpoint]) == 0
    assert "\nidentical: " in capsys.readouterr().out
    assert second.read_bytes() == first.read_bytes()
    assert Receipt.from_json(receipt.read_text()).is_of(first.read_bytes())


def test_a_picture_of_a_picture_takes_its_files_again(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, mask, receipt = (tmp_path / name for name in ("photo.jpg", "mask.png", "cat.json"))
    Image.linear_gradient("L").convert("RGB").resize((100, 70)).save(photo)
    Image.new("1", (2, 2), 1).save(mask)
    options = ["--image", str(photo), "--mask", str(mask), "--strength", "0.7", "--steps", "3"]
    options += ["--determinism", "exact", "--endpoint", endpoint, "--receipt", str(receipt)]
    assert run(["generate", "a cat", "-o", str(tmp_path / "cat.png"), *options]) == 0
    known = Receipt.from_json(receipt.read_text())
    assert (known.width, known.height, known.strength, known.steps_run) == (96, 72, 0.7, 3)
    again = ["replay", str(receipt), "--endpoint", endpoint]
    assert run([*again, "--image", str(photo), "--mask", str(mask)]) == 0
    assert "\nidentical: " in capsys.readouterr().out
    wanted = known.inputs["image"]
    for files, said in [
        ([], f"--image: give the file that the picture started from, SHA-256 {wanted}"),
        (["--image", str(mask)], f"; give the file that the picture started from, {wanted}"),
        (["--image", str(tmp_path / "nowhere")], "nowhere can't be read: No such file"),
    ]:
        assert run([*again, "--mask", str(mask), *files]) == 2
        assert said in capsys.readouterr().err


def test_a_receipt_without_a_picture_takes_none(
    endpoint: str, image: GeneratedImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.new("L", (64, 64)).save(photo)
    assert run(["replay", write_receipt(tmp_path, image), "--image", str(photo), "--endpoint", endpoint]) == 2
    assert "--image: the picture started from none; leave it out" in capsys.readouterr().err


def test_several_pictures_have_a_receipt_each(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--num-images", "2", "--seed", "7", "--endpoint", endpoint]
    options += ["-o", str(tmp_path / "cat.png"), "--receipt", str(tmp_path / "cat.json")]
    assert run(["generate", "a cat", *options]) == 0
    for index in range(2):
        receipt = Receipt.from_json((tmp_path / f"cat-{index}.json").read_text())
        assert receipt.seed == 7 + index
        assert receipt.is_of((tmp_path / f"cat-{index}.png").read_bytes())


def test_a_receipt_says_what_the_picture_cost(image: GeneratedImage) -> None:
    receipt = image.receipt
    assert (receipt.steps, receipt.steps_run, receipt.steps_recomputed, receipt.steps_saved) == (2, 2, 0, 0)
    assert [stage.stage for stage in receipt.stages] == ["encoder", "denoiser", "decoder"]
    assert [stage.steps for stage in receipt.stages] == [0, 2, 0]
    assert set(receipt.fingerprints) == {"encoder", "denoiser", "decoder"}
    assert (receipt.determinism, receipt.format, receipt.quality) == ("exact", "png", None)


def test_a_replay_is_a_receipt_s_picture_from_the_sdk_too(endpoint: str, image: GeneratedImage) -> None:
    with Client(endpoint) as client:
        assert image.receipt.is_of(replayed(client, image.receipt).data)


def test_company_does_not_change_the_bytes_of_the_exact_class(endpoint: str, image: GeneratedImage) -> None:
    with Client(endpoint) as client, ThreadPoolExecutor(5) as threads:
        for seed in range(4):
            threads.submit(client.generate, "a dog", steps=6, width=64, height=72, seed=seed)
        again = replayed(client, image.receipt)
    assert again.receipt.file_sha256 == image.receipt.file_sha256


def test_another_stack_with_the_same_weights_gives_the_same_bytes(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (renamed := tmp_path / "renamed").symlink_to(tiny_sd15)
    picture, receipt = str(tmp_path / "cat.webp"), str(tmp_path / "receipt.json")
    options = ["--model", str(tiny_sd15), "--device", "cpu", "--determinism", "exact", "--receipt", receipt]
    assert run(["generate", "a cat", "-o", picture, *SMALL, *options]) == 0
    assert run(["replay", receipt, "--model", str(renamed), "--device", "cpu"]) == 0
    assert "\nidentical: " in capsys.readouterr().out


def test_other_bytes_are_a_failure_in_the_exact_class(
    endpoint: str, image: GeneratedImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_receipt(tmp_path, image, file_sha256="00", seed=8)
    assert run(["replay", other, "--endpoint", endpoint]) == 1
    out = capsys.readouterr().out
    assert out.startswith("different (the exact class promises the same): ")
    assert "SHA-256 00" in out


def test_other_bytes_are_told_in_the_default_class(
    endpoint: str, image: GeneratedImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_receipt(tmp_path, image, file_sha256="00", determinism="default")
    assert run(["replay", other, "--endpoint", endpoint]) == 0
    assert capsys.readouterr().out.startswith("different (as the default class allows): ")


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        (
            {"fingerprints": {"encoder": "0", "decoder": "0"}},
            1,
            "the decoder and the encoder of model 'tiny' have other",
        ),
        ({"model": "sdxl"}, 2, "the receipt's model is 'sdxl', and the gateway serves tiny"),
        ({"safelight_receipt": 9}, 2, "safelight_receipt: is 9; this release reads 1"),
        ({"seed": None}, 2, "receipt.seed: is None; must be of type int"),
        ({"sampler": "magic"}, 2, "sampling.sampler: is 'magic'; choose from"),
    ],
)
def test_what_can_not_be_replayed_is_told(
    changes: dict[str, Any],
    code: int,
    sentence: str,
    endpoint: str,
    image: GeneratedImage,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["replay", write_receipt(tmp_path, image, **changes), "--endpoint", endpoint]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert sentence in err


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        ("nowhere.json", 1, "No such file"),
        ("picture.png", 2, "picture.png is no text"),
        ("a.json", 2, "receipt: is no"),
    ],
)
def test_a_file_that_is_no_receipt_is_told(
    name: str, code: int, sentence: str, image: GeneratedImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "picture.png").write_bytes(image.data)
    (tmp_path / "a.json").write_text("{")
    assert run(["replay", str(tmp_path / name), "--endpoint", "127.0.0.1:1"]) == code
    assert sentence in capsys.readouterr().err


def test_a_replay_is_written_in_the_receipt_s_format_only(
    image: GeneratedImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = write_receipt(tmp_path, image)
    assert run(["replay", receipt, "-o", str(tmp_path / "cat.jpg"), "--endpoint", "127.0.0.1:1"]) == 2
    assert "cat.jpg is to be a png file" in capsys.readouterr().err
