"""What a tile of queries does over cached latents, in Triton: `attend` of ``paged_kernels_triton.py`` calls it."""

from __future__ import annotations

from ..core.platform.triton_mode import tl, triton


@triton.jit
def visit_latents(
    q, turned_at, is_row, first_halves, second_halves, first_scales, second_scales, block_table, left, right, position, factor,
    D: tl.constexpr, D_PADDED: tl.constexpr, TURNED: tl.constexpr, TURNED_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend over the vectors at positions left..right-1 of one sequence, as `visit_keys` does over keys and values. A vector
    is a latent [D], which is the value as well, and behind that the turned part [TURNED] of its key.

    Args:
        q: [BLOCK_M, D_PADDED], the queries' parts for latents. turned_at: [BLOCK_M], where their turned parts begin.
            is_row: [BLOCK_M], which of them there are.
        first_halves, second_halves: of vectors, [num_slots, (D + TURNED) / 2]; the border may lie anywhere in the latents.
        first_scales, second_scales: [num_slots] for int8, else None. The rest: as in `visit_keys`.

    Returns:
        As `visit_keys`: largest scores, sums of weights, and sums of latents [BLOCK_M, D_PADDED].
    """
    HALF: tl.constexpr = (D + TURNED) // 2
    part = tl.arange(0, TURNED_PADDED)[None, :]
    turned = tl.load(turned_at[:, None] + part, is_row[:, None] & (part < TURNED), other=0.0).to(q.dtype)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0, tl.float32)
    acc = tl.full([BLOCK_M, D_PADDED], 0, tl.float32)
    for start in range(left, right, BLOCK_N):
        key_position = start + tl.arange(0, BLOCK_N)
        is_key = key_position < right
        block = tl.load(block_table + key_position // BLOCK_SIZE, is_key, other=0)
        at = block.to(tl.int64) * BLOCK_SIZE + key_position % BLOCK_SIZE
        scales = None, None
        if first_scales is not None:
            scales = tl.load(first_scales + at, is_key, other=0.0), tl.load(second_scales + at, is_key, other=0.0)
        latents = gather_part(first_halves, second_halves, scales, at, is_key, 0, D, HALF, D_PADDED, q.dtype)
        keys = gather_part(first_halves, second_halves, scales, at, is_key, D, TURNED, HALF, TURNED_PADDED, q.dtype)
        scores = tl.dot(q, tl.trans(latents), input_precision="ieee")
        scores = tl.dot(turned, tl.trans(keys), scores, input_precision="ieee") * factor[:, None]
        scores = tl.where(is_key[None, :] & (key_position[None, :] <= position[:, None]), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, shrink = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), latents, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def gather_part(
    first_halves, second_halves, scales, at, mask, FIRST: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    PADDED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Elements FIRST..FIRST + SIZE − 1 of the vectors numbered `at`, [BLOCK_N, PADDED] in the type KIND, zeros where `mask` is
    false."""
    element = FIRST + tl.arange(0, PADDED)[None, :]
    inside = mask[:, None] & (element < FIRST + SIZE)
    part = tl.load(second_halves + at[:, None] * HALF + element - HALF, inside & (element >= HALF), other=0.0)
    if FIRST < HALF:  # two loads of neighbours; one at addresses of either half would be cut into single elements
        part += tl.load(first_halves + at[:, None] * HALF + element, inside & (element < HALF), other=0.0)
    if scales[0] is not None:
        part = part.to(tl.float32) * tl.where(element < HALF, scales[0][:, None], scales[1][:, None])
    return part.to(KIND)
