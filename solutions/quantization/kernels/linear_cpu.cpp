// y = x · Wᵀ on a CPU, W packed once into panels (see core/native.h): one pass over the weights for up to 8 rows, so that decoding
// runs at the speed of memory, and full register tiles for more, so that prefill runs at the speed of the dot product units.
//
// Every row is summed in the same order whatever rows stand beside it, so a token's result does not depend on its batch.
#include <algorithm>
#include <vector>

#include "core/native.h"

using namespace native;

namespace {

enum Epilogue { STORE = 0, ADD = 1, SILU_MUL = 2 };

// What becomes of a tile's sums. With SILU_MUL a panel's columns are 16 of the gate, then the same 16 of up, and y has half of them.
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
    const T *x, *packed;
    int64_t ldx, k;

    template <int M, bool LAST, typename Y>
    void rows(int64_t panel, int64_t row, int64_t width, const Output<Y>& out) const {
        Floats c[M][2] = {};
        tile<M, LAST>(x + row * ldx, ldx, packed + panel * k * PANEL, PANEL, k, c, k * PANEL);
        out.template write<M>(c, row, panel * PANEL, width);
    }
};

// int8 weights with a scale for each column. Activations are quantized to unsigned bytes around 128, with a scale for each row; what
// the 128 adds, 128 times the sum of the column, is taken off again.
struct Int8 {
    const uint8_t* x;
    const float* row_scales;
    const int8_t* packed;
    const float* column_scales;
    const int32_t* column_sums;
    int64_t k;

    template <int M, bool LAST, typename Y>
    void rows(int64_t panel, int64_t row, int64_t width, const Output<Y>& out) const {
        Ints sums[M][2] = {};
        tile<M, LAST>(x + row * k, k, packed + panel * k * PANEL, k, sums, k * PANEL);
        Floats c[M][2];
        for (int h = 0; h < 2; ++h) {
            const int64_t column = panel * PANEL + h * LANES;
            const Ints offset = load_as<Ints>(column_sums + column) * 128;
            const Floats scale = load(column_scales + column);
            for (int m = 0; m < M; ++m) c[m][h] = __builtin_convertvector(sums[m][h] - offset, Floats) * (scale * row_scales[row + m]);
        }
        out.template write<M>(c, row, panel * PANEL, width);
    }
};

template <typename Weights, typename Y>
void multiply_panel(const Weights& w, const Output<Y>& out, int64_t panel, int64_t m, int64_t n) {
    const int64_t width = std::min<int64_t>(PANEL, n - panel * PANEL);
    int64_t row = 0;
    for (; row + TILE_ROWS < m; row += TILE_ROWS) w.template rows<TILE_ROWS, false>(panel, row, width, out);
    switch (m - row) {  // the last rows go on to fetch the next panel
        case 8: w.template rows<8, true>(panel, row, width, out); break;
        case 7: w.template rows<7, true>(panel, row, width, out); break;
        case 6: w.template rows<6, true>(panel, row, width, out); break;
        case 5: w.template rows<5, true>(panel, row, width, out); break;
        case 4: w.template rows<4, true>(panel, row, width, out); break;
        case 3: w.template rows<3, true>(panel, row, width, out); break;
        case 2: w.template rows<2, true>(panel, row, width, out); break;
        case 1: w.template rows<1, true>(panel, row, width, out); break;
    }
}

template <typename Weights, typename Y>
void multiply(const Weights& w, const Output<Y>& out, int64_t m, int64_t n) {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < (n + PANEL - 1) / PANEL; ++panel) multiply_panel(w, out, panel, m, n);
}

// One row to bytes; returns its scale.
template <typename T>
float quantize(const T* x, uint8_t* bytes, int64_t k) {
    Floats most{};
    for (int64_t i = 0; i < k; i += LANES) {
        const Floats v = load(x + i);
        most = maximum(most, maximum(v, -v));
    }
    const float top = largest(most), scale = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0.0f;
    for (int64_t i = 0; i < k; i += LANES) {
        const Floats shifted = load(x + i) * inverse + (128.0f + 8388608.0f);  // 2^23 leaves the rounded integer in the low bits
        typedef uint8_t Bytes __attribute__((vector_size(16)));
        store_as(bytes + i, __builtin_convertvector((Bits)shifted & 0xff, Bytes));
    }
    return scale;
}

}  // namespace

// The arguments of a product, as ctypes fills them in: x [m, k] with rows ldx apart, w in n/32 panels, y [m, n] with rows ldy apart
// (half of n with SILU_MUL). bias is of the padded columns, or null. scales and sums, of the padded columns too, are for int8 only.
// k is a multiple of 2 for bfloat16, of 16 for int8.
extern "C" struct Linear {
    const void *x, *w;
    const float* scales;
    const int32_t* sums;
    const float* bias;
    void* y;
    int64_t ldx, ldy, m, n, k, epilogue;
};

namespace {

template <typename T>
Output<T> output(const Linear& a) {
    return {static_cast<T*>(a.y), a.ldy, a.bias, static_cast<int>(a.epilogue)};
}

template <typename T>
void linear(const Linear& a) {
#pragma omp parallel num_threads(threads())
    multiply(Plain<T>{static_cast<const T*>(a.x), static_cast<const T*>(a.w), a.ldx, a.k}, output<T>(a), a.m, a.n);
}

template <typename T>
void linear_int8(const Linear& a) {
    static thread_local std::vector<uint8_t> memory;
    static thread_local std::vector<float> row_scales;
    memory.resize(a.m * a.k);
    row_scales.resize(a.m);
    uint8_t* bytes = memory.data();
    float* of_row = row_scales.data();
#pragma omp parallel num_threads(threads())
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.m; ++row) of_row[row] = quantize(static_cast<const T*>(a.x) + row * a.ldx, bytes + row * a.k, a.k);
        multiply(Int8{bytes, of_row, static_cast<const int8_t*>(a.w), a.scales, a.sums, a.k}, output<T>(a), a.m, a.n);
    }
}

}  // namespace

extern "C" {
void linear_f32(const Linear* a) { linear<float>(*a); }
void linear_bf16(const Linear* a) { linear<bf16>(*a); }
void linear_int8_f32(const Linear* a) { linear_int8<float>(*a); }
void linear_int8_bf16(const Linear* a) { linear_int8<bf16>(*a); }
}
