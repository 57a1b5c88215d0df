// Attention of many rows, as in prefill: bound by the dot product units, so it goes through the register tiles of tiles.h.
#pragma once

#include "attention/paged_work_cpu.h"

namespace native {

// Many rows are the columns of panels, with keys and values as the rows of the tiles that run against them. So scores come out as
// [keys, rows]: the softmax of LANES rows is computed side by side, and keys need no packing.
//
// In what follows C is what is computed in: T, or float where the processor does not multiply T.
constexpr int64_t MANY_ROWS = 8;                       // of an item, from which on that pays
template <typename C>                                  // rows of a tile: of 64 keys and of any head's size a divisor
constexpr int TILE_KEYS = std::is_same_v<C, bf16> && WIDE_TILE_ROWS == 16 ? 16 : REGISTERS == 32 ? 8 : 4;

// Words of a panel's operand: so many numbers of a row as a word holds, floats or pairs of bfloat16s.
template <typename C, typename T>
inline Bits load_words(const T* from) {
    if constexpr (std::is_same_v<C, T>)
        return load_as<Bits>(from);
    else
        return (Bits)load(from);
}

// LANES rows of `dim` numbers, of which row(i) is one, as columns of a panel.
template <typename C, typename Row>
void pack_columns(int64_t count, int64_t dim, C* panel, int64_t column, const Row& row) {
    constexpr int64_t WORD = 4 / sizeof(C);
    for (int64_t d = 0; d < dim; d += LANES * WORD) {
        Bits block[LANES];
        const int64_t words = std::min<int64_t>(LANES, (dim - d) / WORD);
        for (int i = 0; i < LANES; ++i) {
            if (i >= count)
                block[i] = Bits{};
            else if (words == LANES)
                block[i] = load_words<C>(row(i) + d);
            else  // half a register of pairs is left
                std::memcpy(&block[i], row(i) + d, 2 * LANES);
        }
        transpose(block);
        for (int64_t w = 0; w < words; ++w) store_as(panel + (d + w * WORD) * PANEL + column * WORD, block[w]);
    }
}

// Two neighbouring keys' numbers, as words.
inline Bits paired(const bf16* even, const bf16* odd) {
    return __builtin_convertvector(load_as<Halves>(even), Bits) | __builtin_convertvector(load_as<Halves>(odd), Bits) << 16;
}

// A chunk's values, which lie at `offsets`: floats one behind the other, [KEYS, D], bfloat16s in pairs, [KEYS / 2, D, 2]. And what
// they add to rows d to d + M of the result: values · weights.
template <typename T>
void pack_values(const T* from, const int64_t* offsets, int64_t dim, float* to) {
    for (int64_t i = 0; i < KEYS; ++i) widen(from + offsets[i], dim, to + i * dim);
}
template <int M>
void add_values(const float* values, const float* weights, int64_t d, int64_t dim, int64_t count, Floats (&c)[M][2]) {
    tile<M>(values + d, 1, weights, PANEL, count, c, {}, dim);
}
#ifdef HAS_AMX  // which reads rows: [D, KEYS]
inline void pack_values(const bf16* from, const int64_t* offsets, int64_t dim, bf16* to) {
    for (int64_t k = 0; k < KEYS; k += 2 * LANES) {
        for (int64_t d = 0; d < dim; d += LANES) {
            Bits block[LANES];
            for (int i = 0; i < LANES; ++i) block[i] = paired(from + offsets[k + 2 * i] + d, from + offsets[k + 2 * i + 1] + d);
            transpose(block);
            for (int i = 0; i < LANES; ++i) store_as(to + (d + i) * KEYS + k, block[i]);
        }
    }
}
template <int M>
void add_values(const bf16* values, const bf16* weights, int64_t d, int64_t, int64_t count, Floats (&c)[M][2]) {
    tile<M>(values + d * KEYS, KEYS, weights, PANEL, count, c);
}
#else
inline void pack_values(const bf16* from, const int64_t* offsets, int64_t dim, bf16* to) {
    for (int64_t i = 0; i < KEYS; i += 2) {
        const bf16 *even = from + offsets[i], *odd = from + offsets[i + 1];
        bf16* pairs = to + i * dim;
        int64_t d = 0;
        for (; d + 2 * LANES <= dim; d += 2 * LANES) {
            const Words a = load_as<Words>(even + d), b = load_as<Words>(odd + d);
            store_as(pairs + 2 * d, shuffle(a, b, [](int i) { return i / 2 + i % 2 * 2 * LANES; }));
            store_as(pairs + 2 * d + 2 * LANES, shuffle(a, b, [](int i) { return LANES + i / 2 + i % 2 * 2 * LANES; }));
        }
        for (; d < dim; d += LANES) store_as(pairs + 2 * d, paired(even + d, odd + d));
    }
}
template <int M>
void add_values(const bf16* values, const bf16* weights, int64_t d, int64_t dim, int64_t count, Floats (&c)[M][2]) {
    tile<M>(values + 2 * d, 2, weights, PANEL, count, c, {}, 2 * dim);
}
#endif
// Weights of two keys and LANES rows: panel is [2, PANEL] floats or [PANEL, 2] bfloat16s.
inline void pack_weights(Floats even, Floats odd, float* panel) {
    store(panel, even);
    store(panel + PANEL, odd);
}
inline void pack_weights(Floats even, Floats odd, bf16* panel) {
    store_as(panel, __builtin_convertvector(narrow(even), Bits) | __builtin_convertvector(narrow(odd), Bits) << 16);
}

// PANEL rows of an item, and what is known of them so far.
template <typename C>
struct Columns {
    int64_t row, rows;    // the first of them in the item, and how many there are
    C* queries;           // panel [D, PANEL]
    float* out;           // [D, PANEL]
    Floats top[2], sum[2];
    Ints first[2], last[2];  // keys that each row sees
};

// The memory that chunk after chunk goes through: keys [KEYS, D], values as pack_values leaves them, scores [KEYS, PANEL] and weights as a
// panel.
template <typename C>
struct Chunk {
    C *keys, *values, *weights;
    float* scores;
};

template <typename C>
Chunk<C> take_chunk(Arena& arena, int64_t dim) {
    return {arena.take<C>(KEYS * dim), arena.take<C>(KEYS * dim), arena.take<C>(KEYS * PANEL), arena.take<float>(KEYS * PANEL)};
}

// A sum that was made relative to another maximum, and what is added to it.
inline Floats rescaled(Floats sum, Floats factor, Floats added) { return sum * factor + added; }

template <typename T, typename C>
void attend_columns(const Work<T>& work, Columns<C>& columns, int64_t first, const Chunk<C>& chunk) {
    constexpr int64_t WORD = 4 / sizeof(C);
    constexpr int M = TILE_KEYS<C>;
    const int64_t dim = work.dim, seen = std::min<int64_t>(KEYS, columns.last[1][LANES - 1] + 1 - first);
    if (seen <= 0) return;
    const int64_t count = (seen + M - 1) / M * M;
    for (int64_t k = 0; k < count; k += M) {
        Floats c[M][2] = {};
        tile<M>(chunk.keys + k * dim, dim, columns.queries, PANEL, dim, c);
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < 2; ++h) store(chunk.scores + (k + m) * PANEL + h * LANES, c[m][h] * work.step.scale);
    }
    cap(work.step, chunk.scores, count * PANEL);
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
        for (int64_t i = 0; work.step.hidden && i < std::min<int64_t>(LANES, columns.rows - h * LANES); ++i)
            work.hide(columns.row + h * LANES + i, first, scores + i, PANEL);
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
        columns.sum[h] = rescaled(columns.sum[h], factor[h], total);
    }
    for (int64_t d = 0; d < dim; d += M) {
        Floats c[M][2];
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < 2; ++h) c[m][h] = load(columns.out + (d + m) * PANEL + h * LANES) * factor[h];
        add_values(chunk.values, chunk.weights, d, dim, count, c);
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < 2; ++h) store(columns.out + (d + m) * PANEL + h * LANES, c[m][h]);
    }
}

