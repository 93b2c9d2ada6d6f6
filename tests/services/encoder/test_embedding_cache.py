"""The cache of prompt embeddings: recency, its bound in bytes, and its counters."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from services.encoder.embedding_cache import EmbeddingCache, EmbeddingKey

BYTES = 400  # of one embedding


def key(text: str) -> EmbeddingKey:
    return EmbeddingKey(model="sd15", text=text, clip_skip=1)


def embedding() -> Tensor:
    return torch.zeros(1, 10, 10)


def test_what_was_put_is_got() -> None:
    cache, cat = EmbeddingCache(max_bytes=BYTES), embedding()
    cache.put(key("cat"), cat)
    assert cache.get(key("cat")) is cat
    assert cache.get(key("dog")) is None
    assert cache.get(key("cat")._replace(clip_skip=2)) is None
    assert (cache.hits, cache.misses, cache.bytes) == (1, 2, BYTES)


def test_the_least_recently_used_goes_first() -> None:
    cache = EmbeddingCache(max_bytes=2 * BYTES)
    cache.put(key("cat"), embedding())
    cache.put(key("dog"), embedding())
    cache.get(key("cat"))
    cache.put(key("owl"), embedding())
    assert [cache.get(key(text)) is not None for text in ("cat", "dog", "owl")] == [True, False, True]
    assert (len(cache), cache.bytes) == (2, 2 * BYTES)


def test_putting_again_replaces() -> None:
    cache = EmbeddingCache(max_bytes=2 * BYTES)
    cache.put(key("cat"), embedding())
    cache.put(key("cat"), torch.ones(1, 10, 10))
    assert (len(cache), cache.bytes) == (1, BYTES)


def test_an_entry_larger_than_the_bound_is_not_kept() -> None:
    cache = EmbeddingCache(max_bytes=BYTES - 1)
    cache.put(key("cat"), embedding())
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_row_of_a_batch_does_not_keep_the_batch() -> None:
    cache, batch = EmbeddingCache(max_bytes=BYTES), torch.zeros(8, 10, 10)
    cache.put(key("cat"), batch[:1])
    kept = cache.get(key("cat"))
    assert kept is not None
    assert kept.untyped_storage().nbytes() == BYTES


def test_threads_may_share_it() -> None:
    cache = EmbeddingCache(max_bytes=3 * BYTES)

    def use(number: int) -> None:
        cache.put(key(str(number % 5)), embedding())
        cache.get(key(str(number % 7)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(500)))
    assert (len(cache), cache.bytes, cache.hits + cache.misses) == (3, 3 * BYTES, 500)
