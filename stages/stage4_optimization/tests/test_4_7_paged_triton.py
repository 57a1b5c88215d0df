"""Task 4.7: attention over blocks in one pass, in Triton; compiled where there is a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; there is one for Linux: pip install triton")
from stages.attention.paged_attention import AttentionMetadata
from stages.attention.paged_attention_triton import Config, TritonBackend
from stages.attention.paged_kernels_triton import gather, merge_splits, visit_keys
from stages.core.platform.triton_mode import tl, triton
from stages.course.fixtures.checks import check_close
from stages.course.fixtures.kernels import DEVICE, contained, guarded
from stages.tests.attention_cases import AttentionCase, make_case, quantize_int8

TILE = Config(16, 16, 1, 1)
"""Sixteen rows and sixteen keys at a time: small contexts have several tiles."""


def attend(case: AttentionCase, splits: int = 1, config: Config = TILE) -> Tensor:
    backend = TritonBackend(num_splits=splits, config=config)
    return contained(lambda: case.run(backend), *case.query.shape, device=DEVICE).double()


def expected(case: AttentionCase) -> Tensor:
    return case.expected().cpu()


@triton.jit
def gathering(cache, at, out, count, N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    n = tl.arange(0, N)
    vectors = gather(cache, tl.load(at + n), n < count, D, D_PADDED, tl.float32)
    tl.store(out + n[:, None] * D_PADDED + tl.arange(0, D_PADDED)[None, :], vectors)


def gathered(cache: Tensor, at: list[int], count: int) -> Tensor:
    """[len(at), 8], of vectors of 6."""
    out = torch.full((len(at), 8), torch.nan, device=DEVICE)
    cache = cache.to(DEVICE)

    def compute() -> Tensor:
        gathering[(1,)](cache, torch.tensor(at, device=DEVICE), out, count, N=len(at), D=6, D_PADDED=8)
        return out

    return contained(compute, len(at), 8, device=DEVICE)


def test_vectors_are_gathered_by_their_number() -> None:
    """Vector number n begins at n * D, in whatever order they are asked for; the padding up to a power of two is 0.

    Why: this is all that a block table comes down to in a kernel. What pads a vector is multiplied and added like the rest.
    """
    cache = torch.arange(60.0).view(10, 6)
    wanted = torch.zeros(4, 8)
    wanted[:, :6] = cache[[7, 0, 9, 7]]
    check_close(gathered(cache, [7, 0, 9, 7], 4), wanted, "vectors")


def test_masked_vectors_are_zeros_and_are_not_read() -> None:
    """Where the mask is false the number may be anything; zeros come.

    Why: the end of a block table holds whatever it held before. 0 times NaN is NaN: what is masked must not be loaded at all.
    """
    cache = torch.full((4, 6), torch.nan)
    cache[1] = 1.0
    wanted = torch.zeros(4, 8)
    wanted[0, :6] = 1.0
    check_close(gathered(cache, [1, 2, 2**40, -(2**40)], 1), wanted, "vectors")


def test_int8_vectors_come_as_they_are() -> None:
    """Whole numbers in the type that was asked for; their scales are not `gather`'s business.

    Why: a scale belongs to a whole vector, so it can multiply the one score or weight instead of all the numbers.
    """
    cache = torch.arange(-30, 30, dtype=torch.int8).view(10, 6)
    wanted = torch.zeros(2, 8)
    wanted[:, :6] = cache[[3, 8]].float()
    check_close(gathered(cache, [3, 8], 2), wanted, "vectors")


@pytest.mark.parametrize("block_size", [1, 8, 12, 16])
def test_a_decode_at_every_border(block_size: int) -> None:
    """One query a sequence, contexts at and beside multiples of the block size and of the tile, blocks in shuffled order, NaN
    and impossible block numbers wherever nothing may be read.

    Why: an attention that sees one key too many or too few writes fluent text that is not the model's.
    """
    near = sorted({n + d for n in (block_size, 2 * block_size, 16, 32) for d in (-1, 0, 1)} - {0})
    case = make_case([1] * len(near), near, heads=(4, 2), head_dim=16, block_size=block_size, device=DEVICE)
    check_close(attend(case), expected(case), "attention")


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 3), (8, 1)])
def test_heads_that_share_keys(heads: tuple[int, int]) -> None:
    """Multi-head, grouped-query and multi-query attention.

    Why: each KV head's vectors lie between those of the others in the cache.
    """
    case = make_case([1, 1], [5, 37], heads=heads, head_dim=24, block_size=8, device=DEVICE)
    check_close(attend(case), expected(case), "attention")


def test_the_block_table_ends_with_the_context() -> None:
    """The last row of the table has as many blocks as its context of 33 needs, and behind it there is no memory.

    Why: the last keys of a tile are not there, and neither are their blocks. What lies behind a table is somebody else's.
    """
    case = make_case([1, 1], [5, 33], heads=(4, 2), head_dim=16, block_size=8, device=DEVICE)
    case.block_tables = guarded(case.block_tables[:, : -(-33 // 8)].contiguous())
    check_close(attend(case), expected(case), "attention")


@triton.jit
def visiting(
    query, vectors, scales, table, factors, out, right, cap,
    BLOCK_SIZE: tl.constexpr, VALUE_KIND: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, 16)
    at = row[:, None] * 16 + row[None, :]
    _, total, acc = visit_keys(
        tl.load(query + at), vectors, vectors, scales, scales, table, 0, right, row, 0, tl.load(factors + row), cap, 1, 16, 16,
        BLOCK_SIZE, 0, CAPPED, 16, 16, VALUE_KIND,
    )  # fmt: skip
    tl.store(out + at, acc / total[:, None])


def visited(
    number: int, value_kind: tl.dtype, *, right: int = 16, cap: float | None = None, scaled: bool = False, varied: bool = False
) -> tuple[Tensor, Tensor]:
    """Sixteen queries at the positions of block `number` of a cache of int8: what comes, and what should come, [16, 16] each.

    Args:
        right: behind the last key. cap: of the scores. scaled: keys and values have scales. varied: each query has its factor.
    """
    vectors = torch.empty((number + 1) * 16 * 16, dtype=torch.int8, device=DEVICE)  # what nobody touches takes no memory
    rng = torch.Generator().manual_seed(0)
    block = torch.randint(-3, 4, (16, 16), generator=rng, dtype=torch.int8)
    vectors[-256:] = block.flatten().to(DEVICE)
    query, table = torch.randn(16, 16, generator=rng).to(DEVICE), torch.tensor([number], dtype=torch.int32, device=DEVICE)
    factors = torch.rand(16, generator=rng) + 0.1 if varied else torch.ones(16)
    scale = (torch.rand(16, generator=rng) + 0.1).half() if scaled else torch.ones(16).half()
    scales = torch.cat([torch.full((number * 16,), torch.nan).half(), scale]).to(DEVICE) if scaled else None

    def compute() -> Tensor:
        out = torch.full((16, 16), torch.nan, device=DEVICE)
        visiting[(1,)](
            query, vectors, scales, table, factors.to(DEVICE), out, right, cap or 1.0, BLOCK_SIZE=16, VALUE_KIND=value_kind,
            CAPPED=cap is not None,
        )  # fmt: skip
        return out

    scores = query.cpu() @ block.float().T * factors[:, None] * scale.float()
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    hidden = torch.ones(16, 16).triu(1) > 0
    hidden[:, right:] = True
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf) * torch.log(torch.tensor(2.0)), dim=1)
    return contained(compute, 16, 16, device=DEVICE), weights @ (block.float() * scale.float()[:, None])


def test_a_cache_of_more_numbers_than_32_bits_count() -> None:
    """One block of 16 keys lies behind 2^31 numbers of a cache that is hardly used.

    Why: on a large card a layer's cache has more than 2^31 numbers; a place in 32 bits is then one before the beginning.
    """
    check_close(*visited(2**31 // (16 * 16), tl.float32), "attention")


def test_weights_are_multiplied_in_the_type_of_the_values() -> None:
    """Values in float16, weights in float32: the product is in `VALUE_KIND`, here float16.

    Why: a tensor core multiplies two of a kind, and the compiler for a card refuses anything else.
    """
    check_close(*visited(2, tl.float16), "attention", 5e-3)


@pytest.mark.parametrize("right", [1, 10, 15])
def test_keys_end_where_they_are_said_to(right: int) -> None:
    """Sixteen queries, the last of which stand behind the last key: they see the keys up to `right` and no more.

    Why: a context that is cut in parts has keys behind each part's end. Seen by two parts, they count twice.
    """
    check_close(*visited(2, tl.float32, right=right), "attention")


@pytest.mark.parametrize("scaled", [False, True])
def test_a_cap_is_one_of_whole_scores(scaled: bool) -> None:
    """Scores beyond a cap of 4, of keys with scales and without: the cap comes behind the scale, and behind the factor, which
    each query has for itself.

    Why: Gemma 2 with `--kv-cache-dtype int8`. A cap on numbers up to 127 flattens all of them. And queries of float8 caches
    are divided by their own largest number.
    """
    check_close(*visited(2, tl.float32, cap=4.0, scaled=scaled, varied=True), "attention")


@triton.jit
def visiting_nobody(query, vectors, table, out):
    row = tl.arange(0, 16)
    at = row[:, None] * 16 + row[None, :]
    top, total, acc = visit_keys(
        tl.load(query + at), vectors, vectors, None, None, table, 16, 16, row, 0, tl.full([16], 1.0, tl.float32), 1.0,
        1, 16, 16, 16, 0, False, 16, 16, tl.float32,
    )  # fmt: skip
    tl.store(out + row, tl.exp2(top))
    tl.store(out + 16 + row, total)
    tl.store(out + 32 + at, acc)


def test_a_part_without_keys() -> None:
    """A part that ends where it begins: the largest score is -inf, and both sums are 0.

    Why: a context that is cut in parts has empty ones. They are merged with the others, and must not count.
    """
    query, vectors = torch.randn(2, 16, 16, device=DEVICE)
    table = torch.zeros(2, dtype=torch.int32, device=DEVICE)

    def compute() -> Tensor:
        out = torch.full((18, 16), torch.nan, device=DEVICE)
        visiting_nobody[(1,)](query, vectors, table, out)
        return out

    got = contained(compute, 18, 16, device=DEVICE)
    check_close(got, torch.zeros(18, 16), "2 to the power of the largest scores, the sums of weights, the sums of values")


def test_rows_that_see_nothing_in_a_tile() -> None:
    """A prompt of 40 with a window of 7, many queries a tile: of the last ones whole tiles of keys are hidden, the first too.

    Why: minus infinity minus minus infinity is not a number, and one NaN row makes NaN of all that comes after it.
    """
    case = make_case([40, 3], [40, 50], heads=(4, 2), head_dim=16, block_size=8, window=7, device=DEVICE)
    check_close(attend(case, config=Config(64, 16, 1, 1)), expected(case), "attention")


@pytest.mark.parametrize("window", [None, 5, 16, 17])
def test_prompts_in_chunks(window: int | None) -> None:
    """Queries in the middle of a context see what is before them, themselves included, and with a window only the last of it.

    Why: a query that sees the next token has the answer before the question.
    """
    case = make_case([1, 7, 20], [1, 30, 20], heads=(4, 2), head_dim=16, block_size=8, window=window, device=DEVICE)
    check_close(attend(case), expected(case), "attention")


def test_scores_with_a_soft_cap() -> None:
    """Scores that `soft_cap` keeps between -0.5 and 0.5, each with its scale already; hidden keys stay hidden.

    Why: Gemma 2 was trained with capped scores. Without the cap one key drowns all others.
    """
    case = make_case([1, 7, 20], [33, 30, 20], heads=(4, 2), head_dim=16, block_size=8, window=17, device=DEVICE)
    case.soft_cap = 0.5
    check_close(attend(case), expected(case), "attention")


@pytest.mark.parametrize("factor", [1000.0, -1000.0])
def test_large_scores(factor: float) -> None:
    """Scores in the thousands, of either sign.

    Why: exp of a thousand is infinite, and of minus a thousand all weights are 0. Relative to the largest neither happens.
    """
    case = make_case([1, 1], [33, 20], heads=(4, 2), head_dim=16, block_size=8, device=DEVICE)
    case.query.abs_().mul_(factor)
    case.kv_cache[0].abs_()
    case.key.abs_()
    for keys in case.keys:
        keys.abs_()
    check_close(attend(case), expected(case), "attention", 1e-3)


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_a_context_in_parts(splits: int) -> None:
    """Contexts of 1 to 100 keys, cut in parts of whole tiles, of which some are empty.

    Why: one user with a long context is one program a head on a card that has room for a thousand.
    """
    lens = [1, 16, 17, 33, 100]
    case = make_case([1] * len(lens), lens, heads=(4, 2), head_dim=16, block_size=8, device=DEVICE)
    check_close(attend(case, splits), expected(case), "attention")


def merged(sums: list[list[float]], tops: list[float], totals: list[float]) -> Tensor:
    """Of one head with 3 dimensions. There is no memory behind the parts, and what lies behind the result stays as it is."""
    out = torch.full((8,), torch.nan, device=DEVICE)
    stats = guarded(torch.tensor([[top, total] for top, total in zip(tops, totals, strict=True)], device=DEVICE))
    parts = guarded(torch.tensor(sums, device=DEVICE))

    def compute() -> Tensor:
        merge_splits[(1,)](parts, stats, out, len(tops), 1, D=3, D_PADDED=8, SPLITS_PADDED=4)
        return out

    got = contained(compute, 8, device=DEVICE)
    assert got[3:].isnan().all(), "something was written behind the head's 3 numbers"
    return got[:3]


def test_parts_are_merged_relative_to_the_largest() -> None:
    """Tops 1 and 3, sums (4, 0, 4) and (1, 1, 1), weights 4 and 1: the first counts 2^-2, so (2, 1, 2) / 2.

    Why: each part's sums are relative to its own largest score, and mean nothing beside another's.
    """
    got = merged([[4.0, 0.0, 4.0], [1.0, 1.0, 1.0]], [1.0, 3.0], [4.0, 1.0])
    check_close(got, torch.tensor([1.0, 0.5, 1.0]), "attention")
    for shift in (5000.0, -5000.0):
        shifted = merged([[4.0, 0.0, 4.0], [1.0, 1.0, 1.0]], [1.0 + shift, 3.0 + shift], [4.0, 1.0])
        check_close(shifted, torch.tensor([1.0, 0.5, 1.0]), f"attention with {shift:g} added to both tops")


def test_empty_parts_count_nothing() -> None:
    """A part without keys has a top of -inf; when all are empty, as of a padding token, the result is 0.

    Why: a batch is padded to the size of a recorded graph, and NaN in a padding row spreads through the next layer's sums.
    """
    inf = float("inf")
    got = merged([[0.0] * 3, [2.0, 4.0, 6.0], [0.0] * 3], [-inf, 7.0, -inf], [0.0, 2.0, 0.0])
    check_close(got, torch.tensor([1.0, 2.0, 3.0]), "attention")
    check_close(merged([[0.0] * 3] * 2, [-inf, -inf], [0.0, 0.0]), torch.zeros(3), "attention without any key")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """Queries, keys and values in 16 bits; scores and sums in 32.

    Why: it is what models are served in.
    """
    case = make_case([1, 5], [40, 21], heads=(4, 2), head_dim=16, block_size=8, dtype=dtype, device=DEVICE)
    check_close(attend(case), expected(case), "attention", 2e-2)


def test_scales_of_keys_and_of_values() -> None:
    """A score is multiplied by its key's scale, a weight by its value's, once it has been counted: 21 keys in two tiles.

    Why: with `--kv-cache-dtype int8` the cache holds whole numbers up to 127, which are no keys, and each vector is a multiple
    of another scale. The sum of weights is that of the softmax, and knows nothing of values.
    """
    rng = torch.Generator().manual_seed(0)
    cache = torch.randint(-127, 128, (2, 3, 8, 1, 16), generator=rng, dtype=torch.int8).to(DEVICE)
    scales = (torch.rand(2, 3, 8, 1, generator=rng) / 40).half().to(DEVICE)
    query, key, value = torch.randn(3, 1, 1, 16, generator=rng).to(DEVICE)
    backend = TritonBackend(num_splits=1, config=TILE)
    step = AttentionMetadata(
        torch.tensor([-1], device=DEVICE), torch.tensor([[2, 0, 1]], dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), torch.tensor([21], dtype=torch.int32, device=DEVICE), [cache],
        1, 21, backend, kv_scales=[scales],  # slot -1: the cache holds the newest key already
    )  # fmt: skip
    got = contained(lambda: backend.attend(0, query, key, value, step, 1.0, None), 1, 1, 16, device=DEVICE)
    keys, values = (cache.float() * scales.float()[..., None])[:, [2, 0, 1]].reshape(2, 24, 16)[:, :21].cpu()
    weights = torch.softmax(keys @ query[0, 0].cpu(), dim=0)
    check_close(got[0, 0], weights @ values, "attention", 1e-4)


def test_a_cache_of_int8() -> None:
    """The whole way with keys and values that are whole numbers with scales.

    Why: it holds nearly twice the tokens.
    """
    case = make_case([1, 1], [40, 21], heads=(4, 2), head_dim=16, block_size=8, device=DEVICE)
    backend = TritonBackend(num_splits=1, config=TILE)
    metadata = case.metadata(backend)
    metadata.kv_caches, metadata.kv_scales = ([x] for x in quantize_int8(case.kv_cache))
    metadata.plan = backend.plan(metadata, None)

    def compute() -> Tensor:
        return backend.attend(0, case.query, case.key, case.value, metadata, case.scale, None)

    check_close(contained(compute, *case.query.shape, device=DEVICE).double(), expected(case), "attention", 3e-2)
