"""Our T5 tokenizer gives transformers' ids and tells what did not fit."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import T5TokenizerFast

from services.encoder.t5_tokenization import T5Tokenizer, load_t5_tokenizer
from tests.support.tiny_flux import T5_TOKENIZER

LENGTH = 64
PROMPTS = [
    "",
    "a cat",
    "  A   photo\nof\tan astronaut, riding a horse!  ",
    "Ein Straßenkäfer für 5 €, naïve café",
    "ﬁ ligature, full-width ＡＢＣ",
    "猫と犬 🐈",
    "<pad></s><extra_id_0> in words",
    "word " * 100,
]


@pytest.fixture(scope="module")
def tokenizer() -> T5Tokenizer:
    return load_t5_tokenizer(T5_TOKENIZER, LENGTH)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_transformers(tokenizer: T5Tokenizer, prompt: str) -> None:
    reference = T5TokenizerFast(tokenizer_file=str(T5_TOKENIZER / "tokenizer.json"))
    expected = reference(prompt, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    assert tokenizer(prompt).ids == tuple(expected)


def test_the_vocabulary_is_whole(tokenizer: T5Tokenizer) -> None:
    assert tokenizer.vocabulary_size == 32100
    stored = Tokenizer.from_file(str(T5_TOKENIZER / "tokenizer.json"))
    assert [stored.id_to_token(index) for index in (0, 1, 2, 32099)] == ["<pad>", "</s>", "<unk>", "<extra_id_0>"]


def test_what_does_not_fit_is_told_as_it_was_written(tokenizer: T5Tokenizer) -> None:
    prompt = " ".join(["cat"] * (LENGTH - 1) + ["lighthouse", "dusk"])
    tokenized = tokenizer(prompt)
    assert (tokenized.kept, tokenized.cut_off.strip()) == (LENGTH - 1, "lighthouse dusk")
    assert tokenized.token_count == tokenized.tokens + 1 > LENGTH
    assert tokenized.ids[-1] == 1


def test_a_prompt_that_just_fits_is_whole(tokenizer: T5Tokenizer) -> None:
    tokenized = tokenizer(" ".join(["cat"] * (LENGTH - 1)))
    assert (tokenized.token_count, tokenized.cut_off) == (LENGTH, "")


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"needs tokenizer\.json"):
        load_t5_tokenizer(tmp_path, LENGTH)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(Tokenizer.from_str(_WORDS).to_str())
    with pytest.raises(ValueError, match="lacks its special token '</s>'"):
        load_t5_tokenizer(tmp_path, LENGTH)


_WORDS = '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
