"""`safelight generate`: words to picture files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from safelight.cli.adapters import parse_adapters
from safelight.cli.drawing import connect, draw
from safelight.cli.output_files import format_of, output_paths, write_files
from safelight.connection import Connection, endpoint_or_none
from safelight.errors import InvalidRequestError
from safelight.messages import to_request
from safelight.model_files import entry_of
from safelight.options import GenerationOptions
from safelight.types import GeneratedImage, GenerationResult


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture or film shall show.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; its suffix is the format. Several get -0, -1 ….")
    ] = Path("image.png"),
    negative_prompt: Annotated[str, typer.Option(help="What it shall not show.")] = "",
    width: Annotated[int | None, typer.Option(help="Pixels; default: the image's or video's, or the model's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture file to start from; scaled to width and height. Several: a film's keyframes."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Picture file: white is repainted, black is kept.")] = None,
    video: Annotated[Path | None, typer.Option(help="Film file to start from; scaled to width and height.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much of the image or video is replaced, 0 to 1; default: 0.8, with a mask 1."),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Of a film, 4 n + 1; default: the input film's, or the model's.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Per second of a film; default: the input film's, or the model's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: the model's.")] = None,
    min_steps: Annotated[int | None, typer.Option(help="Fewest to accept from a busy gateway; default: all.")] = None,
    sampler: Annotated[str | None, typer.Option(help="See `safelight models`.")] = None,
    sampler_parameter: Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER", help="E.g. eta=0.5.")] = None,
    schedule: Annotated[str | None, typer.Option(help="See `safelight models`.")] = None,
    schedule_parameter: Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER", help="E.g. rho=7.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="At or below 1: no negative prompt.")] = None,
    distilled_guidance_scale: Annotated[float | None, typer.Option(help="Of FLUX.1-dev; default: the model's.")] = None,
    clip_skip: Annotated[int | None, typer.Option(help="CLIP layer, counted from the end.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SCALE", help="A loaded LoRA; with a stack of our own, a LoRA's file."),
    ] = None,
    original_size: Annotated[tuple[int, int] | None, typer.Option(help="Width and height that SDXL is told.")] = None,
    crop: Annotated[tuple[int, int] | None, typer.Option(help="Left and top crop that SDXL is told.")] = None,
    target_size: Annotated[tuple[int, int] | None, typer.Option(help="Width and height after the crop.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; default: drawn.")] = None,
    num_images: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    determinism: Annotated[
        str, typer.Option(help="`exact`: another run gives the same bytes; or `default`.")
    ] = "default",
    preview_every: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Show the picture on a true-colour terminal as it grows.")
    ] = None,
    output_format: Annotated[str | None, typer.Option("--format", help="If not that of the suffix.")] = None,
    quality: Annotated[int | None, typer.Option(help="Of JPEG, WebP, MP4 and WebM, 1 to 100.")] = None,
    metadata: Annotated[bool, typer.Option(help="Put the parameters into the file.")] = True,
    receipt: Annotated[
        Path | None, typer.Option(help="File to write for `safelight replay`. Several get -0, -1 ….")
    ] = None,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up after them.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="A repeated command with it gets the first one's pictures.")
    ] = None,
    tenant: Annotated[str, typer.Option(help="Whose share of the device the work counts against.")] = "",
    priority: Annotated[int, typer.Option(help="Higher runs first; -100 to 100.")] = 0,
    model: Annotated[str | None, typer.Option(help="Name at the endpoint; without one, weights or `demo`.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Gateway; default: SAFELIGHT_ENDPOINT, or our own.")] = None,
    device: Annotated[str, typer.Option(help="Of the embedded stack: auto, cpu, cuda, cuda:1 ….")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Write what was made as JSON.")] = False,
) -> None:
    """Make pictures or films from words, at a gateway or with an embedded stack of our own."""
    target = endpoint_or_none(endpoint)
    options = GenerationOptions(
        prompt=prompt,
        negative_prompt=negative_prompt,
        model=model if target else None,
        width=width,
        height=height,
        image=image,
        mask=mask,
        video=video,
        strength=strength,
        num_frames=frames,
        fps=fps,
        steps=steps,
        min_steps=min_steps,
        sampler=sampler,
        sampler_parameters=_numbers("--sampler-parameter", sampler_parameter or ()),
        schedule=schedule,
        schedule_parameters=_numbers("--schedule-parameter", schedule_parameter or ()),
        guidance_scale=guidance_scale,
        distilled_guidance_scale=distilled_guidance_scale,
        clip_skip=clip_skip,
        adapters=parse_adapters("--adapter", adapter or ()),
        original_size=original_size,
        crop=crop,
        target_size=target_size,
        seed=seed,
        num_images=num_images,
        determinism=determinism,
        preview_every_steps=preview_every,
        format=output_format or format_of(output),
        quality=quality,
        metadata=metadata,
        tenant=tenant,
        priority=priority,
    )
    to_request(options, timeout_seconds=timeout)  # refuses what can't be sent before a stack is started for it
    paths, receipts = _all_paths(output, receipt, num_images)
    entry = entry_of("--model", model) if model and not target else None
    with connect(target, entry, device) as connection:
        if target is None:
            options = _with_loaded_adapters(connection, options)
        result = draw(connection, options, timeout, idempotency_key)
    write_files(paths, [image.data for image in result.images])
    write_files(receipts, [image.receipt.to_json().encode() for image in result.images[: len(receipts)]])
    _warn_of_truncation(result.images[0])
    typer.echo(_as_json(paths, result) if as_json else "\n".join(map(_summary, paths, result.images)))


def _with_loaded_adapters(connection: Connection, options: GenerationOptions) -> GenerationOptions:
    """The options for a stack of our own, where adapters are files: they are loaded, and called by number."""
    scales = {f"adapter-{number}": scale for number, scale in enumerate(options.adapters.values())}
    for name, path in zip(scales, options.adapters, strict=True):
        connection.load_adapter(path, name=name)
    return replace(options, adapters=scales)


def _numbers(field: str, texts: Sequence[str]) -> Mapping[str, float]:
    """The parameters of NAME=NUMBER texts."""
    numbers = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            numbers[name] = float(number)
        except ValueError as error:
            raise InvalidRequestError.of(field, f"is {text!r}; must be NAME=NUMBER, e.g. eta=0.5") from error
    return numbers


def _all_paths(output: Path, receipt: Path | None, count: int) -> tuple[list[Path], list[Path]]:
    """The files of the pictures and of their receipts, where those are asked for."""
    paths = output_paths("--output", output, count)
    if receipt is None:
        return paths, []
    if receipt.resolve() == output.resolve():
        raise InvalidRequestError.of("--receipt", f"{receipt} is the picture's file; give another one")
    return paths, output_paths("--receipt", receipt, count)


def _warn_of_truncation(image: GeneratedImage) -> None:
    for field, rest in (("PROMPT", image.truncated_prompt), ("--negative-prompt", image.truncated_negative_prompt)):
        if rest:
            typer.echo(f"safelight: warning: {field}: too long for the model; left out: {rest}", err=True)


def _summary(path: Path, image: GeneratedImage) -> str:
    stages = ", ".join(f"{stage.stage} {stage.compute_seconds:.2f} s" for stage in image.stages)
    return f"{path}: {image.width}×{image.height}, {image.steps} steps, seed {image.seed}; {stages}"


def _as_json(paths: Sequence[Path], result: GenerationResult) -> str:
    images = []
    for path, image in zip(paths, result.images, strict=True):
        facts = asdict(image)
        images.append({"path": str(path), "bytes": len(facts.pop("data")), **facts})
    return json.dumps({"request_id": result.request_id, "images": images}, indent=2)
