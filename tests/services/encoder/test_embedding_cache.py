"""The cache of prompt embeddings: recency, and its bound in bytes."""

import torch
from torch import Tensor

from services.encoder.embedding_cache import EmbeddingCache, EmbeddingKey

BYTES = 400  # of one prompt's tensors


def key(*token_ids: int) -> EmbeddingKey:
    return EmbeddingKey(model="sd15", token_ids=token_ids, clip_skip=1, alone=False)


def embeds() -> dict[str, Tensor]:
    return {"prompt_embeds": torch.zeros(1, 5, 10), "pooled": torch.zeros(50)}


def test_what_was_put_is_got() -> None:
    cache, cat = EmbeddingCache(max_bytes=BYTES), embeds()
    cache.put(key(1, 2), cat)
    found = cache.get(key(1, 2))
    assert found is not None
    assert found["prompt_embeds"] is cat["prompt_embeds"]
    assert cache.get(key(1)) is None
    assert cache.get(key(1, 2)._replace(clip_skip=2)) is None
    assert cache.bytes == BYTES


def test_the_least_recently_used_goes_first() -> None:
    cache = EmbeddingCache(max_bytes=2 * BYTES)
    cache.put(key(1), embeds())
    cache.put(key(2), embeds())
    cache.get(key(1))
    cache.put(key(3), embeds())
    assert [cache.get(key(number)) is not None for number in (1, 2, 3)] == [True, False, True]
    assert (len(cache), cache.bytes) == (2, 2 * BYTES)


def test_putting_again_replaces() -> None:
    cache = EmbeddingCache(max_bytes=2 * BYTES)
    cache.put(key(1), embeds())
    cache.put(key(1), {"prompt_embeds": torch.ones(1, 5, 10)})
    assert (len(cache), cache.bytes) == (1, BYTES // 2)


def test_an_entry_larger_than_the_bound_is_not_kept() -> None:
    cache = EmbeddingCache(max_bytes=BYTES - 1)
    cache.put(key(1), embeds())
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_row_of_a_batch_does_not_keep_the_batch() -> None:
    cache, batch = EmbeddingCache(max_bytes=BYTES), torch.zeros(8, 10, 10)
    cache.put(key(1), {"prompt_embeds": batch[:1]})
    found = cache.get(key(1))
    assert found is not None
    assert found["prompt_embeds"].untyped_storage().nbytes() == BYTES
