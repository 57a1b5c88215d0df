// What all packed matrix products share: epilogues, and how a panel is multiplied with all rows.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "core/platform/shares.h"
#include "core/platform/tiles.h"

// The arguments of a product, as ctypes fills them in: x [m, k] with rows ldx apart, w in n/PANEL panels, y [m, n] with rows ldy apart
// (half of n with SILU_MUL). bias is of the padded columns, or null. k is a multiple of 2 for bfloat16, of 16 for int8 and w4a8.
// group: elements of x (int8), weights (int4, codes8), or both (w4a8, at most MOST_GROUP) that share a scale; then there is memory for a
// number, for two with w4a8, for each row and group.
// other_x: memory for x [m, k] in the form that tiles read, where that is another one: see linear_layout.
// For int8 only: scales of the padded columns. For int4 and codes8 only: the columns' order [k], where it is another than that of x.
// more: products by the same kernel whose arguments lie behind these in memory, to be computed with this one, or 0.
extern "C" struct Linear {
    int64_t m;
    const void *x, *w;
    const float *scales, *bias;
    void *y, *other_x;
    float* of_groups;
    const int32_t* order;
    int64_t ldx, ldy, n, k, epilogue, group, more;
};

namespace native {

enum Epilogue { STORE = 0, ADD = 1, SILU_MUL = 2 };

// What becomes of a tile's sums. With SILU_MUL a panel's columns are LANES of the gate, then the same of up, and y has half of them.
template <typename T>
struct Output {
    T* y;
    int64_t ldy;
    const float* bias;  // of the padded columns, or null
    int epilogue;

    template <int M>
    void write(Floats (&c)[M][2], int64_t row, int64_t column, int64_t width) const {
        for (int m = 0; m < M; ++m) {
            if (bias)
                for (int h = 0; h < 2; ++h) c[m][h] += load(bias + column + h * LANES);
            if (epilogue == SILU_MUL) {
                store(y + (row + m) * ldy + column / 2, silu(c[m][0]) * c[m][1]);
                continue;
            }
            T* to = y + (row + m) * ldy + column;
            if (width == PANEL) {
                for (int h = 0; h < 2; ++h) store(to + h * LANES, epilogue == ADD ? c[m][h] + load(to + h * LANES) : c[m][h]);
            } else {
                for (int64_t j = 0; j < width; ++j)
                    to[j] = from_float<T>(epilogue == ADD ? c[m][j / LANES][j % LANES] + to_float(to[j]) : c[m][j / LANES][j % LANES]);
            }
        }
    }
};

// Weights in the type of the activations: float32 or bfloat16.
template <typename T>
struct Plain {
    static constexpr int ROWS = std::is_same_v<T, bf16> ? WIDE_TILE_ROWS : TILE_ROWS;  // most of a tile
    static constexpr int FEW = FEW_ROWS;
    const Operand<T>* x;
    const T* packed;
    int64_t ldx, k;

    int64_t panel_bytes() const { return k * PANEL * sizeof(T); }
    int64_t bytes_a_step() const { return STEP; }
    const Plain& open(int64_t, int64_t) const { return *this; }

    template <int M, typename Y>
    void rows(int64_t panel, int64_t row, int64_t width, const Output<Y>& out, Ahead ahead) const {
        Floats c[M][2] = {};
        tile<M, true>(x + row * ldx, ldx, packed + panel * k * PANEL, PANEL, k, c, ahead);
        out.template write<M>(c, row, panel * PANEL, width);
    }
};

// int8 weights with a scale for each column; activations as bytes around MIDDLE, with a scale for each group of a row's. What that
// adds, MIDDLE times the sum of the group's weights, is where the sums begin.
// A panel holds for each group PANEL such sums, less the factor, in 16 bits, then the weights of the group as tiles.h wants them.
struct Int8 {
    static constexpr int ROWS = WIDE_TILE_ROWS, FEW = FEW_ROWS;
    static constexpr int64_t HEAD = 2 * PANEL;
    const Operand<uint8_t>* x;
    const float* row_scales;  // [m, groups]
    const uint8_t* packed;
    const float* column_scales;
    int64_t k, group;

    int64_t groups() const { return (k + group - 1) / group; }
    int64_t panel_bytes() const { return groups() * HEAD + k * PANEL; }
    int64_t bytes_a_step() const { return STEP; }
    const Int8& open(int64_t, int64_t) const { return *this; }

