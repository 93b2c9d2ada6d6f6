"""FLUX.1: words to a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from safelight.model_files import WeightsPath
from safelight.options import GenerationOptions
from safelight.pipelines.config import Network
from safelight.pipelines.image_pipeline import ImagePipeline, ProgressCallback, given_strength, refuse_unserved
from safelight.pipelines.parallel import ParallelPipelineConfig


@dataclass
class FluxPipelineConfig(ParallelPipelineConfig):
    """A FLUX.1 model, dev or schnell, and how it runs.

    `model_path` may be the transformer alone (Black Forest Labs' file, diffusers', or GGUF), an all-in-one file, or a
    folder in the diffusers layout. A network that is neither in it nor named beside it is fetched from ModelScope, as
    DiffSynth-Engine does (docs/models.md).

    Args:
        clip_path: CLIP-L of its own; None: the one in model_path, else muse/FLUX.1-dev-fp8's.
        t5_path: T5 of its own, a file, a list of shards, or GGUF; None: the same.
        vae_path: VAE of its own; None: the same.
        clip_dtype: as model_dtype, which is bfloat16 on a GPU, float32 on a CPU.
        t5_dtype: the same.
        vae_dtype: the same.
        load_text_encoder: False: CLIP-L and T5 are not loaded, and every prompt is zeros.
    """

    clip_path: WeightsPath | None = None
    t5_path: WeightsPath | None = None
    vae_path: WeightsPath | None = None
    clip_dtype: Any = None
    t5_dtype: Any = None
    vae_dtype: Any = None
    load_text_encoder: bool = True

    @classmethod
    def basic_config(
        cls,
        model_path: WeightsPath,
        device: str = "auto",
        parallelism: int = 1,
        offload_mode: str | None = None,
        offload_to_disk: bool = False,
        endpoint: str | None = None,
    ) -> FluxPipelineConfig:
        """A config of what most scripts set; several GPUs share the tokens, and store parts of the weights each."""
        return cls(
            model_path,
            device=device,
            parallelism=parallelism,
            use_fsdp=parallelism > 1,
            offload_mode=offload_mode,
            offload_to_disk=offload_to_disk,
            endpoint=endpoint,
        )

    def networks(self) -> Sequence[Network]:
        """CLIP-L, T5 and the VAE."""
        text_encoders = [
            Network("clip", "encoder", self.clip_path, self.clip_dtype, part="clip_l"),
            Network("t5", "encoder", self.t5_path, self.t5_dtype, part="t5"),
        ]
        vae = Network("vae", "decoder", self.vae_path, self.vae_dtype)
        return [*text_encoders, vae] if self.load_text_encoder else [vae]

    def model_options(self) -> dict[str, Any]:
        """Whether it does without text."""
        return {} if self.load_text_encoder else {"load_text_encoder": False}


class FluxImagePipeline(ImagePipeline):
    """A FLUX.1 model, ready to be called; made by `from_pretrained`.

    >>> pipe = FluxImagePipeline.from_pretrained("FLUX.1-dev")
    >>> pipe(prompt="a cat", width=1024, height=1024).save("cat.png")
    """

    config_class = FluxPipelineConfig
    family = "flux"

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        ref_image: Image.Image | None = None,
        cfg_scale: float = 1.0,
        clip_skip: int = 2,
        input_image: Image.Image | None = None,
        denoising_strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        flux_guidance_scale: float | None = None,
        controlnet_params: Sequence[object] = (),
        progress_callback: ProgressCallback | None = None,
    ) -> Image.Image:
        """Draw one picture.

        Args:
            prompt: what the picture shall show, up to 512 tokens.
            negative_prompt: what it shall not show; needs a cfg_scale above 1.
            ref_image: not served by this release.
            cfg_scale: of classifier-free guidance, which doubles the work; at or below 1 there is none.
            clip_skip: has no effect, as in DiffSynth-Engine: only CLIP's summary of the prompt is used.
            input_image: the picture to start from, as its pixels are; scaled to width and height where they are given.
            denoising_strength: how much of the input image is replaced, 0 to 1.
            height: pixels, a multiple of 16; None: the input image's, or 1024.
            width: pixels, the same.
            num_inference_steps: denoising steps; None: 30 for dev, 4 for schnell.
            seed: of the noise; None draws one.
            flux_guidance_scale: guidance that dev takes as an input; None: 3.5. schnell takes none.
            controlnet_params: not served by this release.
            progress_callback: called before the picture is decoded as (step, steps, "DENOISING"), step counting
                from 0, in the calling thread. An exception in it stops the work.

        Raises:
            SafelightError: see safelight.errors.
        """
        refuse_unserved(
            ref_image=ref_image is not None,
            controlnet_params=bool(controlnet_params),
        )
        options = GenerationOptions(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            image=input_image,
            strength=given_strength(input_image, denoising_strength),
            steps=num_inference_steps,
            guidance_scale=cfg_scale,
            distilled_guidance_scale=flux_guidance_scale,
            seed=seed,
        )
        return self._draw(options, progress_callback)
