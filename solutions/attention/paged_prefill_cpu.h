// Attention of many rows, as in prefill: bound by the dot product units, so it goes through the register tiles of native.h.
#pragma once

#include "attention/paged_work_cpu.h"

namespace native {

// Many rows are the columns of panels, with keys and values as the rows of the tiles that run against them. So scores come out as
// [keys, rows]: the softmax of 16 rows is computed side by side, and keys need no packing.

// Sixteen rows of a matrix as columns of a panel.
template <typename T>
void pack_columns(const T* rows, int64_t count, int64_t dim, T* panel, int64_t column) {
    constexpr int64_t WORD = 4 / sizeof(T);  // a float, or two bfloat16s
    for (int64_t d = 0; d < dim; d += LANES * WORD) {
        Bits block[LANES] = {};
        const int64_t words = std::min<int64_t>(LANES, (dim - d) / WORD);
        for (int i = 0; i < count; ++i) std::memcpy(&block[i], rows + i * dim + d, words * 4);
        transpose(block);
        for (int64_t w = 0; w < words; ++w) store_as(panel + (d + w * WORD) * PANEL + column * WORD, block[w]);
    }
}

// Two neighbouring values: floats one behind the other, bfloat16s in pairs, [D, 2].
inline void pack_values(const float* even, const float* odd, int64_t dim, float* to) {
    std::memcpy(to, even, dim * sizeof(float));
    std::memcpy(to + dim, odd, dim * sizeof(float));
}
inline void pack_values(const bf16* even, const bf16* odd, int64_t dim, bf16* to) {
    for (int64_t d = 0; d < dim; d += LANES) {
        const Bits low = __builtin_convertvector(load_as<Halves>(even + d), Bits), high = __builtin_convertvector(load_as<Halves>(odd + d), Bits);
        store_as(to + 2 * d, low | high << 16);
    }
}
// The same for the weights of 16 rows: panel is [2, 32] floats or [32, 2] bfloat16s.
inline void pack_weights(Floats even, Floats odd, float* panel) {
    store(panel, even);
    store(panel + PANEL, odd);
}
inline void pack_weights(Floats even, Floats odd, bf16* panel) {
    store_as(panel, __builtin_convertvector(narrow(even), Bits) | __builtin_convertvector(narrow(odd), Bits) << 16);
}

// 32 rows of an item, and what is known of them so far.
template <typename T>
struct Columns {
    T* queries;           // panel [D, 32]
    float* out;           // [D, 32]
    Floats top[2], sum[2];
    Ints first[2], last[2];  // keys that each row sees
};

// The memory that chunk after chunk goes through: keys [KEYS, D], values in pairs, scores [KEYS, 32] and weights as a panel.
template <typename T>
struct Chunk {
    T *keys, *values, *weights;
    float* scores;
};

template <typename T>
void attend_columns(const Work<T>& work, Columns<T>& columns, int64_t first, const Chunk<T>& chunk) {
    constexpr int64_t WORD = 4 / sizeof(T);
    const int64_t dim = work.dim, seen = std::min<int64_t>(KEYS, columns.last[1][LANES - 1] + 1 - first);
    if (seen <= 0) return;
    const int64_t count = (seen + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    for (int64_t k = 0; k < count; k += TILE_ROWS) {
        Floats c[TILE_ROWS][2] = {};
        tile<TILE_ROWS>(chunk.keys + k * dim, dim, columns.queries, PANEL, dim, c);
        for (int m = 0; m < TILE_ROWS; ++m)
            for (int h = 0; h < 2; ++h) store(chunk.scores + (k + m) * PANEL + h * LANES, c[m][h] * work.step.scale);
    }
    const bool all_seen = columns.last[0][0] >= first + count - 1 && columns.first[1][LANES - 1] <= first;
    Floats factor[2];
    for (int h = 0; h < 2; ++h) {
        float* scores = chunk.scores + h * LANES;
        if (!all_seen) {
            for (int64_t k = 0; k < count; ++k) {
                const Ints key = Ints{} + static_cast<int32_t>(first + k);
                const Floats score = load(scores + k * PANEL);
                const Ints seen = (key >= columns.first[h]) & (key <= columns.last[h]);
                store(scores + k * PANEL, seen ? score : broadcast(MINUS_INFINITY));
            }
        }
        Floats best = columns.top[h];
        for (int64_t k = 0; k < count; ++k) best = maximum(best, load(scores + k * PANEL));
        const Floats base = best == MINUS_INFINITY ? Floats{} : best;  // a row that has seen nothing yet gets weights of zero
        factor[h] = exponential(columns.top[h] - base);
        Floats total{};
        for (int64_t k = 0; k < count; k += 2) {
            const Floats even = exponential(load(scores + k * PANEL) - base), odd = exponential(load(scores + (k + 1) * PANEL) - base);
            total += even + odd;
            pack_weights(even, odd, chunk.weights + k * PANEL + h * LANES * WORD);
        }
        columns.top[h] = best;
        columns.sum[h] = columns.sum[h] * factor[h] + total;
    }
    for (int64_t d = 0; d < dim; d += TILE_ROWS) {
        Floats c[TILE_ROWS][2];
        for (int m = 0; m < TILE_ROWS; ++m)
            for (int h = 0; h < 2; ++h) c[m][h] = load(columns.out + (d + m) * PANEL + h * LANES) * factor[h];
        tile<TILE_ROWS>(chunk.values + d * WORD, WORD, chunk.weights, PANEL, count, c, {}, WORD * dim);
        for (int m = 0; m < TILE_ROWS; ++m)
            for (int h = 0; h < 2; ++h) store(columns.out + (d + m) * PANEL + h * LANES, c[m][h]);
    }
}

// Results of 32 columns back into rows: `from` and `count` say which.
template <typename T>
void unpack_columns(const Work<T>& work, const Columns<T>& columns, int64_t from, int64_t count) {
    for (int64_t h = 0; h * LANES < count; ++h) {
        const int64_t row = from + h * LANES, n = std::min<int64_t>(LANES, count - h * LANES);
        std::memcpy(work.top + row, &columns.top[h], n * sizeof(float));
        std::memcpy(work.sum + row, &columns.sum[h], n * sizeof(float));
        for (int64_t d = 0; d < work.dim; d += LANES) {
            Bits block[LANES];
            for (int i = 0; i < LANES; ++i) block[i] = load_as<Bits>(columns.out + (d + i) * PANEL + h * LANES);
            transpose(block);
            for (int64_t i = 0; i < n; ++i) store_as(work.out + (row + i) * work.dim + d, block[i]);
        }
    }
}

template <typename T>
void many_rows(const Work<T>& work, Arena& arena) {
    const int64_t dim = work.dim, num_columns = (work.rows + PANEL - 1) / PANEL;
    static thread_local std::vector<Columns<T>> all;
    all.resize(num_columns);
    for (int64_t p = 0; p < num_columns; ++p) {
        Columns<T>& columns = all[p];
        columns.queries = arena.take<T>(dim * PANEL);
        columns.out = arena.take<float>(dim * PANEL);
        std::fill(columns.out, columns.out + dim * PANEL, 0.0f);
        for (int h = 0; h < 2; ++h) {
            const int64_t row = p * PANEL + h * LANES, n = std::clamp<int64_t>(work.rows - row, 0, LANES);
            pack_columns(work.q + row * dim, n, dim, columns.queries, h * LANES);
            columns.top[h] = broadcast(MINUS_INFINITY);
            columns.sum[h] = Floats{};
            for (int i = 0; i < LANES; ++i) {
                const int64_t r = std::min(row + i, work.rows - 1);
                columns.first[h][i] = static_cast<int32_t>(work.first_visible(r));
                columns.last[h][i] = static_cast<int32_t>(std::min<int64_t>(work.position(r), work.item.right - 1));
            }
        }
    }
    const Chunk<T> chunk{arena.take<T>(KEYS * dim), arena.take<T>(KEYS * dim), arena.take<T>(KEYS * PANEL), arena.take<float>(KEYS * PANEL)};
    int64_t offsets[KEYS];
    for (int64_t first = work.item.left; first < work.item.right; first += KEYS) {
        const int64_t count = find(work.step, work.item, first, offsets);
        if (work.int8.keys) {
            work.load_chunk(count, offsets, offsets);
            for (int64_t i = 0; i < KEYS; ++i) offsets[i] = i * dim;
        }
        for (int64_t i = 0; i < KEYS; ++i) std::memcpy(chunk.keys + i * dim, work.keys + offsets[i], dim * sizeof(T));
        for (int64_t i = 0; i < KEYS; i += 2) pack_values(work.values + offsets[i], work.values + offsets[i + 1], dim, chunk.values + i * dim);
        for (Columns<T>& columns : all) attend_columns(work, columns, first, chunk);
    }
    for (int64_t p = 0; p < num_columns; ++p) unpack_columns(work, all[p], p * PANEL, std::min<int64_t>(PANEL, work.rows - p * PANEL));
}

}  // namespace native
