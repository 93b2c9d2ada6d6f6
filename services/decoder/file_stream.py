"""A finished file on its way to the caller, read as it is sent."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncGenerator

from safelight.v1 import decoder_service_pb2 as pb
from safelight.v1.work_pb2 import FileChunk, StageTiming
from services.common.exchange import CHUNK_BYTES
from services.decoder.output_files import OutputFile


async def stream_file(file: OutputFile, timing: StageTiming) -> AsyncGenerator[pb.DecodeResponse, None]:
    """The file's chunks, of which the first tells its type and size; then the result."""
    size, digest, offset = file.content.seek(0, io.SEEK_END), hashlib.sha256(), 0
    file.content.seek(0)
    while data := await asyncio.to_thread(file.content.read, CHUNK_BYTES):
        await asyncio.to_thread(digest.update, data)
        chunk = FileChunk(data=data, offset=offset)
        if offset == 0:
            chunk.media_type, chunk.file_size = file.media_type, size
        offset += len(data)
        yield pb.DecodeResponse(chunk=chunk)
    result = pb.DecodeResult(
        media_type=file.media_type,
        file_size=size,
        width=file.width,
        height=file.height,
        frames=file.frames,
        timing=timing,
        sha256=digest.digest(),
    )
    yield pb.DecodeResponse(result=result)
