"""What made a picture, and the text form of it that AUTOMATIC1111's web UI made common: see `parameters_text`."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

ParameterValue = str | int | float | bool

_FIELDS = {  # name in the text form -> field of GenerationParameters and its type
    "Steps": ("steps", int),
    "Sampler": ("sampler", str),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Model": ("model", str),
}
_NEGATIVE = "Negative prompt: "
_SETTING = re.compile(r'\s*([^:,"]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_NEEDS_QUOTES = re.compile(r'[,:\n"]')


@dataclass(frozen=True, kw_only=True)
class GenerationParameters:
    """What made a picture. `details` are further settings under their names in the text form, such as "Clip skip"."""

    prompt: str
    negative_prompt: str
    steps: int
    sampler: str
    guidance_scale: float
    seed: int
    width: int
    height: int
    model: str
    details: Mapping[str, ParameterValue] = field(default_factory=dict)


def parameters_text(parameters: GenerationParameters) -> str:
    """The text form: the prompt, the negative prompt if there is one, and one line of settings.

    >>> print(parameters_text(parameters))
    a lighthouse at dusk
    Negative prompt: fog
    Steps: 20, Sampler: Euler, CFG scale: 7.5, Seed: 42, Size: 512x768, Model: sd15
    """
    settings: dict[str, ParameterValue] = {
        "Steps": parameters.steps,
        "Sampler": parameters.sampler,
        "CFG scale": parameters.guidance_scale,
        "Seed": parameters.seed,
        "Size": f"{parameters.width}x{parameters.height}",
        "Model": parameters.model,
        **parameters.details,
    }
    negative = [_NEGATIVE + parameters.negative_prompt] if parameters.negative_prompt else []
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items())
    return "\n".join([parameters.prompt, *negative, line])


def parse_parameters(text: str) -> dict[str, object]:
    """The fields of GenerationParameters that a text form holds; files of other tools may lack some.

    Settings without a field are strings under `details`. A prompt that itself has a line starting with
    "Negative prompt: " is split there: the form has no escape for it. Raises ValueError for a number that is none.
    """
    body, _, line = text.rpartition("\n")
    if not line.startswith("Steps: "):
        body, line = text, ""
    prompt, _, negative = f"\n{body}".partition(f"\n{_NEGATIVE}")
    return {"prompt": prompt.removeprefix("\n"), "negative_prompt": negative, **_parse_settings(line)}


def _parse_settings(line: str) -> dict[str, object]:
    fields: dict[str, object] = {}
    details: dict[str, str] = {}
    for name, quoted in _SETTING.findall(line):
        value = _unquoted(quoted)
        if name in _FIELDS:
            field_name, kind = _FIELDS[name]
            fields[field_name] = kind(value)
        elif name == "Size":
            fields["width"], fields["height"] = (int(side) for side in value.split("x"))
        else:
            details[name] = value
    return {**fields, "details": details}


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if _NEEDS_QUOTES.search(value) else value


def _unquoted(value: str) -> str:
    return str(json.loads(value)) if value.startswith('"') else value.strip()
