"""`python -m services.stack`: all four services in one process, for one machine.

The stages listen on unix sockets in a private folder, the gateway where the settings say. They are the same services
as in a cluster and talk gRPC; only tensors take the shorter way (services/common/exchange.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gateway.service import build_gateway
from gateway.settings import GatewaySettings
from safelight.errors import CheckpointError
from services.common.channels import ChannelPool
from services.common.exchange import TensorStore
from services.common.logs import configure_logs
from services.common.manifest import ManifestError
from services.common.metrics import Metrics
from services.common.server import BindError, Server, stop_signal
from services.common.settings import ServerSettings, SettingsError, load_settings, setting
from services.common.stage import EXIT_BAD_CONFIGURATION, Surroundings
from services.decoder.service import build_decoder
from services.decoder.settings import DecoderSettings
from services.denoiser.service import build_denoiser
from services.denoiser.settings import DenoiserSettings
from services.encoder.service import build_encoder
from services.encoder.settings import EncoderSettings

EXIT_BAD_CHECKPOINT = 3


@dataclass(frozen=True, kw_only=True)
class StackSettings(ServerSettings):
    """What the stack takes beside every server's settings, which are its gateway's."""

    service: ClassVar[str] = "stack"
    command: ClassVar[str] = "safelight up"

    listen: str = setting("127.0.0.1:7000", "Address of the gateway: host:port, or unix:/path.")
    model: str = setting("", "In place of a manifest, the weights of one model: a file, or a diffusers folder.")
    manifest: str = setting("", "YAML file that lists the models (docs/models.md); empty: the demo model.")
    fetch: bool = setting(True, "Fetch weights from hubs (docs/models.md); if not, they must be on this machine.")
    device: str = setting("auto", "torch device: cpu, cuda, cuda:1 …; auto takes a GPU when there is one.")
    threads: int = setting(0, "Threads of a CPU computation; 0: torch's choice.")
    offload: str = setting(
        "none", "When weights leave the GPU: none, cpu_offload or sequential_cpu_offload (docs/models.md)."
    )
    memory_budget: int | None = setting(
        None, "Most GPU memory for each network's weights, e.g. 12GiB; the rest streams. None: no bound."
    )
    batch_cfg: bool = setting(True, "Run the prompt's and the negative prompt's rows in one forward pass.")
    tile_size: int = setting(64, "Side of a decoder's tile in latent elements.")
    tile_overlap: int = setting(16, "Latent elements that neighbouring tiles share and blend over.")
    untiled_area: int = setting(16384, "Largest latent decoded in one pass, in elements of its plane.")


def build_stack(settings: StackSettings, folder: Path) -> list[Server]:
    """The servers of the stack with their models loaded, in the order in which to start them.

    Raises:
        CheckpointError: a model's weights can't be loaded.
        ManifestError: the manifest can't be read.
        SettingsError: both a model and a manifest are given.
    """
    metrics = Metrics()
    store = TensorStore(EncoderSettings().lease_seconds, metrics)
    sockets = {stage: f"unix:{folder}/{stage}.sock" for stage in ("encoder", "denoiser", "decoder")}
    shared: dict[str, Any] = {
        "manifest": _manifest(settings, folder),
        "fetch": settings.fetch,
        "device": settings.device,
        "threads": settings.threads,
        "offload": settings.offload,
        "memory_budget": settings.memory_budget,
    }
    encoder = EncoderSettings(listen=sockets["encoder"], **shared)
    denoiser = DenoiserSettings(listen=sockets["denoiser"], batch_cfg=settings.batch_cfg, **shared)
    decoder = DecoderSettings(
        listen=sockets["decoder"],
        tile_size=settings.tile_size,
        tile_overlap=settings.tile_overlap,
        untiled_area=settings.untiled_area,
        **shared,
    )
    gateway = _gateway_settings(settings, sockets)
    channels = ChannelPool(gateway.max_message_bytes)
    return [
        Server(build_encoder(encoder, Surroundings(metrics, store, ChannelPool())), encoder, metrics),
        Server(build_denoiser(denoiser, Surroundings(metrics, store, ChannelPool())), denoiser, metrics),
        Server(build_decoder(decoder, Surroundings(metrics, store, ChannelPool())), decoder, metrics),
        Server(build_gateway(gateway, Surroundings(metrics, store, channels)), gateway, metrics),
    ]


def _manifest(settings: StackSettings, folder: Path) -> str:
    """The path of the manifest; one is written for a model that is given by its path alone."""
    if not settings.model:
        return settings.manifest
    if settings.manifest:
        raise SettingsError("model, manifest: give one of the two")
    path = Path(settings.model).resolve()
    manifest = folder / "manifest.yaml"  # JSON is YAML
    manifest.write_text(json.dumps({"models": [{"name": path.stem, "path": str(path)}]}), encoding="utf-8")
    return str(manifest)


def _gateway_settings(settings: StackSettings, sockets: dict[str, str]) -> GatewaySettings:
    return GatewaySettings(
        listen=settings.listen,
        metrics_host=settings.metrics_host,
        metrics_port=settings.metrics_port,
        drain_seconds=settings.drain_seconds,
        reflection=settings.reflection,
        encoders=(sockets["encoder"],),
        denoisers=(sockets["denoiser"],),
        decoders=(sockets["decoder"],),
    )


async def run_stack(servers: Sequence[Server]) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = stop_signal()
    for server in servers:
        await server.start()
    sys.stdout.write(f"ready {servers[-1].address}\n")
    sys.stdout.flush()
    await stop.wait()
    for server in reversed(servers):
        await server.stop()


def main() -> None:
    """Exits 2 on a bad configuration, 3 when a model's weights can't be loaded."""
    try:
        settings = load_settings(StackSettings, sys.argv[1:], os.environ)
        configure_logs("stack", settings.log_level)
        with tempfile.TemporaryDirectory(prefix="safelight-") as folder:
            servers = build_stack(settings, Path(folder))
            asyncio.run(run_stack(servers))
    except (SettingsError, ManifestError, BindError) as error:
        _exit(EXIT_BAD_CONFIGURATION, error)
    except CheckpointError as error:
        _exit(EXIT_BAD_CHECKPOINT, error)


def _exit(code: int, error: Exception) -> None:
    sys.stderr.write(f"safelight: {error}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
