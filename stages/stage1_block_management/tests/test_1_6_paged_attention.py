"""Task 1.6: attention that reads keys and values through block tables, against plain attention over contiguous tensors."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.attention.paged_attention import AttentionMetadata, NaiveBackend, gather_context
from stages.course.fixtures.checks import check_close, check_equal
from stages.course.fixtures.operations import Operations

GARBAGE = (1_000_000, -1, -7)
"""What may stand in a block table where nobody may look: no such block, and the NULL_BLOCK of a sliding window."""


def contiguous_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, soft_cap: float | None = None
) -> Tensor:
    """What attention means, one token and one head at a time, in float64.

    Args:
        q: [Q, H, D], the last Q tokens of the sequence. k, v: [L, H_kv, D], all its tokens in order.
    """
    q, k, v = q.double(), k.double(), v.double()
    output = torch.empty_like(q)
    queries_per_kv_head = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        position = len(k) - len(q) + i
        first = 0 if window is None else max(0, position + 1 - window)
        for head in range(q.shape[1]):
            kv_head = head // queries_per_kv_head
            scores = k[first : position + 1, kv_head] @ q[i, head] * scale  # [tokens that it sees]
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            output[i, head] = scores.softmax(dim=0) @ v[first : position + 1, kv_head]
    return output


@dataclass
class Batch:
    """Sequences whose contexts lie scattered over a KV cache, and what attention over them must give."""

    query: Tensor
    key: Tensor
    value: Tensor
    metadata: AttentionMetadata
    scale: float
    window: int | None
    expected: Tensor
    layer: int = 0
    soft_cap: float | None = None

    def run(self, backend: NaiveBackend | None = None) -> Tensor:
        return (backend or NaiveBackend()).attend(
            self.layer, self.query, self.key, self.value, self.metadata, self.scale, self.window, self.soft_cap
        )


def make_batch(
    query_lens: list[int], context_lens: list[int], *, heads: tuple[int, int] = (4, 2), head_dim: int = 8, block_size: int = 4,
    window: int | None = None, scale: float = 0.35, unread: float = 1e4, dtype: torch.dtype = torch.float32, layers: int = 1,
    seed: int = 0, soft_cap: float | None = None,
) -> Batch:  # fmt: skip
    """A step in which sequence i computes the last query_lens[i] of context_lens[i] tokens.

    Earlier tokens are in the cache already; all slots that hold no visible token hold `unread`, and so do those that
    `attend` has to write. The last of `layers` layers is the one in use.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    needed = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks - 1, generator=generator)  # the last block is nobody's: -1 would read it
    tables = [part.tolist() for part in order[: sum(needed)].split(needed)]
    caches = [torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), unread, dtype=dtype) for _ in range(layers)]
    rows = torch.tensor(GARBAGE).repeat(len(tables), max(needed) + 2)[:, : max(needed) + 2].int()
    queries, keys, values, slots, expected = [], [], [], [], []
    for i, (new, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        q = torch.randn(new, num_heads, head_dim, generator=generator).to(dtype)
        k, v = torch.randn(2, length, num_kv_heads, head_dim, generator=generator).to(dtype)
        earlier = length - new
        left = 0 if window is None else max(0, earlier + 1 - window)  # the first token that anyone still sees
        for position in range(left, earlier):
            block, offset = tables[i][position // block_size], position % block_size
            caches[-1][0, block, offset], caches[-1][1, block, offset] = k[position], v[position]
        kept = slice(left // block_size, needed[i])
        rows[i, kept] = torch.tensor(tables[i][kept]).int()
        slots += [tables[i][position // block_size] * block_size + position % block_size for position in range(earlier, length)]
        queries.append(q)
        keys.append(k[earlier:])
        values.append(v[earlier:])
        expected.append(contiguous_attention(q, k, v, scale, window, soft_cap))
    backend = NaiveBackend()
    metadata = AttentionMetadata(
        kv_caches=caches,
        slot_mapping=torch.tensor(slots),
        block_tables=rows,
        query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).int(),
        context_lens=torch.tensor(context_lens).int(),
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
        backend=backend,
    )
    tokens = torch.cat(queries), torch.cat(keys), torch.cat(values)
    return Batch(*tokens, metadata, scale, window, torch.cat(expected), layers - 1, soft_cap)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(("left", "right"), [(0, 33), (0, 1), (16, 17), (15, 18), (5, 32), (32, 33), (7, 7)])
def test_gather_collects_positions_in_order(block_size: int, left: int, right: int) -> None:
    """gather_context returns the keys and values of positions left..right-1 in order, whatever blocks they lie in.

    Why: everything after it is ordinary attention. The block table is the only thing that knows where position 17 is.
    """
    blocks = -(-33 // block_size)
    table = torch.randperm(blocks + 2, generator=torch.Generator().manual_seed(block_size))[:blocks].int()
    cache = torch.zeros(2, blocks + 2, block_size, 2, 1)
    for position in range(33):
        cache[0, table[position // block_size], position % block_size] = float(position)
        cache[1, table[position // block_size], position % block_size] = float(position) + 100
    key, value = gather_context(cache, table, left, right)
    check_equal(list(key.shape), [right - left, 2, 1], "shape of the keys")
    check_equal(list(value.shape), [right - left, 2, 1], "shape of the values")
    for head in range(2):
        check_equal(key[:, head, 0], [float(p) for p in range(left, right)], f"keys of head {head}, each its own position")
        check_equal(value[:, head, 0], [float(p) + 100 for p in range(left, right)], f"values of head {head}, position + 100")


def test_gather_looks_at_needed_entries_only() -> None:
    """Entries of the block table outside of the asked positions may hold anything, even blocks that do not exist.

    Why: tables are rows of one array that is reused from step to step, so what lies beyond a sequence's end is somebody's
    leftover; and what has left a sliding window is NULL_BLOCK.
    """
    cache = torch.arange(2 * 4 * 2, dtype=torch.float32).view(2, 4, 2, 1, 1)
    table = torch.tensor([-1, 3, 0, 1_000_000, -7], dtype=torch.int32)
    key, value = gather_context(cache, table, 3, 6)
    check_equal(key.flatten(), [7.0, 0.0, 1.0], "keys of positions 3 (block 3, offset 1), 4 and 5 (block 0)")
    check_equal(value.flatten(), [15.0, 8.0, 9.0], "values of the same positions")


def test_gathering_takes_no_more_than_it_gives() -> None:
    """To collect 20 positions of a sequence of 1,600, whose table has 100 blocks of 16, no tensor is made that is larger than
    3 blocks of K and V.

    Why: with a sliding window only the end of a long text is looked at. Whoever collects all of it first copies it in each
    layer of each step.
    """
    cache, table = torch.zeros(2, 120, 16, 1, 2), torch.arange(100)
    with Operations() as operations:
        gather_context(cache, table, 1580, 1600)
    limit = 3 * 2 * 16 * 2
    assert operations.largest <= limit, f"a tensor of {operations.largest} numbers was made; 3 blocks are {limit}"


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_decode(block_size: int) -> None:
    """One new token a sequence, with contexts of 1 token and at and beside multiples of the block size.

    Why: this is what a server computes most of the time: one token for each of many users, all of different lengths.
    """
    lengths = sorted({1, 2, block_size, block_size + 1, 2 * block_size - 1, 2 * block_size, 2 * block_size + 1, 40} - {0})
    batch = make_batch([1] * len(lengths), lengths, block_size=block_size)
    check_close(batch.run(), batch.expected, f"attention with block size {block_size}")


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_whole_prompts(block_size: int) -> None:
    """Prompts computed in one piece: token i sees tokens 0 to i, itself included, and none after it.

    Why: a token that saw the next one would know the answer, and the model has never seen that in training.
    """
    batch = make_batch([1, 2, 15, 16, 17, 33], [1, 2, 15, 16, 17, 33], block_size=block_size)
    check_close(batch.run(), batch.expected, f"attention with block size {block_size}")


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_chunks_with_earlier_context(block_size: int) -> None:
    """A chunk's first token sees all that was computed in earlier steps and itself; its last token sees the whole chunk.

    Why: long prompts are computed in chunks beside other users' tokens. The queries are the last tokens of the context, and
    a mask that starts counting at zero gives them the wrong past.
    """
    batch = make_batch([2, 5, 16, 7, 30], [3, 21, 32, 24, 31], block_size=block_size)
    check_close(batch.run(), batch.expected, f"attention with block size {block_size}")


def test_decodes_chunks_and_prompts_in_one_batch() -> None:
    """All kinds of sequences stand in one flat row of tokens, and each gets its own context.

    Why: that mixture is a normal step of this engine. query_start_loc is the only thing that says whose token is whose.
    """
    batch = make_batch([1, 9, 1, 4, 1, 12], [30, 9, 1, 20, 17, 12])
    check_close(batch.run(), batch.expected, "attention of a mixed batch")


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (6, 3), (8, 1)])
def test_query_heads_share_kv_heads_in_groups(heads: tuple[int, int]) -> None:
    """With H query heads and H_kv KV heads, query head h reads KV head h // (H / H_kv).

    Why: grouped-query attention makes the KV cache several times smaller. With the heads dealt out in turns (h % H_kv) the
    shapes are right as well, and the model talks nonsense.
    """
    batch = make_batch([1, 6, 3], [11, 6, 9], heads=heads)
    check_close(batch.run(), batch.expected, f"attention with {heads[0]} query and {heads[1]} KV heads")


@pytest.mark.parametrize("scale", [1.0, 8**-0.5, 0.05])
def test_scores_are_scaled(scale: float) -> None:
    """Scores are multiplied by `scale` before the softmax.

    Why: usually it is D ** -0.5, but some models use another number, so it comes as an argument.
    """
    batch = make_batch([1, 5], [12, 5], scale=scale)
    check_close(batch.run(), batch.expected, f"attention with scale {scale}")


@pytest.mark.parametrize("scale", [40.0, 4000.0])
def test_large_scores(scale: float) -> None:
    """Scores in the hundreds and ten thousands, of both signs, give the same attention as any others, in decodes and prompts.

    Why: exp of a score above 88 is infinite in float32, and infinite / infinite is no number. So the largest score is taken
    off first, as `softmax` does. And a mask that takes off a thousand hides nothing from such scores.
    """
    batch = make_batch([1, 9, 3], [30, 9, 17], scale=scale)
    check_close(batch.run(), batch.expected, f"attention with scores of up to {scale:g} times some", tolerance=1e-3)


@pytest.mark.parametrize("window", [1, 2, 4, 5, 9, 100])
@pytest.mark.parametrize("block_size", [1, 4])
def test_sliding_window(window: int, block_size: int) -> None:
    """A token sees itself and the window - 1 tokens before it, in decodes, chunks and whole prompts.

    Why: Mistral was trained with a window. With one token too many or too few, the answer drifts slowly instead of failing,
    so nobody notices.
    """
    batch = make_batch([1, 1, 1, 6, 12, 3], [3, 9, 25, 20, 12, 10], window=window, block_size=block_size)
    check_close(batch.run(), batch.expected, f"attention with a window of {window}")


@pytest.mark.parametrize("window", [None, 5])
def test_what_is_not_visible_is_not_read(window: int | None) -> None:
    """Every slot without a visible token holds NaN, and unused table entries name blocks that do not exist.

    Why: the end of a half-filled block holds whatever was there before. Masking a score with -inf does not help: its weight
    is 0, and 0 times NaN is NaN. So what is not visible must not even be read.
    """
    batch = make_batch([1, 1, 7, 3, 1], [1, 6, 7, 18, 29], window=window, unread=float("nan"))
    check_close(batch.run(), batch.expected, "attention in a cache full of NaN")


@pytest.mark.parametrize("reader_first", [False, True])
def test_a_block_written_in_this_step_can_be_read_by_another_sequence(reader_first: bool) -> None:
    """Two sequences with one prompt share its first block in the very step that computes it; both see it.

    Why: a hundred requests with one system prompt arrive at once. They share its blocks immediately, because a step writes
    all its keys and values before it reads any.
    """
    batch = make_batch([8, 3], [8, 7], unread=float("nan"))
    meta = batch.metadata
    meta.block_tables[1, 0] = meta.block_tables[0, 0]  # positions 0 to 3 of both; the reader computes 4 to 6
    k = torch.cat([batch.key[:4], batch.key[8:]])
    v = torch.cat([batch.value[:4], batch.value[8:]])
    batch.expected[8:] = contiguous_attention(batch.query[8:], k, v, batch.scale, None)
    if reader_first:
        order = torch.tensor([8, 9, 10, 0, 1, 2, 3, 4, 5, 6, 7])
        for name in ("query", "key", "value", "expected"):
            setattr(batch, name, getattr(batch, name)[order])
        meta.slot_mapping = meta.slot_mapping[order]
        meta.block_tables, meta.context_lens = meta.block_tables.flip(0), meta.context_lens.flip(0)
        meta.query_start_loc = torch.tensor([0, 3, 11]).int()
    check_close(batch.run(), batch.expected, "attention over a block of this step")


def test_tokens_may_be_slices_of_a_larger_tensor() -> None:
    """Query, key and value that are views into one fused projection give the same attention.

    Why: that is how a model hands them over. They are not contiguous in memory, so a `view` of them fails.
    """
    batch = make_batch([1, 6, 2], [9, 6, 13])
    fused = torch.cat([batch.query, batch.key, batch.value], dim=1)  # [T, four query + two key + two value heads, D]
    batch.query, batch.key, batch.value = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    check_close(batch.run(), batch.expected, "attention of slices")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_cache_is_written(dtype: torch.dtype) -> None:
    """attend changes nothing that it is given but the cache: not the tokens, nor tables, slots, starts and lengths.

    Why: all layers of a step read the same metadata, and in float32 `to(torch.float32)` is the tensor itself and no copy.
    """
    batch = make_batch([1, 6, 2], [9, 6, 13], window=5, dtype=dtype, scale=0.5)
    meta = batch.metadata
    given = {
        "query": batch.query, "key": batch.key, "value": batch.value, "block_tables": meta.block_tables,
        "slot_mapping": meta.slot_mapping, "query_start_loc": meta.query_start_loc, "context_lens": meta.context_lens,
    }  # fmt: skip
    before = {name: tensor.clone() for name, tensor in given.items()}
    batch.run()
    for name, tensor in given.items():
        check_equal(tensor.flatten(), before[name].flatten(), f"{name} after attend")


def test_the_step_leaves_its_keys_and_values_in_the_cache() -> None:
    """After attend the new tokens' keys and values lie in their slots, of this layer only, and nothing else has changed.

    Why: the next step reads them. A layer that writes into another one's cache breaks both.
    """
    batch = make_batch([1, 6], [9, 6], layers=3)
    before = [cache.clone() for cache in batch.metadata.kv_caches]
    batch.run()
    for t, slot in enumerate(batch.metadata.slot_mapping.tolist()):
        before[2][0, slot // 4, slot % 4], before[2][1, slot // 4, slot % 4] = batch.key[t], batch.value[t]
    for layer, (cache, expected) in enumerate(zip(batch.metadata.kv_caches, before, strict=True)):
        check_equal(cache.flatten(), expected.flatten(), f"KV cache of layer {layer}")


def test_each_layer_reads_its_own_cache() -> None:
    """attend(layer, ...) uses the cache of that layer.

    Why: a model has 30 layers or more, each with keys and values of its own.
    """
    batch = make_batch([1, 4, 2], [13, 4, 9], layers=2)
    check_close(batch.run(), batch.expected, "attention in layer 1")


def test_scores_with_a_soft_cap() -> None:
    """With a soft_cap a scaled score x becomes soft_cap · tanh(x / soft_cap); keys that are hidden stay hidden.

    Why: Gemma 2 was trained with capped scores. Without the cap one key drowns all others.
    """
    batch = make_batch([1, 6, 3], [13, 6, 20], window=5, scale=2.0, soft_cap=1.5)
    check_close(batch.run(), batch.expected, "attention with a soft cap")


def test_half_precision_is_computed_in_float32() -> None:
    """For bfloat16 tensors the result is bfloat16 and as exact as bfloat16 can say it, even with large scores.

    Why: scores of 60 rounded to bfloat16 are off by up to an eighth, and their weights by as much. So scores, softmax and
    sums are computed in compute_dtype, float32 unless told otherwise.
    """
    batch = make_batch([1, 20, 3], [150, 20, 90], head_dim=16, scale=4.0, dtype=torch.bfloat16)
    output = batch.run()
    check_equal(output.dtype, torch.bfloat16, "dtype of the output")
    check_close(output.double(), batch.expected, "attention in bfloat16", tolerance=2**-8)


def test_a_mean_of_equal_values_is_that_value() -> None:
    """A prompt of 40 tokens in bfloat16, whose keys are zeros and whose values are 127/64: each output is 127/64.

    Why: a weight of 1/15 rounded to bfloat16 is off by a third of a percent, and so is the sum of fifteen. Only the result is
    rounded to the type of the query.
    """
    batch = make_batch([40], [40], dtype=torch.bfloat16)
    batch.key.zero_()
    batch.value.fill_(127 / 64)
    check_equal(batch.run(), torch.full_like(batch.query, 127 / 64), "means of 1 to 40 values of 127/64")


def test_compute_dtype_can_be_float64() -> None:
    """NaiveBackend(torch.float64) agrees with the definition to twelve digits.

    Why: later you will test fast backends against this one. An oracle must be more exact than what it judges.
    """
    batch = make_batch([1, 7, 5], [20, 7, 16], window=6, dtype=torch.float64)
    check_close(batch.run(NaiveBackend(torch.float64)), batch.expected, "attention in float64", tolerance=1e-12)
    batch = make_batch([1, 7, 5], [20, 7, 16])
    output = batch.run(NaiveBackend(torch.float64))
    check_equal(output.dtype, torch.float32, "dtype of the output for float32 queries")
    check_close(output, batch.expected, "attention in float64, of float32 tensors", tolerance=2**-23)


@settings(
    max_examples=25, derandomize=True, deadline=None, database=None, report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
@given(
    lens=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 3, 16]),
    window=st.sampled_from([None, 1, 3, 8]),
    seed=st.integers(0, 9),
)
def test_any_batch_in_any_blocks(lens: list[tuple[int, int]], block_size: int, window: int | None, seed: int) -> None:
    """Random batches of new tokens after random contexts, in shuffled blocks, with and without a window.

    Why: batches of a server are put together by chance. If this one alone fails, look at the small case that it prints.
    """
    query_lens, context_lens = [new for new, _ in lens], [new + earlier for new, earlier in lens]
    batch = make_batch(query_lens, context_lens, block_size=block_size, window=window, seed=seed, unread=float("nan"))
    check_close(batch.run(), batch.expected, "attention of a random batch")
