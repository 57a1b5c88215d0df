// Attention of few rows whose results are to be those of many, to the bit: the products of paged_prefill_cpu.h with their operands
// exchanged, so that few rows are the rows of the tiles and not a few of their columns. Each number is summed in the same order.
#pragma once

#include "attention/paged_decode_cpu.h"
#include "attention/paged_prefill_cpu.h"

namespace native {

// A row's scores with a chunk's keys become weights; returns what has been summed before is to be multiplied with.
template <typename C>
Floats weigh(float* scores, C* weights, float& top, float& sum) {
    Floats best = broadcast(top);
    for (int64_t k = 0; k < KEYS; k += LANES) best = maximum(best, load(scores + k));
    const float now = largest(best);
    const Floats base = broadcast(now == MINUS_INFINITY ? 0.0f : now), factor = exponential(top - base);
    for (int64_t k = 0; k < KEYS; k += LANES) {
        const Floats weight = exponential(load(scores + k) - base);
        store(scores + k, weight);
        store(weights + k, weight);
    }
    float total = 0;
    for (int64_t k = 0; k < KEYS; k += 2) total += scores[k] + scores[k + 1];
    top = now;
    sum = rescaled(broadcast(sum), factor, broadcast(total))[0];
    return factor;
}

// A chunk of keys and values as panels that few rows run against: keys [KEYS / PANEL, D, PANEL], values as pack_values leaves them.
// Weights are [rows, KEYS].
template <typename C>
struct OrderedChunk {
    C *keys, *values, *weights;
};

// M rows with the first `count` keys of a chunk.
template <int M, typename T, typename C>
void attend_in_order(const Work<T>& work, int64_t row, int64_t first, int64_t count, const OrderedChunk<C>& chunk) {
    constexpr int64_t WORD = 4 / sizeof(C);
    const int64_t dim = work.dim;
    float* scores = work.scores + row * KEYS;
    for (int64_t k = 0; k < KEYS; k += PANEL) {
        Floats c[M][2] = {};
        if (k < count) tile<M>(work.q + row * dim, dim, chunk.keys + k * dim, PANEL, dim, c);
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < 2; ++h) store(scores + m * KEYS + k + h * LANES, c[m][h] * work.step.scale);
    }
    Floats factors[M];
    for (int m = 0; m < M; ++m) {
        cap(work.step, scores + m * KEYS, KEYS);
        mask(work, row + m, first, count);
        factors[m] = weigh(scores + m * KEYS, chunk.weights + m * KEYS, work.top[row + m], work.sum[row + m]);
    }
    for (int64_t d = 0; d < dim; d += PANEL) {
        const int registers = dim - d < PANEL ? 1 : 2;
        Floats c[M][2] = {};
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < registers; ++h) c[m][h] = load(work.out + (row + m) * dim + d + h * LANES) * factors[m];
        tile<M>(chunk.weights, KEYS, chunk.values + d * WORD, dim, (count + 1) / 2 * 2, c);
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < registers; ++h) store(work.out + (row + m) * dim + d + h * LANES, c[m][h]);
    }
}

// All rows of one head with up to KEYS keys, in the order of many.
template <typename C>
struct InOrder {
    OrderedChunk<C> chunk;

    InOrder(Arena& arena, int64_t dim) : chunk{arena.take<C>(KEYS * dim), arena.take<C>(KEYS * dim), arena.take<C>(MOST_ROWS * KEYS)} {}

    template <typename T>
    void operator()(const Work<T>& work, int64_t first, int64_t count, const int64_t* offsets, const int64_t* ahead) const {
        const int64_t dim = work.dim;
        for (int64_t k = 0; k < KEYS; k += LANES) {
            for (int64_t i = k; i < k + LANES; ++i) {
                fetch_row(work.keys + ahead[i], dim);
                fetch_row(work.values + ahead[i], dim);
            }
            if (k < count)
                pack_columns(LANES, dim, chunk.keys + k / PANEL * PANEL * dim, k % PANEL, [&](int i) { return work.keys + offsets[k + i]; });
        }
        pack_values(work.values, offsets, dim, chunk.values);
        for_rows(work.rows, [&](auto m, int64_t row) { attend_in_order<m>(work, row, first, count, chunk); });
    }
};

// AMX reads values as rows, so as the other operand they would have to lie in another way.
template <typename T>
constexpr bool HAS_ORDER = !(std::is_same_v<Operand<T>, bf16> && WIDE_TILE_ROWS == 16);

}  // namespace native
