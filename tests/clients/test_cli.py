"""The command line: files that are whole or not there, one sentence on an error, an exit code that tells its kind."""

from __future__ import annotations

import asyncio
import io
import json
import signal
from pathlib import Path
from typing import IO

import pytest
from PIL import Image

from safelight.cli import run
from safelight.v1.work_pb2 import DETERMINISM_CLASS_EXACT
from tests.clients.gateways import FakeGateway, serving, stays_after, story, tells
from tests.clients.processes import CLI, nothing_left, run_cli, start

SMALL = ["--steps", "1", "--width", "64", "--height", "72"]


def _format_and_size(path: Path) -> tuple[str | None, tuple[int, int]]:
    with Image.open(path) as picture:
        return picture.format, picture.size


def _read_until(word: str, pipe: IO[str] | None) -> None:
    """Read a pipe up to a word, or to its end."""
    assert pipe is not None
    text = ""
    while word not in text and (more := pipe.read(1)):
        text += more


def test_a_picture_is_written_and_told(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cat.png"
    assert run(["generate", "a cat", "-o", str(output), "--endpoint", endpoint, "--seed", "7", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{output}: 64×72, 1 steps, seed 7; encoder 0.")
    assert err == ""
    assert _format_and_size(output) == ("PNG", (64, 72))
    assert list(tmp_path.iterdir()) == [output]


def test_every_option_reaches_the_model(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, "--negative-prompt", "a dog", "--sampler", "euler_ancestral", "--sampler-parameter", "eta=0.5"]
    options += ["--schedule", "karras", "--schedule-parameter", "rho=6", "--guidance-scale", "3", "--clip-skip", "2"]
    options += ["--seed", "11", "--num-images", "2", "--quality", "90", "--no-metadata", "--tenant", "me"]
    options += ["--priority", "1", "--model", "tiny", "--endpoint", endpoint, "--json"]
    assert run(["generate", "a cat", "--output", str(tmp_path / "cat.jpg"), *options]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert [image["seed"] for image in images] == [11, 12]
    assert [image["path"] for image in images] == [str(tmp_path / "cat-0.jpg"), str(tmp_path / "cat-1.jpg")]
    assert [stage["stage"] for stage in images[0]["stages"]] == ["encoder", "denoiser", "decoder"]
    assert _format_and_size(tmp_path / "cat-1.jpg") == ("JPEG", (64, 72))


def test_a_prompt_that_is_cut_is_a_warning(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "cat " * 80 + "end"
    assert run(["generate", prompt, "-o", str(tmp_path / "cat.webp"), "--endpoint", endpoint, *SMALL]) == 0
    assert "safelight: warning: PROMPT: too long for the model; left out: cat" in capsys.readouterr().err


@pytest.mark.parametrize("colours", ["truecolor", ""])
async def test_options_reach_the_gateway_and_previews_are_asked_for_only_where_they_can_be_shown(
    colours: str, scratch: Path
) -> None:
    red = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(red, "png")
    gateway = FakeGateway(tells(story(preview=red.getvalue())))
    options = ["--min-steps", "2", "--determinism", "exact", "--preview-every", "3"]
    options += ["--timeout", "500", "--idempotency-key", "mine"]
    async with serving(gateway) as endpoint:
        arguments = [*CLI, "generate", "a cat", "-o", "cat.png", "--endpoint", endpoint, *options]
        terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": colours}
        with start(arguments, scratch, **terminal) as process:
            _, err = await asyncio.to_thread(process.communicate)
    request = gateway.requests[0]
    assert process.returncode == 0, err
    assert (request.sampling.min_steps, request.determinism) == (2, DETERMINISM_CLASS_EXACT)
    assert (request.context.idempotency_key, request.context.HasField("deadline")) == ("mine", True)
    assert (request.preview.every_steps, "38;2;255;0;0" in err) == ((3, True) if colours else (0, False))
    assert (scratch / "cat.png").read_bytes() == b"abcdef"


def test_the_models_are_listed(endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--endpoint", endpoint]) == 0
    assert "tiny" in capsys.readouterr().out
    assert run(["models", "--endpoint", endpoint, "--json"]) == 0
    assert [model["name"] for model in json.loads(capsys.readouterr().out)] == ["tiny"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "Missing argument 'prompt'"),
        (["x", "--steps", "many"], 2, "Invalid value for '--steps'"),
        (["x", "--step", "1"], 2, "No such option: --step"),
        (["x", "--steps", "0"], 2, "steps: is 0; must be at least 1"),
        (["x", "--width", "65", "--endpoint", "ENDPOINT"], 2, "width: is 65; must be a multiple of 8"),
        (["x", "--model", "other", "--endpoint", "ENDPOINT"], 2, "other"),
        (["x", "--model", "nowhere.safetensors"], 2, "--model: nowhere.safetensors does not exist"),
        (["x", "--sampler-parameter", "eta"], 2, "--sampler-parameter: is 'eta'; must be NAME=NUMBER"),
        (["x", "-o", "cat.bmp"], 2, "--output: cat.bmp ends in '.bmp'; choose from .png"),
        (["x", "-o", "nowhere/cat.png"], 2, "--output: nowhere/cat.png can't be written: No such file"),
        (["x", "-o", "/dev/null", "--format", "png"], 2, "--output: /dev/null is not a file"),
        (["x", "--receipt", "nowhere/cat.json"], 2, "--receipt: nowhere/cat.json can't be written: No such file"),
        (["x", "--receipt", "image.png"], 2, "--receipt: image.png is the picture's file"),
        (["x", "--timeout", "0"], 2, "timeout_seconds: is 0.0; must be above 0"),
        (["x", "--determinism", "rough"], 2, "determinism: is 'rough'; choose from default, exact"),
        (["x", "--endpoint", "127.0.0.1:1"], 1, "no gateway answers at 127.0.0.1:1: start one"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    arguments: list[str],
    code: int,
    sentence: str,
    endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["generate", *(endpoint if text == "ENDPOINT" else text for text in arguments)]) == code
    out, err = capsys.readouterr()
    assert err.startswith("safelight: ")
    assert sentence in err
    assert (out, err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])


def test_ctrl_c_stops_the_work_and_leaves_no_file(endpoint: str, scratch: Path) -> None:
    arguments = [*CLI, "generate", "a cat", "-o", "cat.png", "--endpoint", endpoint, "--steps", "1000"]
    with start(arguments, scratch, FORCE_COLOR="1") as process:
        _read_until("denoiser", process.stderr)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err.endswith("safelight: stopped\n")
    assert "Traceback" not in err
    assert list(scratch.iterdir()) == []


async def test_ctrl_c_is_told_to_the_gateway(scratch: Path) -> None:
    gateway = FakeGateway(stays_after(story()[:2]))
    async with serving(gateway) as endpoint:
        arguments = [*CLI, "generate", "a cat", "--endpoint", endpoint, "--idempotency-key", "mine"]
        with start(arguments, scratch, FORCE_COLOR="1") as process:
            await asyncio.to_thread(_read_until, "denoiser", process.stderr)
            process.send_signal(signal.SIGINT)
            await asyncio.to_thread(process.communicate)
    assert process.returncode == 130
    assert [context.idempotency_key for context in gateway.cancelled] == ["mine"]


def test_without_an_endpoint_a_stack_is_started_and_ended(tiny_sd15: Path, scratch: Path) -> None:
    done = run_cli("generate", "a cat", "--model", str(tiny_sd15), "-o", "cat.png", *SMALL, scratch=scratch)
    assert (done.returncode, done.stderr) == (0, "")
    assert _format_and_size(scratch / "cat.png") == ("PNG", (64, 72))
    assert nothing_left(scratch)


def test_up_serves_until_it_is_stopped(tiny_sd15: Path, scratch: Path) -> None:
    listen = f"unix:{scratch}/gateway.sock"
    with start([*CLI, "up", "--model", str(tiny_sd15), "--listen", listen, "--log-level", "error"], scratch) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"ready {listen}\n"
        assert run(["models", "--endpoint", listen]) == 0
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_ctrl_c_while_a_server_starts_is_quiet(scratch: Path) -> None:
    with start(["-X", "importtime", *CLI, "up"], scratch) as process:
        _read_until("services.common", process.stderr)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err


def test_a_server_s_own_help_is_shown(scratch: Path) -> None:
    done = run_cli("gateway", "serve", "--help", scratch=scratch)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: safelight gateway serve ")
    assert "--denoisers" in done.stdout


def test_a_server_s_exit_code_and_sentence_are_passed_on(scratch: Path) -> None:
    done = run_cli("gateway", "serve", scratch=scratch)
    assert (done.returncode, done.stderr) == (
        2,
        "gateway: encoders: no address is given; set --encoders or SAFELIGHT_GATEWAY_ENCODERS\n",
    )


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == 0
    assert capsys.readouterr().out.startswith("safelight")
