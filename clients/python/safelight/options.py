"""What a user asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from safelight.input_films import InputFilm
from safelight.input_pictures import InputPicture


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What to make; everything but the prompt has a default, which is the model's own where it says None.

    Args:
        prompt: what the picture shall show.
        negative_prompt: what it shall not show.
        model: name of the model; None if the gateway serves just one.
        width: pixels; a multiple of the model's scale factor (8). None: the image's or video's, or the model's own.
        height: pixels.
        image: the picture to start from: a PIL picture, a PNG, JPEG or WebP file's bytes, or its path. It is scaled to
            width and height; without them it says them, rounded to what the model takes. A model that is led through
            keyframes takes one or several, in their order in time: the first is the film's first frame, the last of
            several its last, and the others are spread evenly between. Without width and height the film has the
            first one's proportions and the model's usual number of pixels.
        mask: a picture of any size that says where to repaint the image: white is repainted, black is kept.
        video: the film to start from: frames (PIL pictures of one size), an MP4, WebM or GIF file's bytes, or its path.
            Its frames are scaled to width and height, and the first num_frames are taken; what of these and of fps is
            not said, it says, rounded to what the model takes. Only for models that make films.
        strength: how much of the image or video is replaced, 0 to 1. None: 0.8, or 1 with a mask.
        steps: denoising steps.
        min_steps: the fewest steps to accept when the gateway is too busy for `steps`; None: rather a refusal.
        sampler: one of the model's (`Client.models`): "euler", "euler_ancestral", "heun", "ddim", "ddpm", "dpmpp_2m",
            "dpmpp_2m_sde", "dpmpp_3m_sde", "deis", "unipc", "lcm", "flow_match_euler" or "flow_match_heun".
        sampler_parameters: e.g. {"eta": 0.5}.
        schedule: one of the model's: "scaled_linear", "karras", "exponential", "beta", "sgm_uniform", "ddim",
            "trailing", "ays", "flow" or "flow_dynamic".
        schedule_parameters: e.g. {"rho": 7.0} or {"shift": 3.0}.
        guidance_scale: of classifier-free guidance; at or below 1 the negative prompt is not used.
        distilled_guidance_scale: guidance that a distilled model takes as an input (FLUX.1-dev), instead of or beside
            the classifier-free one.
        clip_skip: CLIP layer to take, counted from the end; 1 is the last.
        original_size: (width, height) in pixels of the picture before it was cropped, as SDXL is told; larger looks
            finer, small looks coarse. None: that of the picture that is drawn.
        crop: (left, top) pixels that were cropped of it, as SDXL is told; None: none.
        target_size: (width, height) after cropping, as SDXL is told; None: that of the picture that is drawn.
        adapters: scales of the LoRAs to apply, by the names that they were loaded under.
        adapter_fingerprints: of their files, by name; one of another fingerprint is refused. A receipt has them.
        seed: of the first picture; the others count up from it. None draws one, told in the result.
        num_images: how many pictures.
        determinism: "default" is equal up to rounding whenever it is run; "exact" is equal bit for bit, whatever else
            the gateway computes, and costs the speed of sharing forward passes.
        preview_every_steps: a Preview event every so many steps; None: none.
        num_frames: of a film; one more than a multiple of the model's frames per latent frame (4). Only for models that
            make films.
        fps: frames per second of a film.
        format: "png", "jpeg" or "webp" for a picture, "mp4", "webm", "gif" or "png_frames" (an archive) for a film, or
            "latents" (a safetensors file); None: "png" or "mp4".
        quality: 1 to 100 for JPEG and WebP, MP4 and WebM.
        metadata: embed the parameters in the file.
        tenant: whose share of the device the work counts against.
        priority: higher runs first; -100 to 100.
    """

    prompt: str
    negative_prompt: str = ""
    model: str | None = None
    width: int | None = None
    height: int | None = None
    image: InputPicture | Sequence[InputPicture] | None = None
    mask: InputPicture | None = None
    video: InputFilm | None = None
    strength: float | None = None
    steps: int | None = None
    min_steps: int | None = None
    sampler: str | None = None
    sampler_parameters: Mapping[str, float] = field(default_factory=dict)
    schedule: str | None = None
    schedule_parameters: Mapping[str, float] = field(default_factory=dict)
    guidance_scale: float | None = None
    distilled_guidance_scale: float | None = None
    clip_skip: int | None = None
    adapters: Mapping[str, float] = field(default_factory=dict)
    adapter_fingerprints: Mapping[str, str] = field(default_factory=dict)
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    seed: int | None = None
    num_images: int = 1
    determinism: str = "default"
    preview_every_steps: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    format: str | None = None
    quality: int | None = None
    metadata: bool = True
    tenant: str = ""
    priority: int = 0
