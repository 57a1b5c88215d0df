"""The Triton kernels of paged attention: rotate and store a step's keys and values, attend, merge splits.

A program of `attend` computes one tile: up to BLOCK_Q neighbouring queries of one sequence, with all query heads that share a
KV head packed in the BLOCK_M rows of one matrix, so that each key is read once for all of them and tensor cores are fed even
when decoding. Keys come BLOCK_N at a time through the block table, and the softmax is kept up to date on the way (online
softmax, Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023, §3.1). Few sequences with long contexts are split over several
programs whose partial results `merge_splits` puts together (Flash-Decoding, Dao et al. 2023).

Sizes in capitals are known to the compiler; the padded ones are powers of two, as Triton wants them. Exponentials are to the
base of two, which is what the hardware has: scores are multiplied by log2(e) beforehand.
"""

from __future__ import annotations

from ..core.platform.triton_mode import INTERPRETED, cast, tl, triton
from .latent_kernels_triton import visit_latents

STEP_ARRAYS = ["slot_mapping", "block_tables", "query_start_loc", "context_lens"]
"""They begin anywhere in a step's buffers: a new alignment must not make Triton compile in the middle of serving."""


@triton.jit(do_not_specialize_on_alignment=STEP_ARRAYS)
def write_kv(
    query, key, value, cos, signed_sin, keys, values, key_scales, value_scales, slot_mapping,
    query_stride, key_stride, value_stride, rope_stride,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr,
    H_PADDED: tl.constexpr, H_KV_PADDED: tl.constexpr, HALF_PADDED: tl.constexpr,
):  # fmt: skip
    """Store one token's keys and values by slot, program (token, 0), and rotate its queries in place, program (token, 1).

    Args:
        query: [T, H, D]. key, value: [T, H_kv, D], rows `*_stride` apart. cos, signed_sin: [T, D], or None: no rotation.
        keys, values: one layer's cache, [num_slots, H_kv, D]. key_scales, value_scales: [num_slots, H_kv] for int8, else None.
        slot_mapping: [T] int64; the tokens of slot −1 are not stored.
    """
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_PADDED)[None, :]
    is_pair = pair < D // 2
    if tl.program_id(1) == 0:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            head = tl.arange(0, H_KV_PADDED)[:, None]
            is_head = head < H_KV
            low, high = load_pairs(key + token * key_stride + head * D + pair, is_head & is_pair, D)
            if cos is not None:
                low, high = rotate(
                    low, high, cos + token * rope_stride + pair, signed_sin + token * rope_stride + pair, is_pair, D
                )
            at = slot * H_KV + head  # in [num_slots · H_kv, D]
            store_pairs(keys, key_scales, at, pair, low, high, is_head, is_pair, D)
            low, high = load_pairs(value + token * value_stride + head * D + pair, is_head & is_pair, D)
            store_pairs(values, value_scales, at, pair, low, high, is_head, is_pair, D)
    elif cos is not None:
        head = tl.arange(0, H_PADDED)[:, None]
        is_head = head < H
        queries = query + token * query_stride
        low, high = load_pairs(queries + head * D + pair, is_head & is_pair, D)
        low, high = rotate(low, high, cos + token * rope_stride + pair, signed_sin + token * rope_stride + pair, is_pair, D)
        store_pairs(queries, None, head, pair, low, high, is_head, is_pair, D)


