"""Sizing, copying and swapping of KV blocks, against plain Python lists of blocks."""

from __future__ import annotations

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solutions.memory.cache_engine import CacheEngine, block_bytes, num_blocks_for_budget

LAYERS, BLOCKS, HOST_BLOCKS = 3, 8, 5


def filled_engine(dtype: torch.dtype = torch.float32) -> CacheEngine:
    """An engine whose every number differs from every other."""
    engine = CacheEngine(LAYERS, BLOCKS, 2, 2, 4, dtype, "cpu", num_host_blocks=HOST_BLOCKS)
    for i, cache in enumerate([*engine.kv_caches, *engine.host_caches]):
        cache.copy_(torch.arange(cache.numel()).view_as(cache) + 1000 * i)
    return engine


def as_lists(caches: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """[layer][block], each a [2, block_size, H_kv, D] tensor of its own."""
    return [[cache[:, b].clone() for b in range(cache.shape[1])] for cache in caches]


def assert_equal(caches: list[torch.Tensor], blocks: list[list[torch.Tensor]]) -> None:
    for cache, expected in zip(caches, blocks, strict=True):
        assert torch.equal(cache, torch.stack(expected, dim=1))


def apply(source: list[list], target: list[list], pairs: list[tuple[int, int]]) -> list[list]:
    """What `target` becomes when all of `pairs` are copied at once."""
    result = [list(layer) for layer in target]
    for source_layer, result_layer in zip(source, result, strict=True):
        for a, b in pairs:
            result_layer[b] = source_layer[a]
    return result


def test_block_bytes() -> None:
    # SmolLM2-135M in bfloat16: 30 layers x (K and V) x 16 tokens x 3 heads x 64 x 2 bytes
    assert block_bytes(30, 16, 3, 64, torch.bfloat16) == 368_640
    # LLaMA-7B: 512 KiB a token
    assert block_bytes(32, 1, 32, 128, torch.float16) == 512 * 1024
    assert block_bytes(2, 4, 1, 8, torch.float32) == 2 * 2 * 4 * 8 * 4


def test_block_bytes_is_what_is_allocated() -> None:
    engine = CacheEngine(3, 7, 16, 2, 8, torch.bfloat16, "cpu", num_host_blocks=4)
    assert sum(cache.nbytes for cache in engine.kv_caches) == 7 * block_bytes(3, 16, 2, 8, torch.bfloat16)
    assert sum(cache.nbytes for cache in engine.host_caches) == 4 * block_bytes(3, 16, 2, 8, torch.bfloat16)
    assert [tuple(cache.shape) for cache in engine.kv_caches] == [(2, 7, 16, 2, 8)] * 3


@pytest.mark.parametrize(("budget", "blocks"), [(0, 0), (511, 0), (512, 1), (1023, 1), (1024, 2), (-1, 0)])
def test_num_blocks_for_budget(budget: int, blocks: int) -> None:
    assert num_blocks_for_budget(budget, block_bytes(2, 4, 1, 8, torch.float32)) == blocks


def test_memory_is_committed_when_it_is_used() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    engine = CacheEngine(2, 4096, 16, 4, 64, torch.float32, "cpu", num_host_blocks=4096)
    caches = [*engine.kv_caches, *engine.host_caches]
    assert sum(cache.nbytes for cache in caches) == 512 << 20
    assert process.memory_info().rss - before < 64 << 20
    for cache in caches:
        assert not cache[:, ::500].any()
        cache[1, 7] = 1
        assert cache.sum() == cache[1, 7].numel()


def test_no_blocks() -> None:
    with pytest.raises(ValueError, match="at least one block, got 0"):
        CacheEngine(1, 0, 16, 1, 8, torch.float32, "cpu")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_copies_and_swaps(data: st.DataObject, dtype: torch.dtype) -> None:
    """Also chains such as 0 -> 1, 1 -> 2: block 2 gets what block 1 held before."""
    engine = filled_engine(dtype)
    device, host = as_lists(engine.kv_caches), as_lists(engine.host_caches)

    def pairs(sources: int, targets: int) -> st.SearchStrategy:
        block = st.integers(0, sources - 1), st.integers(0, targets - 1)
        return st.lists(st.tuples(*block), max_size=targets, unique_by=lambda pair: pair[1])

    copies = data.draw(pairs(BLOCKS, BLOCKS), "copies")
    engine.copy_blocks(copies)
    device = apply(device, device, copies)
    out = data.draw(pairs(BLOCKS, HOST_BLOCKS), "swap out")
    engine.swap_out(out)
    host = apply(device, host, out)
    back = data.draw(pairs(HOST_BLOCKS, BLOCKS), "swap in")
    engine.swap_in(back)
    device = apply(host, device, back)
    assert_equal(engine.kv_caches, device)
    assert_equal(engine.host_caches, host)


def test_swapped_blocks_come_back_unchanged_to_other_places() -> None:
    engine = filled_engine()
    before = as_lists(engine.kv_caches)
    engine.swap_out([(1, 4), (6, 0)])
    for cache in engine.kv_caches:
        cache.zero_()
    engine.swap_in([(4, 7), (0, 2)])
    for cache, blocks in zip(engine.kv_caches, before, strict=True):
        assert torch.equal(cache[:, 7], blocks[1])
        assert torch.equal(cache[:, 2], blocks[6])
        assert not cache[:, [0, 1, 3, 4, 5, 6]].any()


@pytest.mark.parametrize(
    ("method", "pairs", "error", "message"),
    [
        ("copy_blocks", [(0, BLOCKS)], IndexError, "no KV block 8, only 0 to 7"),
        ("copy_blocks", [(-1, 0)], IndexError, "no KV block -1"),
        ("copy_blocks", [(0, 2), (1, 2)], ValueError, "destination of two copies"),
        ("swap_out", [(0, HOST_BLOCKS)], IndexError, "no KV block 5, only 0 to 4"),
        ("swap_in", [(HOST_BLOCKS, 0)], IndexError, "no KV block 5, only 0 to 4"),
    ],
)
def test_wrong_blocks_change_nothing(method: str, pairs: list, error: type[Exception], message: str) -> None:
    engine = filled_engine()
    device, host = as_lists(engine.kv_caches), as_lists(engine.host_caches)
    with pytest.raises(error, match=message):
        getattr(engine, method)(pairs)
    assert_equal(engine.kv_caches, device)
    assert_equal(engine.host_caches, host)


def test_swapping_without_host_blocks() -> None:
    engine = CacheEngine(1, 2, 4, 1, 8, torch.float32, "cpu")
    engine.swap_out([])
    with pytest.raises(IndexError, match="no host KV blocks"):
        engine.swap_out([(0, 0)])
