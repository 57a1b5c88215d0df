// Attention of few rows, as in decoding: bound by memory, so keys and values are read once, where they lie.
#pragma once

#include "attention/paged_work_cpu.h"

namespace native {

// Minus infinity where row must not see a key: scores[row] holds the keys from `first` on, of which there are `count`.
template <typename T>
void mask(const Work<T>& work, int64_t row, int64_t first, int64_t count) {
    float* scores = work.scores + row * KEYS;
    const int64_t begin = std::clamp<int64_t>(work.first_visible(row) - first, 0, KEYS);
    const int64_t end = std::clamp<int64_t>(std::min(work.position(row) + 1 - first, count), 0, KEYS);
    for (int64_t i = 0; i < begin; ++i) scores[i] = MINUS_INFINITY;
    for (int64_t i = end; i < KEYS; ++i) scores[i] = MINUS_INFINITY;
    work.hide(row, first, scores, 1);
}

// Turn a row's scores into weights relative to its largest score so far, and scale down what was summed before.
template <typename T>
void update_softmax(const Work<T>& work, int64_t row) {
    float* scores = work.scores + row * KEYS;
    Floats best = load(scores);
    for (int64_t i = LANES; i < KEYS; i += LANES) best = maximum(best, load(scores + i));
    const float before = work.top[row], now = std::max(before, largest(best));
    Floats total{};
    for (int64_t i = 0; i < KEYS; i += LANES) {
        Floats w = now == MINUS_INFINITY ? Floats{} : exponential(load(scores + i) - now);
        store(scores + i, w);
        total += w;
    }
    if (now > before) {
        const float factor = before == MINUS_INFINITY ? 0.0f : std::exp(before - now);
        float* out = work.out + row * work.dim;
        for (int64_t i = 0; i < work.dim; i += LANES) store(out + i, load(out + i) * factor);
        work.sum[row] *= factor;
        work.top[row] = now;
    }
    work.sum[row] += sum(total);
}

// Few rows: each key and value is read where it lies, once for R rows. Beside each, one of the keys at `ahead` is fetched.
template <typename T>
inline void fetch_row(const T* row, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 64 / sizeof(T)) fetch(row + i);
}

// acc + a · b, lane by lane, over as many elements as a register holds: LANES in float32, twice as many bfloat16s in pairs.
template <int WIDTH, typename C, typename T>
inline Floats multiply_add(Floats acc, const C* a, const T* b) {
    if constexpr (WIDTH == LANES)
        return acc + load(a) * load(b);
    else
        return dot_pairs(acc, load_as<Bits>(a), load_as<Bits>(b));
}

// Scores of R rows with up to KEYS keys. D is N times WIDTH elements (N = 0: any number).
template <int R, int N, int WIDTH, typename T>
void score_rows(const Work<T>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    const int64_t dim = N ? N * WIDTH : work.dim;
    const Operand<T>* q = work.q + row * dim;
    for (int64_t base = 0; base < count; base += LANES) {
        Floats fours[R][LANES / 4];
        for (int four = 0; four < LANES / 4; ++four) {
            Floats products[R][4] = {};
            for (int i = 0; i < 4; ++i) {
                const T* key = work.keys + offsets[base + 4 * four + i];
                fetch_row(work.keys + ahead[base + 4 * four + i], dim);
                for (int64_t j = 0; j < dim; j += WIDTH)
                    for (int r = 0; r < R; ++r) products[r][i] = multiply_add<WIDTH>(products[r][i], q + r * dim + j, key + j);
            }
            for (int r = 0; r < R; ++r) fours[r][four] = fold4(products[r]);
        }
        for (int r = 0; r < R; ++r) store(work.scores + (row + r) * KEYS + base, sums_of_folded(fours[r]) * work.step.scale);
    }
}

// Add R rows' weighted values to their outputs, WIDTH registers of each at a time. D is N registers (N = 0: any number).
template <int R, int N, int WIDTH = N, typename T>
void add_values(const Work<T>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    const int64_t dim = N ? N * LANES : work.dim;
    const float* weights = work.scores + row * KEYS;
    float* out = work.out + row * dim;
    for (int64_t part = 0; part < dim; part += WIDTH * LANES) {
        Floats total[R][WIDTH];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < WIDTH; ++j) total[r][j] = load(out + r * dim + part + j * LANES);
        for (int64_t i = 0; i < count; ++i) {
            const T* value = work.values + offsets[i] + part;
            if (part == 0) fetch_row(work.values + ahead[i], dim);
            for (int j = 0; j < WIDTH; ++j) {
                const Floats v = load(value + j * LANES);
                for (int r = 0; r < R; ++r) total[r][j] += v * weights[r * KEYS + i];
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < WIDTH; ++j) store(out + r * dim + part + j * LANES, total[r][j]);
    }
}

