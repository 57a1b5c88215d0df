// What adapters add to the product of a linear layer, y += B · (A · x), for each row by its own adapter: rows of any number of
// adapters in one pass. A row is summed in the same order whatever rows stand beside it.
#include <algorithm>

#include "core/platform/native.h"
#include "core/platform/shares.h"

using namespace native;

// An adapter's part of a layer: a [pieces * rank, k], and b transposed, so that neighbouring columns of y lie side by side: of each
// piece blocks of BLOCK columns, [rank, BLOCK], the last one filled up with zeros. Both are read from front to back.
extern "C" struct Adapter {
    const void *a, *b;
    int64_t rank;  // 0: it adds nothing
};

// Arguments as ctypes fills them in. x [m, k], rows ldx apart; y [m, n], rows ldy apart, is added to. slots [m] says which of
// `adapters` a row has; 0 is none. The columns of y are pieces with an A of their own each; piece p has columns[p].
// Of a gated layer (`gated` not null) y is only read: it holds for each LANES columns of the gate those of up behind them, and
// gated [m, columns[0]], rows dense, becomes silu(gate) · up.
extern "C" struct Adapted {
    int64_t m;
    const void* x;
    void *y, *gated;
    const int64_t* slots;
    const Adapter* adapters;
    const int64_t* columns;
    int64_t ldx, ldy, k, pieces;
};

namespace {

constexpr int64_t MAX_INNER = 3 * 512;  // three pieces of the highest rank
constexpr int64_t BLOCK = 64;
constexpr int WIDE = 4;  // registers that are summed into side by side

template <typename T>
float dot(const T* a, const T* b, int64_t n) {
    Floats sums[WIDE]{};
    int64_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES)
        for (int w = 0; w < WIDE; ++w) sums[w] += load(a + i + w * LANES) * load(b + i + w * LANES);
    for (; i + LANES <= n; i += LANES) sums[0] += load(a + i) * load(b + i);
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; ++i) total += to_float(a[i]) * to_float(b[i]);
    return total;
}

// inner · b, for COUNT registers of columns of a block.
template <int COUNT, typename T>
inline void sum_columns(Floats (&sums)[COUNT], const T* b, const float* inner, int64_t rank) {
    for (int64_t r = 0; r < rank; ++r)
        for (int w = 0; w < COUNT; ++w) sums[w] += load(b + r * BLOCK + w * LANES) * inner[r];
}

// A piece's columns of y plus inner · b; returns where the next piece's b begins.
template <typename T>
const T* add_piece(T* y, const T* b, int64_t columns, const float* inner, int64_t rank) {
    for (int64_t start = 0; start < columns; start += BLOCK, b += rank * BLOCK)
        for (int64_t at = start; at < std::min(columns, start + BLOCK); at += WIDE * LANES) {
            Floats sums[WIDE]{};
            sum_columns(sums, b + (at - start), inner, rank);
            for (int w = 0; w < WIDE; ++w) {
                T* to = y + at + w * LANES;
                const int64_t left = columns - at - w * LANES;
                if (left >= LANES)
                    store(to, load(to) + sums[w]);
                else
                    for (int64_t i = 0; i < left; ++i) to[i] = from_float<T>(to_float(to[i]) + sums[w][i]);
            }
        }
    return b;
}

// The gate of y plus inner · b; `columns` of each half, a multiple of LANES.
template <typename T>
void gate(const T* y, T* to, const T* b, int64_t columns, const float* inner, int64_t rank) {
    const T* of_up = b + (columns + BLOCK - 1) / BLOCK * rank * BLOCK;
    for (int64_t start = 0; start < columns; start += BLOCK, b += rank * BLOCK, of_up += rank * BLOCK)
        for (int64_t at = start; at < std::min(columns, start + BLOCK); at += 2 * LANES) {
            Floats g[2]{}, up[2]{};
            sum_columns(g, b + (at - start), inner, rank);
            sum_columns(up, of_up + (at - start), inner + rank, rank);
            for (int64_t w = 0; w < 2 && at + w * LANES < columns; ++w) {
                const T* both = y + 2 * (at + w * LANES);
                store(to + at + w * LANES, silu(load(both) + g[w]) * (load(both + LANES) + up[w]));
            }
        }
}

template <typename T>
void adapt(const Adapted& a) {
    parallel_for(a.m, 1, [&](int64_t row) {
        const Adapter none{nullptr, nullptr, 0};
        const Adapter& adapter = a.slots[row] ? a.adapters[a.slots[row]] : none;
        if (!adapter.rank && !a.gated) return;
        const T *x = static_cast<const T*>(a.x) + row * a.ldx, *b = static_cast<const T*>(adapter.b);
        T* y = static_cast<T*>(a.y) + row * a.ldy;
        float inner[MAX_INNER];
        for (int64_t j = 0; j < a.pieces * adapter.rank; ++j) inner[j] = dot(x, static_cast<const T*>(adapter.a) + j * a.k, a.k);
        if (a.gated) return gate(y, static_cast<T*>(a.gated) + row * a.columns[0], b, a.columns[0], inner, adapter.rank);
        for (int64_t piece = 0; piece < a.pieces; y += a.columns[piece++])
            b = add_piece(y, b, a.columns[piece], inner + piece * adapter.rank, adapter.rank);
    });
}

}  // namespace

extern "C" {
void adapt_f32(const Adapted* a) { adapt<float>(*a); }
void adapt_bf16(const Adapted* a) { adapt<bf16>(*a); }
}
