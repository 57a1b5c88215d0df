"""Task 1.5: the tensors behind the block ids. How many blocks a budget buys, storing keys and values, copying blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.operations import Operations
from stages.memory.cache_engine import CacheEngine, block_bytes, move_blocks, num_blocks_for_budget, write_kv

KIB, GIB = 1024, 1024**3
LLAMA_7B = {"num_layers": 32, "num_kv_heads": 32, "head_dim": 128, "dtype": torch.float16}


def caches(num_blocks: int, layers: int = 2, start: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """For each layer [2, num_blocks, block_size 2, H_kv 1, D 2], in which no two numbers are equal."""
    size = 2 * num_blocks * 2 * 1 * 2
    return [
        torch.arange(start + i * size, start + (i + 1) * size, dtype=dtype).view(2, num_blocks, 2, 1, 2) for i in range(layers)
    ]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def check_blocks_are(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Compare caches block by block, so that a failure names layer, half and block."""
    for layer, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for half, name in enumerate(("keys", "values")):
            for block in range(theirs.shape[1]):
                where = f"{name} of block {block} in layer {layer}"
                check_equal(ours[half, block].flatten(), theirs[half, block].flatten(), where)


def test_a_token_of_llama_7b_takes_512_kib() -> None:
    """For LLaMA-7B in half precision a block of one token takes 512 KiB, one of 16 tokens 8 MiB.

    Why: this number decides how many users a card can serve. 2 (K and V) x 32 layers x 32 heads x 128 numbers x 2 bytes for
    each token: a chat of 2,000 tokens holds a gigabyte.
    """
    check_equal(block_bytes(block_size=1, **LLAMA_7B), 512 * KIB, "bytes of a block of 1 token")
    check_equal(block_bytes(block_size=16, **LLAMA_7B), 8 * KIB * KIB, "bytes of a block of 16 tokens")


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [((30, 16, 3, 64), torch.bfloat16, 368_640), ((32, 16, 8, 128), torch.bfloat16, 2_097_152),
     ((3, 5, 7, 11), torch.float32, 9_240), ((1, 1, 1, 1), torch.float32, 8), ((1, 1, 1, 1), torch.float8_e4m3fn, 2),
     ((30, 16, 3, 64), torch.int8, 184_320), ((3, 5, 7, 11), torch.float64, 18_480)],
)  # fmt: skip
def test_bytes_of_a_block(shape: tuple[int, int, int, int], dtype: torch.dtype, expected: int) -> None:
    """Layers, block size, KV heads, head size and bytes of a number all count, and K and V make it twice as much.

    Why: models differ in all of them. SmolLM2-135M has 3 KV heads, and Mistral-7B with 8 instead of 32 needs a quarter of what
    LLaMA-7B does.
    """
    layers, block_size, heads, dim = shape
    check_equal(block_bytes(layers, block_size, heads, dim, dtype), expected, f"bytes of a block for {shape}")


def test_bytes_of_a_block_are_what_the_engine_reserves() -> None:
    """The tensors of a CacheEngine with 7 blocks take 7 times block_bytes.

    Why: the budget is planned with this number before anything is reserved. If the two disagree, the server dies of memory
    under load and not at its start.
    """
    expected = block_bytes(3, 16, 2, 8, torch.bfloat16)
    engine = CacheEngine(3, 7, 16, 2, 8, torch.bfloat16, "cpu")
    check_equal(sum(cache.nbytes for cache in engine.kv_caches), 7 * expected, "bytes of 7 blocks")


@pytest.mark.parametrize(
    ("budget", "blocks"),
    [
        (0, 0),
        (1, 0),
        (511, 0),
        (512, 1),
        (513, 1),
        (1023, 1),
        (1024, 2),
        (1025, 2),
        (51_200, 100),
        (-1, 0),
        (-512, 0),
        (-5000, 0),
    ],
)
def test_whole_blocks_within_the_budget(budget: int, blocks: int) -> None:
    """With blocks of 512 bytes, 1,023 bytes buy one and 1,024 two; a budget that is used up buys none, never fewer.

    Why: the budget is what weights and activations leave over. That can be negative, and then the engine must say that nothing
    fits instead of reserving a negative size.
    """
    actual = num_blocks_for_budget(budget, 512)
    check_equal(actual, blocks, f"blocks for {budget} bytes")
    check_equal(type(actual), int, "type of the result")


