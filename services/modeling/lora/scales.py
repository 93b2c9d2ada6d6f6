"""What a LoRA's change is multiplied with where its layer says no alpha: by PEFT's config, or else 1."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.modeling.components import read_json
from services.modeling.lora.kinds import Scale
from services.modeling.lora.layouts import DENOISER, flat
from services.modeling.weights import Checkpoint

# diffusers keeps PEFT's configs of a file's components, each option under its component's name, in the file's header.
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_DIFFUSERS_PREFIXES = {"unet": DENOISER, "transformer": DENOISER}
_PEFT_FILE = "adapter_config.json"


@dataclass(frozen=True)
class PeftConfig:
    """Of a LoraConfig, what the scale depends on.

    Args:
        alpha: of all layers but those of the patterns; None: the rank.
        alpha_pattern: alphas by the ends of layers' names.
        rank_stabilized: alpha is divided by the rank's root (arXiv 2312.03732).
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    def scale(self, layer: str) -> Scale:
        """Of a layer, by its rank."""
        matching = (alpha for end, alpha in self.alpha_pattern.items() if re.fullmatch(f"(?:.*_)?{flat(end)}", layer))
        alpha = next(matching, self.alpha)
        if alpha is None:
            return lambda rank: 1.0
        return lambda rank: alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_configs(checkpoint: Checkpoint) -> dict[str, PeftConfig]:
    """The configs that come with a file, by component; none for what it does not say.

    Raises:
        CheckpointError: there is one, and it is no JSON.
        ValueError: there is one, and it is not PEFT's.
    """
    if beside := read_json(checkpoint.files[-1].parent / _PEFT_FILE):
        return {DENOISER: _config(beside)}
    options = json.loads(checkpoint.metadata.get(_DIFFUSERS_METADATA, "{}"))
    by_prefix: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        prefix, _, option = name.partition(".")
        by_prefix.setdefault(_DIFFUSERS_PREFIXES.get(prefix, prefix), {})[option] = value
    return {component: _config(values) for component, values in by_prefix.items()}


def _config(options: Mapping[str, Any]) -> PeftConfig:
    alpha = options.get("lora_alpha")
    pattern = options.get("alpha_pattern") or {}
    if not isinstance(alpha, int | float | None) or not isinstance(pattern, Mapping):
        raise ValueError(f"lora_alpha is {alpha!r} and alpha_pattern {pattern!r}; must be a number and an object")
    by_end = {str(end).replace("\\", ""): float(value) for end, value in pattern.items()}
    return PeftConfig(alpha, by_end, bool(options.get("use_rslora", False)))