@triton.jit
def load_pairs(at, mask, D: tl.constexpr):
    """Elements i and i + D/2 of each head, which RoPE turns together: two [heads, D/2] in float32."""
    return tl.load(at, mask, other=0.0).to(tl.float32), tl.load(at + D // 2, mask, other=0.0).to(tl.float32)


@triton.jit
def rotate(low, high, cos, signed_sin, mask, D: tl.constexpr):
    """RoPE (Su et al., 2021) as `layers.rotate_` computes it: x · cos + swapped(x) · signed_sin."""
    cos_low, cos_high = load_pairs(cos, mask, D)
    sin_low, sin_high = load_pairs(signed_sin, mask, D)
    return low * cos_low + high * sin_low, high * cos_high + low * sin_high


@triton.jit
def store_pairs(to, scales, at, pair, low, high, is_head, is_pair, D: tl.constexpr):
    """Store heads as the vectors numbered `at` of `to` in its type; with `scales` as multiples of largest magnitude / 127."""
    kind: tl.constexpr = to.dtype.element_ty
    if scales is not None:
        largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))[:, None]
        scale = cast(tl.minimum(largest * (1.001 / 127.0), 65504.0), scales.dtype.element_ty)  # a little larger: nothing clips
        tl.store(scales + at, scale, is_head)
        step = scale.to(tl.float32)
        factor = tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)
        low, high = tl.floor(low * factor + 0.5), tl.floor(high * factor + 0.5)
    if kind == tl.float8e4nv:
        low, high = tl.clamp(low, -448.0, 448.0), tl.clamp(high, -448.0, 448.0)  # the type's largest; beyond it lies NaN
    tl.store(to + at * D + pair, cast(low, kind), is_head & is_pair)
    tl.store(to + at * D + pair + D // 2, cast(high, kind), is_head & is_pair)


@triton.jit(
    do_not_specialize=["num_seqs", "num_tokens", "table_stride"],  # they change from step to step
    do_not_specialize_on_alignment=STEP_ARRAYS,
)
def attend(
    query, keys, values, key_scales, value_scales, block_tables, query_start_loc, context_lens, output,
    partial_sums, partial_stats, sinks,
    num_seqs, num_tokens, table_stride, query_stride, scale_log2, cap_log2,
    GROUP: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TURNED: tl.constexpr = 0, TURNED_PADDED: tl.constexpr = 0,
):  # fmt: skip
    """Attention of one tile of queries for one KV head over one split of the keys: program (tile, KV head, split).

    Args:
        query: [T, H, D], rows `query_stride` apart. keys, values, key_scales, value_scales: as in `write_kv`.
        block_tables: [S, ·] int32, rows `table_stride` apart. query_start_loc: [S + 1] int32. context_lens: [S] int32.
        output: [T, H, D]; if `partial_sums` is None the result goes here.
        partial_sums: [splits, T, H, D] float32, weighted sums of values. partial_stats: [splits, T, H, 2] float32, the largest
            score and the sum of weights. sinks: [H], scores that stand for no key, or None.
        scale_log2: factor on the scores, times log2(e). WINDOW: keys that a query sees at most; 0: all.
        cap_log2: if the scores are CAPPED, their soft cap, times log2(e).
        TURNED: not 0 over latents, which all heads share: a query is [D + TURNED], a cached vector as `visit_latents` says.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq = find_sequence(tile, query_start_loc, num_seqs, BLOCK_Q)
    first_token = tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - first_token
    first_query = (tile - (first_token // BLOCK_Q + seq)) * BLOCK_Q
    if first_query >= query_len:
        return  # the launch has a few tiles too many, see `find_sequence`

    row = tl.arange(0, BLOCK_M)
    nth = first_query + row // GROUP  # which of the sequence's queries
    is_row = (row < BLOCK_Q * GROUP) & (nth < query_len)
    earlier = tl.load(context_lens + seq) - query_len
    position = earlier + nth
    head_row = (first_token + nth).to(tl.int64) * (GROUP * H_KV) + kv_head * GROUP + row % GROUP  # in [T · H, D]
    dim = tl.arange(0, D_PADDED)
    is_element = is_row[:, None] & (dim < D)[None, :]
    query_at = (first_token + nth).to(tl.int64) * query_stride + (kv_head * GROUP + row % GROUP) * (D + TURNED)
    q = tl.load(query + query_at[:, None] + dim[None, :], is_element, other=0.0)
    if INTERPRETED:
        q = q.to(tl.float32)  # and with them keys and values: the interpreter would multiply the bits of bfloat16 as integers
    factor = tl.full([BLOCK_M], 1, tl.float32) * scale_log2
    if keys.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        # One instruction makes two float16 of float8; bfloat16 would take more. Queries fit once they are at most 1.
        largest = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)
        q = (q.to(tl.float32) / largest[:, None]).to(tl.float16)
        factor *= largest
    # weights times scales can be too small for float16; bfloat16 has the range, and holds the int8 numbers exactly
    VALUE_KIND: tl.constexpr = tl.bfloat16 if value_scales is not None and q.dtype == tl.float16 else q.dtype

    # Keys that some row of the tile sees, left..right-1: only these are in the cache for certain.
    num_splits = tl.num_programs(2)
    right = earlier + tl.minimum(first_query + BLOCK_Q, query_len)
    left = tl.maximum(earlier + first_query - WINDOW + 1, 0) if WINDOW else 0
    share = (right - left + num_splits * BLOCK_N - 1) // (num_splits * BLOCK_N) * BLOCK_N
    left += split * share
    right = tl.minimum(right, left + share)

    if TURNED:
        top, total, acc = visit_latents(
            q, query + query_at + D, is_row, keys, values, key_scales, value_scales,
            block_tables + seq.to(tl.int64) * table_stride, left, right, position, factor, D, D_PADDED, TURNED,
            TURNED_PADDED, BLOCK_SIZE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        top, total, acc = visit_keys(
            q, keys, values, key_scales, value_scales, block_tables + seq.to(tl.int64) * table_stride, left, right, position,
            kv_head, factor, cap_log2, H_KV, D, D_PADDED, BLOCK_SIZE, WINDOW, CAPPED, BLOCK_M, BLOCK_N, VALUE_KIND,
        )  # fmt: skip
    if sinks is not None and split == 0:
        top, total, acc = visit_sinks(tl.load(sinks + kv_head * GROUP + row % GROUP), top, total, acc)

    if partial_sums is None:
        out = acc / tl.where(total > 0, total, 1.0)[:, None]  # a padding sequence has no key: zeros
        tl.store(output + head_row[:, None] * D + dim[None, :], cast(out, output.dtype.element_ty), is_element)
    else:
        head_row += split.to(tl.int64) * num_tokens * (GROUP * H_KV)
        tl.store(partial_sums + head_row[:, None] * D + dim[None, :], acc, is_element)
        tl.store(partial_stats + head_row * 2, top, is_row)
        tl.store(partial_stats + head_row * 2 + 1, total, is_row)


@triton.jit
def visit_keys(
    q, keys, values, key_scales, value_scales, block_table, left, right, position, kv_head, factor, cap,
    H_KV: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VALUE_KIND: tl.constexpr,
):  # fmt: skip
    """Attend over the keys at positions left..right-1 of one sequence, BLOCK_N at a time, and keep the softmax up to date.

    Args:
        q: [BLOCK_M, D_PADDED] queries of one KV head. position: [BLOCK_M], where each stands; it sees keys up to there, with a
            WINDOW only the last so many.
        keys, values, key_scales, value_scales: as in `attend`. An int8 key's scale multiplies its score, a value's scale its
            weight: once a vector, not once an element. block_table: where the sequence's row begins.
        factor: [BLOCK_M], what a row's scores are multiplied by, log2(e) included.
        cap: if the scores are CAPPED, each becomes what `soft_cap` makes of it, its scale included.
        VALUE_KIND: the type in which weights (times scales) and values are multiplied; keys are in the queries' type.

    Returns:
        Of each row the largest score, -inf if it saw no key; the sum of weights exp2(score - largest), [BLOCK_M] each; and the
        sum of values by these weights, [BLOCK_M, D_PADDED]; all float32.
    """
    raise NotImplementedError("Stage 4 · Task 4.7: visit_keys, see stages/stage4_optimization/GUIDE.md#task-4-7")


@triton.jit
def visit_sinks(sinks, top, total, acc):
    """One more key in each row, of this score and with a value of 0; the rest as `visit_keys` returns it."""
    score = sinks.to(tl.float32) * 1.4426950408889634  # log2(e)
    new_top = tl.maximum(tl.maximum(top, score), -1e30)
    shrink = tl.exp2(top - new_top)
    return new_top, total * shrink + tl.exp2(score - new_top), acc * shrink[:, None]


@triton.jit
def soft_cap(scores, cap):
    """cap · tanh(scores / cap), by exponentials that cannot overflow."""
    small = tl.exp(-2.0 * tl.abs(scores) / cap)
    return tl.where(scores < 0, -cap, cap) * (1.0 - small) / (1.0 + small)


@triton.jit
def find_sequence(tile, query_start_loc, num_seqs, BLOCK_Q: tl.constexpr):
    """The sequence that a tile belongs to, by binary search: sequence i has those from query_start_loc[i] // BLOCK_Q + i on.

    That is room enough for ceil(query_len / BLOCK_Q) tiles each, T // BLOCK_Q + S in all, and needs nobody to count the tiles
    before the launch, which would mean to wait for the device.
    """
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(query_start_loc + middle) // BLOCK_Q + middle <= tile
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def gather(cache, at, mask, D: tl.constexpr, D_PADDED: tl.constexpr, KIND: tl.constexpr):
    """The cached vectors numbered `at`, without scales: [BLOCK_N, D_PADDED] in the type KIND, zeros where `mask` is false."""
    # Hint: Write the softmax of numbers that you see only once, one after the other, on paper: what has to happen to
    # the sum so far when a larger one comes?
    raise NotImplementedError("Stage 4 · Task 4.7: gather, see stages/stage4_optimization/GUIDE.md#task-4-7")


@triton.jit
def merge_splits(
    partial_sums, partial_stats, output, num_splits, num_rows,
    D: tl.constexpr, D_PADDED: tl.constexpr, SPLITS_PADDED: tl.constexpr,
):  # fmt: skip
    """Put the splits of one token's head together, program (row of [T · H, D]): one's sums count exp2(its top − the largest).

    Args:
        partial_sums, partial_stats: see `attend`; an empty split has top −inf and sums 0. output: [T, H, D]. num_rows: T · H.
    """
    raise NotImplementedError("Stage 4 · Task 4.7: merge_splits, see stages/stage4_optimization/GUIDE.md#task-4-7")
