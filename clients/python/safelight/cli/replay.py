"""`safelight replay`: a picture once more, from its receipt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.cli.drawing import connect, draw
from safelight.cli.output_files import format_of, output_paths, write_files
from safelight.connection import Connection, endpoint_or_none
from safelight.errors import FingerprintMismatchError, InvalidRequestError, UnknownModelError
from safelight.input_films import film_file
from safelight.input_pictures import picture_file
from safelight.model_files import entry_of
from safelight.receipt import Receipt
from safelight.types import GeneratedImage

_DIFFERENT = 1


def replay(
    receipt: Annotated[Path, typer.Argument(help="That `safelight generate --receipt` wrote.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: none.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="The file that the picture started from, or each of several.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask's file.")] = None,
    video: Annotated[Path | None, typer.Option(help="The file that the film started from.")] = None,
    model: Annotated[str | None, typer.Option(help="Weights, where there is no endpoint; default: `demo`.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Gateway; default: SAFELIGHT_ENDPOINT, or our own.")] = None,
    device: Annotated[str, typer.Option(help="Of the embedded stack: auto, cpu, cuda, cuda:1 ….")] = "auto",
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up after them.")] = None,
) -> None:
    """Make a picture again from its receipt, and compare.

    Exits 1 when the receipt promises the same bytes (the exact class) and they differ.
    """
    known = _read(receipt)
    paths = _paths(output, known)
    options = replace(
        known.options(),
        image=_input_files(known, "image", image or []) or None,
        mask=next(iter(_input_files(known, "mask", [mask] if mask else [])), None),
        video=next(iter(_input_files(known, "video", [video] if video else [])), None),
    )
    target = endpoint_or_none(endpoint)
    with connect(target, None if target else _entry(known, model), device) as connection:
        _check_weights(known, connection)
        again = draw(connection, options, timeout).images[0]
    write_files(paths, [again.data for _ in paths])
    typer.echo(_verdict(known, again))
    if known.determinism == "exact" and not known.is_of(again.data):
        raise typer.Exit(_DIFFERENT)


def _read(path: Path) -> Receipt:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError.of("receipt", f"{path} is no text; give a file that --receipt wrote") from error
    return Receipt.from_json(text)


def _paths(output: Path | None, known: Receipt) -> list[Path]:
    if output is None:
        return []
    if format_of(output) != known.format:
        raise InvalidRequestError.of("--output", f"{output} is to be a {known.format} file as the receipt has it")
    return output_paths("--output", output, 1)


def _input_files(known: Receipt, name: str, paths: Sequence[Path]) -> list[bytes]:
    """The files of one name that the picture or film started from, in their order.

    Raises:
        InvalidRequestError: one is missing, is another one, or is not needed.
    """
    wanted, option = [digest for each, digest in known.inputs.items() if each.split("-")[0] == name], f"--{name}"
    if len(paths) < len(wanted):
        missing = ", ".join(wanted[len(paths) :])
        raise InvalidRequestError.of(option, f"give the file that the picture started from, SHA-256 {missing}")
    if len(paths) > len(wanted):
        raise InvalidRequestError.of(option, f"the picture started from {len(wanted) or 'none'}; leave it out")
    read = film_file if name == "video" else picture_file
    return [_checked_file(option, path, read(option, path), digest) for path, digest in zip(paths, wanted, strict=True)]


def _checked_file(option: str, path: Path, file: bytes, wanted: str) -> bytes:
    if (found := hashlib.sha256(file).hexdigest()) != wanted:
        raise InvalidRequestError.of(
            option, f"{path} has SHA-256 {found}; give the file that the picture started from, {wanted}"
        )
    return file


def _entry(known: Receipt, model: str | None) -> dict[str, Any] | None:
    """The manifest's entry, under the receipt's name: the name is part of what is written into the file."""
    entry = entry_of("--model", model) if model else None
    return None if entry is None else {**entry, "name": known.model}


def _check_weights(known: Receipt, connection: Connection) -> None:
    """Raises FingerprintMismatchError when the gateway's model is another one than the receipt's."""
    served = {each.name: each for each in connection.models()}
    if known.model not in served:
        raise UnknownModelError(
            f"the receipt's model is {known.model!r}, and the gateway serves {', '.join(served) or 'none now'}: "
            "give another --endpoint, or its weights with --model"
        )
    if others := known.stages_with_other_weights(served[known.model].fingerprints):
        raise FingerprintMismatchError(
            f"the {' and the '.join(others)} of model {known.model!r} have other weights than those of the receipt: "
            "give another --endpoint, or those weights with --model"
        )


def _verdict(known: Receipt, image: GeneratedImage) -> str:
    if known.is_of(image.data):
        return f"identical: {known.file_size} bytes, SHA-256 {known.file_sha256}"
    promise = "the exact class promises the same" if known.determinism == "exact" else "as the default class allows"
    again = image.receipt
    return (
        f"different ({promise}): {again.file_size} bytes, SHA-256 {again.file_sha256}; "
        f"the receipt has {known.file_size} bytes, SHA-256 {known.file_sha256}"
    )
