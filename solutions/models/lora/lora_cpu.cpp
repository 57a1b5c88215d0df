// What adapters add to the product of a linear layer, y += B · (A · x), for each row by its own adapter: rows of any number of
// adapters in two loops, one by A and one by B. A thread takes some of an adapter's weights and all rows of a span with them, so
// the weights are read once for a span. A row is summed in the same order whatever rows stand beside it.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/platform/native.h"
#include "core/platform/shares.h"
#include "models/lora/lora_cpu.h"

using namespace native;

namespace {

constexpr int64_t BLOCK = 64;
constexpr int ROWS = REGISTERS / 8;  // of x, that are computed side by side
constexpr int COLS = 4;              // of a, with them
constexpr int WIDE = 4;              // registers of columns of b, with them
constexpr int64_t WORTH_HELP = 1 << 17;  // products; what has fewer is done before a helper has begun

// COLS rows of a with COUNT rows of x.
template <int COUNT, typename T>
void dots(const T* const* x, const T* a, int64_t k, float* const* to) {
    Floats sums[COUNT][COLS]{};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        Floats weights[COLS];
        for (int c = 0; c < COLS; ++c) weights[c] = load(a + c * k + i);
        for (int row = 0; row < COUNT; ++row) {
            const Floats values = load(x[row] + i);
            for (int c = 0; c < COLS; ++c) sums[row][c] += values * weights[c];
        }
    }
    for (int row = 0; row < COUNT; ++row)
        for (int c = 0; c < COLS; ++c) {
            float total = sum(sums[row][c]);
            for (int64_t j = i; j < k; ++j) total += to_float(x[row][j]) * to_float(a[c * k + j]);
            to[row][c] = total;
        }
}

// sums[row][w] += inner[row] · b, for SIDE registers of columns of a block.
template <int COUNT, int SIDE, typename T>
inline void sum_columns(Floats (&sums)[COUNT][SIDE], const T* b, const float* const* inner, int64_t rank) {
    for (int64_t r = 0; r < rank; ++r) {
        Floats weights[SIDE];
        for (int w = 0; w < SIDE; ++w) weights[w] = load(b + r * BLOCK + w * LANES);
        for (int row = 0; row < COUNT; ++row)
            for (int w = 0; w < SIDE; ++w) sums[row][w] += weights[w] * inner[row][r];
    }
}

// `width` columns of y, at most BLOCK, plus inner · b.
template <int COUNT, typename T>
void add_block(T* const* y, const T* b, int64_t width, const float* const* inner, int64_t rank) {
    for (int64_t at = 0; at < width; at += WIDE * LANES) {
        Floats sums[COUNT][WIDE]{};
        sum_columns(sums, b + at, inner, rank);
        for (int row = 0; row < COUNT; ++row)
            for (int w = 0; w < WIDE; ++w) {
                T* to = y[row] + at + w * LANES;
                const int64_t left = width - at - w * LANES;
                if (left >= LANES)
                    store(to, load(to) + sums[row][w]);
                else
                    for (int64_t i = 0; i < left; ++i) to[i] = from_float<T>(to_float(to[i]) + sums[row][w][i]);
            }
    }
}

// The gate of y plus inner · b; `width` of each half, a multiple of LANES; of_up is b of the second half, whose inner lies behind.
template <int COUNT, typename T>
void gate_block(const T* const* y, T* const* to, const T* b, const T* of_up, int64_t width, const float* const* inner, int64_t rank) {
    const float* inner_up[COUNT];
    for (int row = 0; row < COUNT; ++row) inner_up[row] = inner[row] + rank;
    for (int64_t at = 0; at < width; at += 2 * LANES) {
        Floats gate[COUNT][2]{}, up[COUNT][2]{};
        sum_columns(gate, b + at, inner, rank);
        sum_columns(up, of_up + at, inner_up, rank);
        for (int row = 0; row < COUNT; ++row)
            for (int64_t w = 0; w < 2 && at + w * LANES < width; ++w) {
                const T* both = y[row] + 2 * (at + w * LANES);
                store(to[row] + at + w * LANES, silu(load(both) + gate[row][w]) * (load(both + LANES) + up[row][w]));
            }
    }
}

