"""Our CLIP tokenizer against transformers', with a small byte-pair vocabulary trained here."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from services.encoder import tokenization
from services.encoder.tokenization import ClipTokenizer, load_clip_tokenizer

LENGTH = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CORPUS = [
    "a photo of a lighthouse at dusk, oil on canvas, highly detailed",
    "the cat's hat isn't here; they've 3 apples and 12 pears",
    "a café in the naïve style, über-realistic!",
]
PROMPTS = {
    "ordinary": "A photo of a lighthouse at dusk",
    "empty": "",
    "blank": " \t\n ",
    "punctuation": "the cat's hat,, isn't (here:1.2); they've   12 pears!?",
    "accents": "a CAFÉ in the naïve style, e\u0301tude",
    "other scripts": "猫 на крыше 🐱‍🚀",
    "long": "a highly detailed photo of the cat's hat at dusk, " * 5,
    "special tokens": "a hat <|endoftext|> at dusk",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder as Stable Diffusion 1.5 has it: vocab.json, merges.txt, special_tokens_map.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=EOS))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=700, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict.fromkeys([*trained["vocab"], *(f"{letter}</w>" for letter in letters), BOS, EOS])
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in trained["merges"])]))
    names = {"bos_token": {"content": BOS}, "eos_token": {"content": EOS}, "pad_token": EOS, "unk_token": EOS}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(params=["vocab.json and merges.txt", "tokenizer.json"])
def tokenizer(request: pytest.FixtureRequest, folder: Path, reference: CLIPTokenizer, tmp_path: Path) -> ClipTokenizer:
    """Ours, from the two kinds of folder."""
    if request.param == "tokenizer.json":
        reference.save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()
        return load_clip_tokenizer(tmp_path, LENGTH)
    return load_clip_tokenizer(folder, LENGTH)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_ids_equal_transformers(tokenizer: ClipTokenizer, reference: CLIPTokenizer, prompt: str) -> None:
    expected = reference(prompt, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    assert list(tokenizer(prompt).ids) == expected


def test_clips_own_vocabulary_gives_its_well_known_ids() -> None:
    tokenizer = load_clip_tokenizer(Path(tokenization.__file__).parent / "tokenizers" / "clip", length=77)
    assert tokenizer("A photo of a cat").ids[:9] == (49406, 320, 1125, 539, 320, 2368, 49407, 49407, 49407)


def test_the_vocabulary_makes_long_tokens(tokenizer: ClipTokenizer) -> None:
    assert tokenizer("lighthouse").tokens == 1


def test_a_prompt_that_fits_is_whole(tokenizer: ClipTokenizer) -> None:
    prompt = tokenizer("a lighthouse")
    assert (prompt.tokens, prompt.token_count, prompt.kept, prompt.cut_off) == (2, 4, 2, "")
    assert len(prompt.ids) == LENGTH


def test_a_prompt_that_just_fits_is_whole(tokenizer: ClipTokenizer) -> None:
    prompt = tokenizer("a " * (LENGTH - 2))
    assert (prompt.tokens, prompt.kept, prompt.cut_off) == (14, 14, "")


def test_the_report_says_what_was_cut_off_as_it_was_written(tokenizer: ClipTokenizer) -> None:
    prompt = tokenizer("a " * (LENGTH - 2) + "CAFÉ, at  dusk")
    assert (prompt.tokens, prompt.kept) == (18, 14)
    assert prompt.cut_off == "CAFÉ, at  dusk"
    assert prompt.ids[-1] == tokenizer("").ids[1]  # the end of text


def test_padding_is_the_folders_pad_token(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    ids = load_clip_tokenizer(tmp_path, LENGTH)("").ids
    assert set(ids[2:]) == {json.loads((folder / "vocab.json").read_text())["!"]}


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="single-file checkpoint carries none"):
        load_clip_tokenizer(tmp_path, LENGTH)


def test_a_vocabulary_without_its_special_token_is_refused(folder: Path, tmp_path: Path) -> None:
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|absent|>"}))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="absent"):
        load_clip_tokenizer(tmp_path, LENGTH)
