"""Trains the demo model's tokenizer: byte-level BPE in CLIP's file format, from the captions.

CLIP's conventions are kept exactly: lower case, `</w>` at the end of a word, ids in the order bytes, bytes with `</w>`,
merges, `<|startoftext|>`, `<|endoftext|>`. All 512 byte tokens are there, so any prompt can be encoded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex

MERGES = 2400
END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")

Word = tuple[str, ...]
Pair = tuple[str, str]


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for every byte, in CLIP's order: printable bytes first, then the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]


def byte_to_symbol() -> dict[int, str]:
    """Maps a byte to its stand-in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return dict(zip([*printable, *rest], byte_alphabet(), strict=True))


def count_words(captions: Iterable[str]) -> Counter[Word]:
    """Splits captions as CLIP does and counts each word as its tuple of symbols."""
    symbols = byte_to_symbol()
    counts: Counter[Word] = Counter()
    for caption in captions:
        for word in WORD_PATTERN.findall(caption.lower()):
            letters = [symbols[byte] for byte in word.encode("utf-8")]
            counts[(*letters[:-1], letters[-1] + END_OF_WORD)] += 1
    return counts


def merge_pair(word: Word, pair: Pair) -> Word:
    """Replaces every occurrence of `pair` in `word`, left to right."""
    merged, index = [], 0
    while index < len(word):
        if word[index : index + 2] == pair:
            merged.append(pair[0] + pair[1])
            index += 2
        else:
            merged.append(word[index])
            index += 1
    return tuple(merged)


def learn_merges(counts: Counter[Word], limit: int) -> list[Pair]:
    """Greedy byte-pair encoding; ties go to the alphabetically first pair, so the result is reproducible."""
    merges: list[Pair] = []
    while len(merges) < limit:
        pairs: Counter[Pair] = Counter()
        for word, count in counts.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        remapped: Counter[Word] = Counter()
        for word, count in counts.items():
            remapped[merge_pair(word, best)] += count
        counts = remapped
    return merges


def save_tokenizer(folder: Path, captions: Iterable[str], max_length: int, merge_limit: int = MERGES) -> int:
    """Trains on `captions`, writes the four files CLIPTokenizer reads and returns the size of the vocabulary."""
    merges = learn_merges(count_words(captions), merge_limit)
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(symbol + END_OF_WORD for symbol in alphabet), *(a + b for a, b in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    return len(vocabulary)