def test_the_budget_of_a_real_card() -> None:
    """24 GiB of KV memory hold 3,072 blocks of LLaMA-7B, which are 49,152 tokens; one byte less, one block less.

    Why: that is 24 users with 2,048 tokens each. The rest of the engine is about filling exactly these blocks.
    """
    size = block_bytes(block_size=16, **LLAMA_7B)
    check_equal(num_blocks_for_budget(24 * GIB, size), 3072, "blocks in 24 GiB")
    check_equal(num_blocks_for_budget(24 * GIB - 1, size), 3071, "blocks in one byte less")


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_keys_and_values_go_to_their_slots(block_size: int) -> None:
    """Token t lies in block slot // block_size at offset slot % block_size afterwards, K in the first half and V in the second.

    Why: attention finds a token by its block and offset only. Slots come in any order, because blocks do.
    """
    cache = torch.full((2, 12 // block_size, block_size, 2, 3), -1.0)
    before = cache.data_ptr()
    slots = [7, 0, 11, 3, 4]
    key = torch.arange(5 * 2 * 3, dtype=torch.float32).view(5, 2, 3)
    value = key + 100
    write_kv(key, value, cache, torch.tensor(slots))
    check_equal(cache.data_ptr(), before, "address of the cache")
    for t, slot in enumerate(slots):
        block, offset = slot // block_size, slot % block_size
        check_equal(cache[0, block, offset].flatten(), key[t].flatten(), f"key of token {t} in slot {slot}")
        check_equal(cache[1, block, offset].flatten(), value[t].flatten(), f"value of token {t} in slot {slot}")


def test_all_other_slots_stay_as_they_were() -> None:
    """Writing some slots leaves every other slot of the same blocks and of other blocks alone.

    Why: the neighbours in a block are earlier tokens of the same sequence, and the other blocks belong to other users.
    """
    (cache,) = caches(4, layers=1)
    expected = cache.clone()
    key, value = torch.full((2, 2, 1, 2), -1.0), torch.full((2, 1, 2), -2.0)
    write_kv(key[0], value, cache, torch.tensor([5, 2]))
    for block, offset in ((2, 1), (1, 0)):
        expected[0, block, offset], expected[1, block, offset] = -1.0, -2.0
    check_blocks_are([cache], [expected])


def test_keys_may_be_slices_of_a_larger_tensor() -> None:
    """Keys and values that are views into one fused projection, in half precision, are stored correctly.

    Why: models compute query, key and value in one matrix product and hand over slices, which are not contiguous in memory.
    """
    fused = torch.arange(3 * 5 * 4, dtype=torch.bfloat16).view(3, 5, 4)  # [T, one query + two key + two value heads, D]
    key, value = fused[:, 1:3], fused[:, 3:]
    assert not key.is_contiguous()
    cache = torch.zeros(2, 2, 2, 2, 4, dtype=torch.bfloat16)
    write_kv(key, value, cache, torch.tensor([3, 0, 1]))
    for t, slot in enumerate((3, 0, 1)):
        check_equal(cache[0, slot // 2, slot % 2].flatten(), fused[t, 1:3].flatten(), f"key in slot {slot}")
        check_equal(cache[1, slot // 2, slot % 2].flatten(), fused[t, 3:].flatten(), f"value in slot {slot}")


def test_a_cache_may_be_a_slice_of_a_larger_tensor() -> None:
    """The caches of three layers are slices of one tensor [2, num_blocks, block_size, layer, H_kv, D]. What is stored in the
    second one is in that tensor afterwards, and in no other layer.

    Why: a slice is not contiguous. Whoever makes it so, or reshapes it into a copy, writes into the copy, and the cache stays
    empty.
    """
    whole = torch.zeros(2, 3, 2, 3, 1, 2)
    key = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 1, 2)
    write_kv(key, key + 10, whole[:, :, :, 1], torch.tensor([5, 0]))
    expected = torch.zeros(2, 6, 3, 2)
    expected[0, [5, 0], 1], expected[1, [5, 0], 1] = key[:, 0], key[:, 0] + 10
    check_equal(whole.flatten(), expected.flatten(), "keys, then values, of three layers by slot")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16])
def test_caches_of_every_type(dtype: torch.dtype) -> None:
    """Storing and copying work for every type that a cache may have, whole numbers as well.

    Why: `--kv-cache-dtype int8` halves the cache again. What computes with the numbers on the way, or asks for the precision of
    a float, fails there or changes them.
    """
    cache = torch.zeros(2, 3, 2, 1, 2).to(dtype)
    key = torch.tensor([[-3.0, 2.0], [4.0, -5.0]]).view(2, 1, 2).to(dtype)
    value = torch.tensor([[6.0, 7.0], [-8.0, 1.0]]).view(2, 1, 2).to(dtype)
    write_kv(key, value, cache, torch.tensor([4, 1]))
    move_blocks([cache], [cache], [(2, 0), (0, 2)])
    check_equal(cache.dtype, dtype, "type of the cache")
    expected = torch.zeros(2, 6, 2)
    expected[0, 0], expected[0, 5], expected[1, 0], expected[1, 5] = (
        torch.tensor(numbers) for numbers in ([-3.0, 2.0], [4.0, -5.0], [6.0, 7.0], [-8.0, 1.0])
    )
    check_equal(cache.float().flatten(), expected.flatten(), "keys, then values, by slot, when blocks 0 and 2 changed places")


def test_writing_takes_as_many_operations_for_many_tokens_as_for_few() -> None:
    """write_kv asks as much of PyTorch for 64 tokens as for 2.

    Why: a loop over the tokens is right, and a hundred times slower; it runs in each layer of each step.
    """
    counts = []
    for tokens in (2, 64):
        (cache,) = caches(40, layers=1)
        key = torch.zeros(tokens, 1, 2)
        with Operations() as operations:
            write_kv(key, key, cache, torch.arange(tokens))
        counts.append(operations.count)
    check_equal(counts[1], counts[0], "operations for 64 tokens, expected as many as for 2")


def test_writing_leaves_its_arguments_alone() -> None:
    """write_kv changes nothing but the cache.

    Why: all layers of a step are given one and the same slot mapping. Computed in place, it sends every layer but the first
    to other slots.
    """
    (cache,) = caches(4, layers=1)
    key, slots = torch.full((3, 1, 2), -1.0), torch.tensor([5, 2, 7])
    value = key * 2
    write_kv(key, value, cache, slots)
    check_equal(slots, [5, 2, 7], "slot mapping")
    check_equal(key.flatten(), [-1.0] * 6, "keys")
    check_equal(value.flatten(), [-2.0] * 6, "values")


def test_blocks_are_copied_in_every_layer() -> None:
    """move_blocks copies keys and values of whole blocks in all layers and touches nothing else.

    Why: this is the copy of copy-on-write. A layer left out would answer from zeros, and only the text would show it.
    """
    memory = caches(5, layers=3)
    expected = clones(memory)
    for layer in expected:
        layer[:, 4], layer[:, 0] = layer[:, 1].clone(), layer[:, 2].clone()
    move_blocks(memory, memory, [(1, 4), (2, 0)])
    check_blocks_are(memory, expected)


@pytest.mark.parametrize(
    "pairs", [[(0, 1), (1, 0)], [(0, 1), (1, 2), (2, 3)], [(2, 3), (1, 2), (0, 1)], [(3, 0), (3, 1), (3, 3)]]
)
def test_all_sources_are_read_before_any_block_is_written(pairs: list[tuple[int, int]]) -> None:
    """Two blocks can change places, and in a chain 0 to 1, 1 to 2 block 2 gets what block 1 held before.

    Why: within a step a block may be freed, given to somebody else as the destination of a copy, and be a source as well. One
    pair after the other would copy what was just overwritten.
    """
    memory = caches(4)
    before, expected = clones(memory), clones(memory)
    for layer, old in zip(expected, before, strict=True):
        for source, target in pairs:
            layer[:, target] = old[:, source]
    move_blocks(memory, memory, pairs)
    check_blocks_are(memory, expected)


@pytest.mark.parametrize(
    ("pairs", "error"),
    [([(0, 2), (1, 2)], ValueError), ([(0, 3), (1, 1), (0, 3)], ValueError), ([(4, 0)], IndexError), ([(0, 5)], IndexError),
     ([(-1, 0)], IndexError), ([(0, -1)], IndexError), ([(0, 1), (2, 5)], IndexError)],
)  # fmt: skip
def test_impossible_copies_change_nothing(pairs: list[tuple[int, int]], error: type[Exception]) -> None:
    """A block that is the destination twice is a ValueError, a block that does not exist an IndexError; nothing is copied then.

    Why: -1 is what NULL_BLOCK looks like and PyTorch may take it for the last block; on a GPU an index too large ends the whole
    process. Both must be caught here, where the pairs can still be seen.
    """
    source, target = caches(4), caches(5, start=1000)
    before = clones(target)
    with pytest.raises(error):
        move_blocks(source, target, pairs)
    check_blocks_are(target, before)


def test_copying_takes_no_second_cache() -> None:
    """For 3 of 200 blocks no tensor comes to be that is larger than those 3 blocks in all layers.

    Why: the cache is the memory of the card. Whoever clones it to be safe runs out of memory with the first copy.
    """
    memory, host = caches(200), caches(100)
    for source, target in ((memory, memory), (memory, host), (host, memory)):
        with Operations() as operations:
            move_blocks(source, target, [(1, 2), (2, 1), (7, 9)])
        limit = 3 * 2 * memory[0][:, 0].numel()
        assert operations.largest <= limit, f"a tensor of {operations.largest} numbers was made; 3 blocks are {limit}"


def test_moving_leaves_its_pairs_and_sources_alone() -> None:
    """move_blocks changes its targets only: neither the list of pairs, in any order, nor what it copies from.

    Why: the pairs are part of the step's decision, which others read after this.
    """
    device, host = caches(5), caches(5, start=1000)
    before, pairs = clones(device), [(4, 1), (0, 3), (2, 0)]
    move_blocks(device, host, pairs)
    check_equal(pairs, [(4, 1), (0, 3), (2, 0)], "pairs after the call")
    check_blocks_are(device, before)


def test_a_block_may_keep_its_number_on_the_way() -> None:
    """A pair (2, 2) from the device to the host is a copy like any other.

    Why: the two memories count their blocks alike. Only within one memory is such a pair nothing to do.
    """
    device, host = caches(4), caches(4, start=1000)
    move_blocks(device, host, [(2, 2), (0, 1)])
    for layer, (ours, theirs) in enumerate(zip(host, device, strict=True)):
        check_equal(ours[:, 2].flatten(), theirs[:, 2].flatten(), f"block 2 of the host in layer {layer}")
        check_equal(ours[:, 1].flatten(), theirs[:, 0].flatten(), f"block 1 of the host in layer {layer}")


def test_a_long_sequence_moves_in_one_go() -> None:
    """300 blocks are copied in one call, in reverse order.

    Why: a preempted sequence of 4,800 tokens is swapped out as a whole, and each block has to arrive where its table says.
    """
    memory, host = caches(300), caches(300, start=10_000)
    expected = [layer.flip(1) for layer in memory]
    move_blocks(memory, host, [(block, 299 - block) for block in range(300)])
    check_blocks_are(host, expected)


def test_sizes_of_source_and_target_may_differ() -> None:
    """Block 4 of a device with 5 blocks goes to block 1 of a host with 2, and the ids are checked against each one's own size.

    Why: host memory and device memory are different tensors with different numbers of blocks.
    """
    device, host = caches(5), caches(2, start=1000)
    expected = clones(host)
    for layer, blocks in zip(expected, device, strict=True):
        layer[:, 1] = blocks[:, 4]
    kept = clones(device)
    move_blocks(device, host, [(4, 1)])
    check_blocks_are(host, expected)
    check_blocks_are(device, kept)
    move_blocks(host, device, [(1, 3)])
    for layer in kept:
        layer[:, 3] = layer[:, 4]
    check_blocks_are(device, kept)


def test_no_pairs_is_no_work() -> None:
    """An empty list of pairs does nothing, even when there is no host memory at all.

    Why: most steps copy nothing, and most servers run without swapping. Neither may fail.
    """
    memory = caches(3)
    before = clones(memory)
    move_blocks(memory, memory, [])
    move_blocks(memory, [], [])
    move_blocks([], memory, [])
    check_blocks_are(memory, before)


def test_a_sequence_returns_from_the_host_unchanged() -> None:
    """Blocks swapped out, overwritten on the device and swapped in elsewhere hold the keys and values they held before.

    Why: a preempted request must go on as if nothing had happened, to the last bit.
    """
    engine = CacheEngine(2, 6, 4, 2, 8, torch.bfloat16, "cpu", num_host_blocks=3)
    generator = torch.Generator().manual_seed(0)
    for cache in engine.kv_caches:
        cache.copy_(torch.randn(cache.shape, generator=generator))
    before = clones(engine.kv_caches)
    engine.swap_out([(1, 2), (4, 0)])
    for cache in engine.kv_caches:
        cache.fill_(float("nan"))
    engine.swap_in([(2, 5), (0, 1)])
    for layer, (cache, old) in enumerate(zip(engine.kv_caches, before, strict=True)):
        check_equal(cache[:, 5].flatten(), old[:, 1].flatten(), f"block 1, now block 5, in layer {layer}")
        check_equal(cache[:, 1].flatten(), old[:, 4].flatten(), f"block 4, now block 1, in layer {layer}")


@settings(
    max_examples=40, derandomize=True, deadline=None, database=None, report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6, unique_by=lambda pair: pair[1]))
def test_any_copies_agree_with_plain_lists(pairs: list[tuple[int, int]]) -> None:
    """Random pairs, in a model of one layer, give what copying Python lists of blocks gives.

    Why: which blocks are copied together depends on who forks, grows and leaves in one step, and that can be anything.
    """
    memory = caches(6, layers=1)
    before = [list(layer.clone().unbind(1)) for layer in memory]
    after = [list(blocks) for blocks in before]
    for old, new in zip(before, after, strict=True):
        for source, target in pairs:
            new[target] = old[source]
    move_blocks(memory, memory, pairs)
    check_blocks_are(memory, [torch.stack(blocks, dim=1) for blocks in after])
