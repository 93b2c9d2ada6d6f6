"""Laws of examples/fit_latent_preview.py: it finds the map, and says how good it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples import fit_latent_preview
from examples.fit_latent_preview import FILE_NAME, Pair, fit
from services.denoiser import previews

MATRIX = torch.tensor([[0.1, 0.0, 0.2, -0.1], [0.0, 0.3, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
BIAS = torch.tensor([0.5, 0.4, 0.6])


def pairs(noise: float) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(10):
        latents = torch.randn(4, 6, 8, generator=generator)
        colours = torch.einsum("rc,chw->rhw", MATRIX, latents) + BIAS[:, None, None]
        made.append(Pair(latents, colours + noise * torch.randn(3, 6, 8, generator=generator)))
    return made


def test_a_linear_relation_is_found_as_it_is() -> None:
    found = fit(pairs(noise=0.0))
    torch.testing.assert_close(found.matrix.float(), MATRIX, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.bias.float(), BIAS, atol=1e-6, rtol=0)
    assert found.r_squared == pytest.approx(1.0, abs=1e-9)


def test_what_the_map_does_not_explain_is_told() -> None:
    assert 0.3 < fit(pairs(noise=0.2)).r_squared < 0.9


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        fit(pairs(noise=0.0)[:4])


@pytest.mark.parametrize("with_pictures", [True, False])
def test_the_script_writes_a_map_that_the_denoiser_reads(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_pictures: bool
) -> None:
    for number in range(6):
        Image.linear_gradient("L").rotate(90 * number).resize((40 + 8 * number, 33)).convert("RGB").save(
            tmp_path / f"{number}.png"
        )
    (tmp_path / "notes.txt").write_text("no picture")
    output = tmp_path / FILE_NAME
    pictures = ["--pictures", str(tmp_path)] if with_pictures else []
    arguments = ["fit", "--model", str(tiny_sd15), "--count", "6", "--output", str(output), *pictures]
    monkeypatch.setattr(sys, "argv", arguments)
    fit_latent_preview.main()
    assert json.loads(output.read_text())["pictures"] == 6
    assert previews.load_preview_map(output, 4) is not None
    assert previews.FILE_NAME == FILE_NAME