// Results of PANEL columns back into rows: `from` and `count` say which.
template <typename T, typename C>
void unpack_columns(const Work<T>& work, const Columns<C>& columns, int64_t from, int64_t count) {
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
    using C = Operand<T>;
    static thread_local std::vector<Columns<C>> all;
    all.resize(num_columns);
    for (int64_t p = 0; p < num_columns; ++p) {
        Columns<C>& columns = all[p];
        columns.row = p * PANEL;
        columns.rows = std::min<int64_t>(PANEL, work.rows - columns.row);
        columns.queries = arena.take<C>(dim * PANEL);
        columns.out = arena.take<float>(dim * PANEL);
        std::fill(columns.out, columns.out + dim * PANEL, 0.0f);
        for (int h = 0; h < 2; ++h) {
            const int64_t row = p * PANEL + h * LANES, n = std::clamp<int64_t>(work.rows - row, 0, LANES);
            pack_columns(n, dim, columns.queries, h * LANES, [&](int i) { return work.q + (row + i) * dim; });
            columns.top[h] = broadcast(MINUS_INFINITY);
            columns.sum[h] = Floats{};
            for (int i = 0; i < LANES; ++i) {
                const int64_t r = std::min(row + i, work.rows - 1);
                columns.first[h][i] = static_cast<int32_t>(work.first_visible(r));
                columns.last[h][i] = static_cast<int32_t>(std::min<int64_t>(work.position(r), work.item.right - 1));
            }
        }
    }
    const Chunk<C> chunk = take_chunk<C>(arena, dim);
    int64_t offsets[KEYS];
    for (int64_t first = begin(work.step, work.item); first < work.item.right; first += KEYS) {
        const int64_t count = find(work.step, work.item, first, offsets);
        if (work.int8.keys) {
            work.load_chunk(count, offsets, offsets);
            for (int64_t i = 0; i < KEYS; ++i) offsets[i] = i * dim;
        }
        for (int64_t i = 0; i < KEYS; ++i) widen(work.keys + offsets[i], dim, chunk.keys + i * dim);
        pack_values(work.values, offsets, dim, chunk.values);
        for (Columns<C>& columns : all) attend_columns(work, columns, first, chunk);
    }
    for (int64_t p = 0; p < num_columns; ++p) unpack_columns(work, all[p], p * PANEL, std::min<int64_t>(PANEL, work.rows - p * PANEL));
}

}  // namespace native
