"""T5's tokenizer: a prompt to the ids of its pieces of words, and a report of what did not fit.

Paper: Kudo 2018, "Subword Regularization", https://arxiv.org/abs/1804.10959 (the unigram model of SentencePiece).
"""

from pathlib import Path

from tokenizers import Tokenizer

from services.encoder.tokenization import TokenizedPrompt, token_id

_END, _PAD = "</s>", "<pad>"


class T5Tokenizer:
    """Pieces of words and an end of text, padded to `length`; case and punctuation count."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self._tokenizer = tokenizer
        self.length = length
        self.vocabulary_size: int = tokenizer.get_vocab_size()
        self._end, self._pad = (token_id(tokenizer, token) for token in (_END, _PAD))

    def __call__(self, prompt: str) -> TokenizedPrompt:
        """Token ids of `prompt`. Of a prompt too long, the beginning is kept; the end of text stays last."""
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        kept = min(len(encoding.ids), self.length - 1)
        ids = [*encoding.ids[:kept], self._end]
        padding = [self._pad] * (self.length - len(ids))
        cut_off = prompt[encoding.offsets[kept][0] :] if kept < len(encoding.ids) else ""
        return TokenizedPrompt(tuple(ids + padding), len(encoding.ids), kept, cut_off, special_tokens=1)


def load_t5_tokenizer(folder: Path, length: int) -> T5Tokenizer:
    """The tokenizer of a diffusers folder's `tokenizer_2/`, which holds tokenizer.json.

    Raises FileNotFoundError when there is none.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"no T5 tokenizer in {folder}: it needs tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return T5Tokenizer(tokenizer, length)