    template <int M, typename Y>
    void rows(int64_t panel, int64_t row, int64_t width, const Output<Y>& out, Ahead ahead) const {
        Floats c[M][2] = {};
        const uint8_t* at = packed + panel * panel_bytes();
        const int64_t all = groups();
        const float* scales = row_scales + row * all;
        for (int64_t g = 0; g < all; ++g) {
            const int64_t begin = g * group, count = std::min(group, k - begin);
            Ints sums[M][2];
            for (int h = 0; h < 2; ++h) {
                const Ints start = __builtin_convertvector(load_as<Shorts>(at + h * PANEL), Ints) * -MIDDLE;
                for (int m = 0; m < M; ++m) sums[m][h] = start;
            }
            at += HEAD;
            fetch(ahead.next);  // a head
            ahead.next += HEAD * ahead.stride / STEP;
            // Into memory with c, or g++ keeps it in registers and reads each number of the panel M times.
            if constexpr (M == 6 || M == 7) asm volatile("" : "+m"(c));
            tile<M, true>(x + row * k + begin, k, reinterpret_cast<const int8_t*>(at), count, sums, ahead);
            at += count * PANEL;
            ahead.next += count / 4 * ahead.stride;
            for (int m = 0; m < M; ++m) {
                const Floats scale = broadcast(scales[m * all + g]);
                for (int h = 0; h < 2; ++h) c[m][h] += __builtin_convertvector(sums[m][h], Floats) * scale;
            }
        }
        for (int h = 0; h < 2; ++h) {
            const Floats scale = load(column_scales + panel * PANEL + h * LANES);
            for (int m = 0; m < M; ++m) c[m][h] *= scale;
        }
        out.template write<M>(c, row, panel * PANEL, width);
    }
};

template <int M, typename Weights, typename Y>
void multiply_rows(const Weights& w, const Output<Y>& out, int64_t panel, int64_t row, int64_t rows, int64_t width, Ahead ahead) {
    if (rows == M)
        w.template rows<M>(panel, row, width, out, ahead);
    else if constexpr (M > 1)
        multiply_rows<M - 1>(w, out, panel, row, rows, width, ahead);
}

// One panel with `m` rows from `first` on, in tiles as even as can be: a lone row at the end would wait for memory, not compute. Several
// tiles fetch their shares of the next panel, a lone one what it needs soon, if anything. Weights that are brought into another form first
// are so once for all tiles.
template <typename Weights, typename Y>
void multiply_panel(const Weights& w, const Output<Y>& out, int64_t panel, int64_t first, int64_t m, int64_t n) {
    const int64_t width = std::min<int64_t>(PANEL, n - panel * PANEL);
    const int64_t tiles = (m + Weights::ROWS - 1) / Weights::ROWS, bytes = w.panel_bytes();
    const int64_t stride = m <= Weights::FEW ? 0 : (w.bytes_a_step() + tiles - 1) / tiles;
    const char* next = reinterpret_cast<const char*>(w.packed) + panel * bytes + (tiles == 1 ? std::min(bytes, SOON) : bytes);
    const auto& opened = w.open(panel, tiles);
    for (int64_t i = 0; i < tiles; ++i) {
        const int64_t row = m * i / tiles;
        const Ahead ahead{next + bytes * i / tiles, stride};
        multiply_rows<Weights::ROWS>(opened, out, panel, first + row, m * (i + 1) / tiles - row, width, ahead);
    }
}

// Call body(a, i) for every i below size(a) of a product and of those behind it, all in one loop.
template <typename Size, typename Body>
void for_all(const Linear& first, int64_t grain, const Size& size, const Body& body) {
    const Linear* all = &first;
    std::vector<int64_t> starts(first.more + 2);
    for (int64_t p = 0; p <= first.more; ++p) starts[p + 1] = starts[p] + size(all[p]);
    parallel_for(starts.back(), grain, [&](int64_t i) {
        const int64_t p = std::upper_bound(starts.begin(), starts.end(), i) - starts.begin() - 1;
        body(all[p], i - starts[p]);
    });
}

// Rows that go through all panels before the next ones do: as many floats of x as the second-level cache holds.
constexpr int64_t BLOCK = MULTIPLIES_BF16 ? std::numeric_limits<int64_t>::max() : 96;

// A product and those behind it: weights_of(a) says how the weights of one are to be read.
template <typename T, typename WeightsOf>
void multiply(const Linear& first, const WeightsOf& weights_of) {
    const auto panels = [](const Linear& a) { return (a.n + PANEL - 1) / PANEL; };
    const auto units = [&](const Linear& a) { return a.m ? ((a.m - 1) / BLOCK + 1) * panels(a) : 0; };
    for_all(first, 1, units, [&](const Linear& a, int64_t unit) {
        const Output<T> out{static_cast<T*>(a.y), a.ldy, a.bias, static_cast<int>(a.epilogue)};
        const int64_t row = unit / panels(a) * BLOCK, panel = unit % panels(a);
        multiply_panel(weights_of(a), out, panel, row, std::min(BLOCK, a.m - row), a.n);
    });
}

}  // namespace native
