"""Peak memory of decoding films of 17, 49 and 81 frames with Wan2.1's VAE at its real width: does it grow with length?

256x256 pixels, random weights. For each film a decoder is started, is sent the latents and answers with an MP4; the
peak is the kernel's of the resident set (VmHWM), less what the decoder had when it began to serve. ffmpeg, a process of
its own, is looked at whenever a latent frame is done.

    OMP_WAIT_POLICY=PASSIVE python -m bench.film_memory --dtype float32
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from bench.load_memory import memory_status
from bench.server_process import ServerProcess
from safelight.v1.decoder_service_pb2 import DecodeRequest
from safelight.v1.decoder_service_pb2_grpc import DecoderServiceStub
from safelight.v1.tensor_pb2 import TensorRef
from services.common.channels import open_channel
from services.modeling.wire import TorchPayload, make_header

FRAMES, SIDE = (17, 49, 81), 256
TINY_FRAMES, TINY_SIDE = (5, 9), 64
_MIB = 2**20


@dataclass(frozen=True)
class Peaks:
    """Bytes: of the decoder, above what it had before; and of ffmpeg."""

    decoder: int
    ffmpeg: int


def main() -> None:
    """Measures every film and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="8 channels and short films, to try the script out")
    options = parser.parse_args()
    lengths, side = (TINY_FRAMES, TINY_SIDE) if options.tiny else (FRAMES, SIDE)
    sys.stdout.write(f"{options.dtype}, {side}x{side}, peak MiB\n")
    with tempfile.TemporaryDirectory() as root:
        manifest = save_model(Path(root), base_dim=8 if options.tiny else 96, dtype=options.dtype)
        for frames in lengths:
            flags = f"--manifest={manifest}", "--device=cpu", f"--threads={options.threads}"
            decoder = ServerProcess("services.decoder", Path(root) / "log", *flags)
            peaks = asyncio.run(decode(decoder, frames, side))
            sys.stdout.write(
                f"{frames:4} frames: decoder {peaks.decoder / _MIB:6.0f}, ffmpeg {peaks.ffmpeg / _MIB:6.0f}\n"
            )
            sys.stdout.flush()


def save_model(root: Path, base_dim: int, dtype: str) -> Path:
    """Writes a VAE of random weights in diffusers' layout; returns the manifest that names it."""
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=base_dim).save_pretrained(root / "model" / "vae")
    (root / "model" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    entry = {"name": "wan", "path": str(root / "model"), "decoder": {"dtype": dtype}}
    manifest = root / "manifest.yaml"  # JSON is YAML
    manifest.write_text(json.dumps({"models": [entry]}))
    return manifest


async def decode(decoder: ServerProcess, frames: int, side: int) -> Peaks:
    """The peaks of one film, in a decoder that has done nothing else."""
    latents = torch.randn(1, 16, 1 + (frames - 1) // 4, side // 8, side // 8)
    ref = TensorRef(header=make_header(latents, "BCTHW"), inline=bytes(TorchPayload(latents).buffer()))
    decoder.start()
    try:
        await asyncio.to_thread(decoder.wait_until_serving)
        server = decoder.process.pid
        before, ffmpeg = memory_status("VmRSS", server), 0
        async with open_channel(decoder.address) as channel:
            async for event in DecoderServiceStub(channel).Decode(DecodeRequest(model="wan", latents=ref)):
                if event.HasField("progress"):
                    ffmpeg = max(ffmpeg, *(memory_status("VmHWM", child) for child in children(server)))
        return Peaks(memory_status("VmHWM", server) - before, ffmpeg)
    finally:
        decoder.kill()


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    listed = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for children in listed for number in children.read_text().split()]


if __name__ == "__main__":
    main()
