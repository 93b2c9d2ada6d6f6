"""Settings of the denoiser."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from services.common.settings import SettingsError, setting
from services.modeling.lora.settings import AdapterSettings


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(AdapterSettings):
    """What the denoiser takes beside every stage's settings."""

    service: ClassVar[str] = "denoiser"

    max_running: int = setting(16, "Requests between their first and last step; the others wait.")
    max_batch_rows: int = setting(8, "Rows of a forward pass; a request with guidance has two.")
    batch_cfg: bool = setting(True, "Run the prompt's and the negative prompt's rows in one forward pass.")
    max_latent_area: int = setting(65536, "Most latent elements of a plane; 65536 is 2048x2048 pixels at f=8.")
    max_steps: int = setting(1000, "Most steps of a request.")
    tenant_weights: tuple[str, ...] = setting((), "Tenants' shares under load, as name=weight; the others weigh 1.")
    heartbeat_seconds: float = setting(0.5, "Longest silence of a stream: a heartbeat ends it.")
    max_fused_bytes: int = setting(
        2 * 1024**3, "Most memory for a second copy of the layers that a much used set of LoRAs changes; 0: none."
    )
    rank_answer_seconds: float = setting(
        300.0, "Longest time of a step on several devices; then their processes are started again."
    )
    nodes: int = setting(
        1, "Machines that share its model on several devices; the others run services.denoiser.ranks (docs/models.md)."
    )
    master_address: str = setting("", "Address of this machine that the ranks of the others reach.")
    master_port: int = setting(29500, "Port there.")
    rank_secret: str = setting("", "What the ranks of other machines must know; by environment or file, not as a flag.")
    warm_up_steps: int = setting(3, "Steps measured at start-up for each batch size, for the cost curve; 0: none.")
    warm_up_seconds: float = setting(1.0, "Longest time for that, of all models.")

    def __post_init__(self) -> None:
        if self.heartbeat_seconds <= 0:
            raise SettingsError(f"heartbeat_seconds: is {self.heartbeat_seconds:g}; must be above 0")
        if self.nodes < 1:
            raise SettingsError(f"nodes: is {self.nodes}; must be 1 or more")
        if self.nodes > 1 and not (self.master_address and self.rank_secret):
            raise SettingsError(f"nodes: {self.nodes} machines need a master_address and a rank_secret; give both")


def parse_tenant_weights(entries: Iterable[str]) -> dict[str, float]:
    """Weights by tenant of entries such as "alice=2".

    Raises:
        SettingsError: an entry has no name, or no number above 0.
    """
    weights = {}
    for entry in entries:
        name, _, text = entry.rpartition("=")
        weight = _number(text)
        if not name or not 0 < weight < math.inf:
            raise SettingsError(f"tenant_weights: {entry!r} is not name=weight with a weight above 0, e.g. alice=2")
        weights[name] = weight
    return weights


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
