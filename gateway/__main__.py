"""`python -m gateway`: the gateway in a process of its own."""

from __future__ import annotations

from gateway.service import build_gateway, make_surroundings
from gateway.settings import GatewaySettings
from services.common.metrics import Metrics
from services.common.server import Service
from services.common.stage import run_server


def _build(settings: GatewaySettings) -> tuple[Service, Metrics]:
    surroundings = make_surroundings(settings)
    return build_gateway(settings, surroundings), surroundings.metrics


if __name__ == "__main__":
    run_server(GatewaySettings, _build)
