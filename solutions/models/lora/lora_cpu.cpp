// What adapters add to the product of a linear layer, y += B · (A · x), for each row by its own adapter: rows of any number of
// adapters in one pass. A row is summed in the same order whatever rows stand beside it.
#include "core/platform/native.h"
#include "core/platform/shares.h"

using namespace native;

// An adapter's part of a layer: a [pieces * rank, k], and b [rank, n] transposed, so that neighbouring columns of y lie side by side.
extern "C" struct Adapter {
    const void *a, *b;
    int64_t rank;  // 0: it adds nothing
};

// Arguments as ctypes fills them in. x [m, k], rows ldx apart; y [m, n], rows ldy apart, is added to. slots [m] says which of
// `adapters` a row has; 0 is none. The columns of y are pieces with an A of their own each; piece p ends at column ends[p].
// Of a gated layer (`gated` not null) y is only read: it holds for each LANES columns of the gate those of up behind them, and
// gated [m, n / 2], rows dense, becomes silu(gate) · up.
extern "C" struct Adapted {
    int64_t m;
    const void* x;
    void *y, *gated;
    const int64_t* slots;
    const Adapter* adapters;
    const int64_t* ends;
    int64_t ldx, ldy, k, n, pieces;
};

namespace {

constexpr int64_t MAX_INNER = 3 * 512;  // three pieces of the highest rank
constexpr int WIDE = 4;                 // registers that are summed into side by side

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

// COUNT registers of y, from column `at` of b, plus inner · b.
template <int COUNT, typename T>
inline void add_columns(Floats (&y)[COUNT], const T* b, int64_t at, int64_t n, const float* inner, int64_t rank) {
    for (int64_t r = 0; r < rank; ++r)
        for (int w = 0; w < COUNT; ++w) y[w] += load(b + r * n + at + w * LANES) * inner[r];
}

template <typename T>
void add_piece(T* y, const T* b, int64_t start, int64_t end, int64_t n, const float* inner, int64_t rank) {
    int64_t at = start;
    const auto block = [&](auto& sums) {
        constexpr int COUNT = sizeof(sums) / sizeof(sums[0]);
        for (; at + COUNT * LANES <= end; at += COUNT * LANES) {
            for (int w = 0; w < COUNT; ++w) sums[w] = load(y + at + w * LANES);
            add_columns(sums, b, at, n, inner, rank);
            for (int w = 0; w < COUNT; ++w) store(y + at + w * LANES, sums[w]);
        }
    };
    Floats wide[WIDE], one[1];
    block(wide);
    block(one);
    for (; at < end; ++at) {
        float sum = to_float(y[at]);
        for (int64_t r = 0; r < rank; ++r) sum += to_float(b[r * n + at]) * inner[r];
        y[at] = from_float<T>(sum);
    }
}

template <typename T>
void gate(const T* y, T* to, const T* b, int64_t n, const float* inner, int64_t rank) {
    for (int64_t at = 0; at < n / 2; at += LANES) {
        Floats g[1] = {load(y + 2 * at)}, up[1] = {load(y + 2 * at + LANES)};
        add_columns(g, b, at, n, inner, rank);
        add_columns(up, b, n / 2 + at, n, inner + rank, rank);
        store(to + at, silu(g[0]) * up[0]);
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
        if (a.gated) return gate(y, static_cast<T*>(a.gated) + row * (a.n / 2), b, a.n, inner, adapter.rank);
        for (int64_t piece = 0, start = 0; piece < a.pieces; start = a.ends[piece++])
            add_piece(y, b, start, a.ends[piece], a.n, inner + piece * adapter.rank, adapter.rank);
    });
}

}  // namespace

extern "C" {
void adapt_f32(const Adapted* a) { adapt<float>(*a); }
void adapt_bf16(const Adapted* a) { adapt<bf16>(*a); }
}