// The same with bfloat16 dot products, which take pairs of neighbouring keys. D is P times two registers.
template <int R, int P>
void add_value_pairs(const Work<bf16>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    bf16 weights[R][KEYS];
    Floats total[R][2 * P];
    float* out = work.out + row * work.dim;
    for (int r = 0; r < R; ++r) {
        for (int64_t i = 0; i < KEYS; i += LANES) store(weights[r] + i, load(work.scores + (row + r) * KEYS + i));
        for (int p = 0; p < P; ++p) spread(out + r * work.dim + p * 2 * LANES, total[r][2 * p], total[r][2 * p + 1]);
    }
    for (int64_t i = 0; i < count; i += 2) {
        const bf16* even = work.values + offsets[i];
        const bf16* odd = work.values + offsets[i + 1];
        for (int64_t j = i; j < i + 2; ++j) fetch_row(work.values + ahead[j], P * 2 * LANES);
        for (int p = 0; p < P; ++p) {
            Bits pairs[2];
            interleave_quarters(load_as<Words>(even + p * 2 * LANES), load_as<Words>(odd + p * 2 * LANES), pairs);
            for (int r = 0; r < R; ++r) {
                const Bits both = (Bits)broadcast_word(weights[r] + i);
                for (int h = 0; h < 2; ++h) total[r][2 * p + h] = dot_pairs(total[r][2 * p + h], both, pairs[h]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) gather(out + r * work.dim + p * 2 * LANES, total[r][2 * p], total[r][2 * p + 1]);
}

template <typename T>
constexpr bool IN_PAIRS = std::is_same_v<T, bf16> && MULTIPLIES_BF16;

template <int R, typename T>
void score(const Work<T>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    constexpr int WIDTH = IN_PAIRS<T> ? 2 * LANES : LANES;
    switch (work.dim) {
        case 64: score_rows<R, 64 / WIDTH, WIDTH>(work, row, count, offsets, ahead); break;
        case 96: score_rows<R, 96 / WIDTH, WIDTH>(work, row, count, offsets, ahead); break;
        case 128: score_rows<R, 128 / WIDTH, WIDTH>(work, row, count, offsets, ahead); break;
        default: score_rows<R, 0, LANES>(work, row, count, offsets, ahead);
    }
}

template <int R, typename T>
void add(const Work<T>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    if constexpr (IN_PAIRS<T> && LANES == 16) {
        switch (work.dim) {
            case 64: add_value_pairs<R, 32 / LANES>(work, row, count, offsets, ahead); break;
            case 96: add_value_pairs<R, 48 / LANES>(work, row, count, offsets, ahead); break;
            case 128: add_value_pairs<R, 64 / LANES>(work, row, count, offsets, ahead); break;
            default: add_values<R, 0, 1>(work, row, count, offsets, ahead);
        }
    } else if constexpr (LANES == 16) {
        switch (work.dim) {
            case 64: add_values<R, 4>(work, row, count, offsets, ahead); break;
            case 128: add_values<R, 8>(work, row, count, offsets, ahead); break;
            default: add_values<R, 0, 1>(work, row, count, offsets, ahead);
        }
    } else {
        work.dim % 32 ? add_values<R, 0, 16 / LANES>(work, row, count, offsets, ahead)
                      : add_values<R, 0, 4>(work, row, count, offsets, ahead);
    }
}

template <int R, typename T>
void attend_rows(const Work<T>& work, int64_t row, int64_t first, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    score<R>(work, row, count, offsets, ahead);
    for (int r = 0; r < R; ++r) {
        cap(work.step, work.scores + (row + r) * KEYS, count);
        mask(work, row + r, first, count);
        update_softmax(work, row + r);
    }
    add<R>(work, row, count, offsets, ahead);
}

constexpr int MOST_ROWS = REGISTERS == 32 ? 4 : 3;  // that share the loads of keys and values: 4 registers each

// Call body(number, row) for rows from 0 on, as many at a time as the number, a constant, says.
template <typename Body>
void for_rows(int64_t rows, const Body& body) {
    int64_t row = 0;
    for (; row + MOST_ROWS <= rows; row += MOST_ROWS) body(std::integral_constant<int, MOST_ROWS>{}, row);
    switch (rows - row) {
        case 3: body(std::integral_constant<int, 3>{}, row); break;
        case 2: body(std::integral_constant<int, 2>{}, row); break;
        case 1: body(std::integral_constant<int, 1>{}, row); break;
    }
}

// All rows of one head with up to KEYS keys, in the order that is fastest.
struct InAnyOrder {
    template <typename T>
    void operator()(const Work<T>& work, int64_t first, int64_t count, const int64_t* offsets, const int64_t* ahead) const {
        for_rows(work.rows, [&](auto m, int64_t row) { attend_rows<m>(work, row, first, count, offsets, ahead); });
    }
};

// All heads of an item; `upcoming` is the item that comes after it, or null.
template <typename T, typename Attend>
void few_rows(const Work<T>* heads, int64_t num_heads, const Item* upcoming, const Attend& attend) {
    const Step& step = heads->step;
    const Item& item = heads->item;
    int64_t offsets[KEYS], ahead[KEYS], in_chunk[KEYS];
    for (int64_t i = 0; i < KEYS; ++i) in_chunk[i] = i * step.head_dim;
    int64_t first = begin(step, item), count = find(step, item, first, offsets);
    for (; first < item.right; first += KEYS) {
        int64_t next_count = 0;
        if (first + KEYS < item.right)
            next_count = find(step, item, first + KEYS, ahead);
        else if (upcoming)
            find(step, *upcoming, upcoming->left, ahead);
        else
            std::copy(offsets, offsets + KEYS, ahead);
        for (const Work<T>* work = heads; work < heads + num_heads; ++work) {
            const int64_t *at = offsets, *next = ahead;
            if (work->int8.keys) {
                work->load_chunk(count, offsets, ahead);
                at = next = in_chunk;
            }
            attend(*work, first, count, at, next);
        }
        std::copy(ahead, ahead + KEYS, offsets);
        count = next_count;
    }
}

}  // namespace native