// Call body(first, COUNT as a type) for all rows of a span, ROWS at a time and the last ones alone.
template <typename Body>
void for_rows(const Span& span, const Body& body) {
    int64_t first = span.first;
    for (; first + ROWS <= span.end; first += ROWS) body(first, std::integral_constant<int, ROWS>{});
    for (; first < span.end; ++first) body(first, std::integral_constant<int, 1>{});
}

// A share of the second loop: a block of columns, for all rows of a span.
template <typename T>
void expand(const Adapted& a, const Span& span, const Adapter& adapter, int64_t block, int64_t blocks, const float* inner, int64_t stride) {
    int64_t piece = 0, start = 0, at = block * BLOCK;  // `at` columns into the piece, which starts at column `start`
    for (; at >= a.columns[piece]; start += a.columns[piece++]) at -= (a.columns[piece] + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t width = std::min(BLOCK, a.columns[piece] - at), rank = adapter.rank;
    const T* b = static_cast<const T*>(adapter.b) + block * rank * BLOCK;
    for_rows(span, [&](int64_t first, auto count) {
        constexpr int COUNT = count;
        const float* from[COUNT];
        T *y[COUNT], *to[COUNT];
        for (int i = 0; i < COUNT; ++i) {
            const int64_t row = a.order[first + i];
            from[i] = inner + (first + i) * stride + piece * rank;
            y[i] = static_cast<T*>(a.y) + row * a.ldy + (a.gated ? 2 : 1) * (start + at);
            to[i] = static_cast<T*>(a.gated) + (a.gated ? row * a.columns[0] + at : 0);
        }
        if (a.gated)
            gate_block<COUNT, T>(y, to, b, b + blocks * rank * BLOCK, width, from, rank);
        else
            add_block<COUNT, T>(y, b, width, from, rank);
    });
}

template <typename T>
void adapt(const Adapted& a) {
    int64_t spans = 0, chunks = 0, blocks = 0;
    for (; a.spans[spans].slot >= 0; ++spans)
        chunks = std::max(chunks, (a.pieces * a.adapters[a.spans[spans].slot].rank + COLS - 1) / COLS);
    for (int64_t piece = 0; piece < (a.gated ? 1 : a.pieces); ++piece) blocks += (a.columns[piece] + BLOCK - 1) / BLOCK;
    const int64_t stride = chunks * COLS;
    static thread_local std::vector<float> memory;  // A · x, [m, stride], rows as in `order`
    if (memory.size() < static_cast<size_t>(a.m * stride)) memory.resize(a.m * stride);
    float* inner = memory.data();
    const bool alone = a.m * stride * a.k < WORTH_HELP;
    parallel_for(spans * chunks, alone ? std::max<int64_t>(1, spans * chunks) : 1, [&](int64_t share) {
        const Span& span = a.spans[share / chunks];
        const Adapter& adapter = a.adapters[span.slot];
        const int64_t j = share % chunks * COLS;
        if (j >= a.pieces * adapter.rank) return;
        for_rows(span, [&](int64_t first, auto count) {
            const T* x[count];
            float* to[count];
            for (int i = 0; i < count; ++i) {
                x[i] = static_cast<const T*>(a.x) + a.order[first + i] * a.ldx;
                to[i] = inner + (first + i) * stride + j;
            }
            dots<count, T>(x, static_cast<const T*>(adapter.a) + j * a.k, a.k, to);
        });
    });
    parallel_for(spans * blocks, alone && !a.gated ? spans * blocks : 1, [&](int64_t share) {
        const Span& span = a.spans[share / blocks];
        const Adapter& adapter = a.adapters[span.slot];
        if (adapter.rank || a.gated) expand<T>(a, span, adapter, share % blocks, blocks, inner, stride);
    });
}

}  // namespace

extern "C" {
void adapt_f32(const Adapted* a) { adapt<float>(*a); }
void adapt_bf16(const Adapted* a) { adapt<bf16>(*a); }
}
