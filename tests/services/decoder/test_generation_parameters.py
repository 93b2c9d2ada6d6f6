"""The text form of generation parameters, as the web UI writes it and as other tools do."""

import pytest

from services.decoder.generation_parameters import GenerationParameters, parameters_text, parse_parameters

PARAMETERS = GenerationParameters(
    prompt="a lighthouse at dusk,\noil on canvas",
    negative_prompt="fog",
    steps=20,
    sampler="Euler",
    guidance_scale=7.5,
    seed=42,
    width=512,
    height=768,
    model='sd15, "pruned": v2',
    details={"Clip skip": "2"},
)


def test_the_text_is_the_web_uis() -> None:
    assert parameters_text(PARAMETERS) == (
        "a lighthouse at dusk,\noil on canvas\n"
        "Negative prompt: fog\n"
        "Steps: 20, Sampler: Euler, CFG scale: 7.5, Seed: 42, Size: 512x768, "
        'Model: "sd15, \\"pruned\\": v2", Clip skip: 2'
    )


def test_parsing_undoes_writing() -> None:
    assert parse_parameters(parameters_text(PARAMETERS)) == vars(PARAMETERS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", {"prompt": "a cat", "negative_prompt": "", "details": {}}),
        ("a cat\nSteps: 5", {"prompt": "a cat", "negative_prompt": "", "steps": 5, "details": {}}),
        ("Negative prompt: dog\nSteps: 5", {"prompt": "", "negative_prompt": "dog", "steps": 5, "details": {}}),
        ("a\nNegative prompt: b\nc\nSteps: 5", {"prompt": "a", "negative_prompt": "b\nc", "steps": 5, "details": {}}),
        (
            "a cat\nSteps: 5, Size: 8x16, Model hash: 6ce0161689, Version: v1.9",
            {
                "prompt": "a cat",
                "negative_prompt": "",
                "steps": 5,
                "width": 8,
                "height": 16,
                "details": {"Model hash": "6ce0161689", "Version": "v1.9"},
            },
        ),
    ],
)
def test_the_texts_of_other_tools_are_parsed(text: str, expected: dict[str, object]) -> None:
    assert parse_parameters(text) == expected


@pytest.mark.parametrize("line", ["Steps: many", "Steps: 5, Size: large", "Steps: 5, Seed: 1.5"])
def test_a_number_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"literal|unpack"):
        parse_parameters(f"a cat\n{line}")
