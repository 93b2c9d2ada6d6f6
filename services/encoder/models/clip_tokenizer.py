"""Which tokenizer a model of CLIP's has."""

from __future__ import annotations

from pathlib import Path

from safelight.errors import CheckpointError
from services.common.manifest import ModelEntry
from services.encoder.tokenization import ClipTokenizer, load_clip_tokenizer

_CLIP_TOKENIZER = Path(__file__).resolve().parents[1] / "tokenizers" / "clip"


def load_model_tokenizer(entry: ModelEntry, length: int, vocabulary_size: int) -> ClipTokenizer:
    """The tokenizer that the manifest names, the model folder's own, or CLIP's usual one.

    Args:
        entry: the model.
        length: positions of its text model.
        vocabulary_size: tokens that its text model knows.

    Raises:
        CheckpointError: it is missing, damaged or of more tokens than the text model knows.
    """
    own = entry.paths[0] / "tokenizer"
    folder = Path(entry.tokenizer) if entry.tokenizer else own if own.is_dir() else _CLIP_TOKENIZER
    try:
        tokenizer = load_clip_tokenizer(folder, length)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"model {entry.name!r}: {error}") from error
    if tokenizer.vocabulary_size > vocabulary_size:
        raise CheckpointError(
            f"model {entry.name!r}: the tokenizer in {folder} has {tokenizer.vocabulary_size} tokens, the text model "
            f"{vocabulary_size}: name the model's own with 'tokenizer:' in the manifest"
        )
    return tokenizer
