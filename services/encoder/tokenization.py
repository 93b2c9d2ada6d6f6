"""CLIP's byte-pair tokenizer: a prompt to the token ids that the text model reads, and a report of what did not fit.

Paper: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
https://arxiv.org/abs/2103.00020. Reference code: openai/CLIP, clip/simple_tokenizer.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


@dataclass(frozen=True)
class TokenizedPrompt:
    """The ids of a prompt, always `length` of them, and what of the prompt they hold.

    A prompt that a model does not encode, but stands for by zeros, has no ids.
    """

    ids: tuple[int, ...]
    tokens: int  # of the whole prompt, beginning and end of text not counted
    kept: int
    cut_off: str  # the part of the prompt, as it was written, that did not fit
    special_tokens: int = 2  # CLIP's beginning and end of text

    @property
    def token_count(self) -> int:
        """Tokens of the whole prompt, beginning and end of text counted."""
        return self.tokens + self.special_tokens

    def padded_with(self, pad: int) -> tuple[int, ...]:
        """The ids with another one as padding."""
        end = self.kept + 2
        return self.ids[:end] + (pad,) * (len(self.ids) - end)


class ClipTokenizer:
    """Lower-cased, whitespace-collapsed byte pairs between a beginning and an end of text, padded to `length`."""

    def __init__(self, tokenizer: Tokenizer, length: int, *, bos: str, eos: str, pad: str) -> None:
        self._tokenizer = tokenizer
        self.length = length
        self.vocabulary_size: int = tokenizer.get_vocab_size()
        self._bos, self._eos, self._pad = map(self.token_id, (bos, eos, pad))

    def token_id(self, token: str) -> int:
        """The id of a token of the vocabulary; raises ValueError when there is none of it."""
        return token_id(self._tokenizer, token)

    def __call__(self, prompt: str) -> TokenizedPrompt:
        """Token ids of `prompt`. Of a prompt too long, the beginning is kept; the end of text stays last."""
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        kept = min(len(encoding.ids), self.length - 2)
        ids = [self._bos, *encoding.ids[:kept], self._eos]
        padding = [self._pad] * (self.length - len(ids))
        cut_off = prompt[encoding.offsets[kept][0] :] if kept < len(encoding.ids) else ""
        return TokenizedPrompt(tuple(ids + padding), len(encoding.ids), kept, cut_off)


def load_clip_tokenizer(folder: Path, length: int) -> ClipTokenizer:
    """The tokenizer of a diffusers folder's `tokenizer/`, which holds tokenizer.json or vocab.json and merges.txt.

    `length` is the number of positions of the text model, 77 for CLIP. Raises FileNotFoundError when there is none.
    """
    special = _special_tokens(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _from_vocabulary(folder, special)
    else:
        raise FileNotFoundError(
            f"no CLIP tokenizer in {folder}: it needs tokenizer.json, or vocab.json and merges.txt. A single-file "
            "checkpoint carries none; name the tokenizer/ folder of a diffusers model of the same family"
        )
    return ClipTokenizer(
        tokenizer, length, bos=special["bos_token"], eos=special["eos_token"], pad=special["pad_token"]
    )


def _from_vocabulary(folder: Path, special: dict[str, str]) -> Tokenizer:
    model = BPE.from_file(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        end_of_word_suffix="</w>",
        unk_token=special["eos_token"],
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in sorted(set(special.values()))])
    return tokenizer


def _special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens by their names in the folder's config files, where a token is a string or has `content`."""
    tokens = dict(_SPECIAL_TOKENS)
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        for name in tokens.keys() & config.keys():
            value = config[name]
            tokens[name] = value["content"] if isinstance(value, dict) else value
    return tokens


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token of the vocabulary; raises ValueError when there is none of it."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer's vocabulary lacks its special token {token!r}")
    return int(found)
