// y = x · Wᵀ on a CPU, W packed once into panels (see core/native.h): one pass over the weights for up to 8 rows, so that decoding
// runs at the speed of memory, and full register tiles for more, so that prefill runs at the speed of the dot product units.
//
// Every row is summed in the same order whatever rows stand beside it, so a token's result does not depend on its batch.
#include "quantization/kernels/linear_cpu.h"
#include "quantization/kernels/linear_int4_cpu.h"

using namespace native;

namespace {

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
// (half of n with SILU_MUL). bias is of the padded columns, or null. k is a multiple of 2 for bfloat16, of 16 for int8.
// For int8 only: scales and sums, of the padded columns too, and memory for the quantized x, bytes [m, k] and row_scales [m].
// For int4 only: group, the columns that share a scale, and memory for the sums of x, row_scales [m, groups]; where the columns are
// in another order than those of x, that order [k] and memory for x in it, bytes [m, k] of x's type.
extern "C" struct Linear {
    int64_t m;
    const void *x, *w;
    const float* scales;
    const int32_t* sums;
    const float* bias;
    void* y;
    uint8_t* bytes;
    float* row_scales;
    const int32_t* order;
    int64_t ldx, ldy, n, k, epilogue, group;
};

namespace {

template <typename T>
Output<T> output(const Linear& a) {
    return {static_cast<T*>(a.y), a.ldy, a.bias, static_cast<int>(a.epilogue)};
}

template <typename T>
void linear(const Linear& a) {
    const Plain<T> weights{static_cast<const T*>(a.x), static_cast<const T*>(a.w), a.ldx, a.k};
    on_all_threads([&] { multiply(weights, output<T>(a), a.m, a.n); });
}

template <typename T>
void linear_int8(const Linear& a) {
    const Int8 weights{a.bytes, a.row_scales, static_cast<const int8_t*>(a.w), a.scales, a.sums, a.k};
    on_all_threads([&] {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.m; ++row)
            a.row_scales[row] = quantize(static_cast<const T*>(a.x) + row * a.ldx, a.bytes + row * a.k, a.k);
        multiply(weights, output<T>(a), a.m, a.n);
    });
}

template <typename T>
void linear_int4(const Linear& a) {
    const T* x = static_cast<const T*>(a.x);
    T* ordered = reinterpret_cast<T*>(a.bytes);
    const Int4<T> weights{a.order ? ordered : x, a.order ? a.k : a.ldx, a.k, a.group, static_cast<const uint8_t*>(a.w), a.row_scales};
    on_all_threads([&] {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.m; ++row) {
            if (a.order)
                for (int64_t i = 0; i < a.k; ++i) ordered[row * a.k + i] = x[row * a.ldx + a.order[i]];
            weights.sum_groups(row, a.row_scales + row * weights.groups());
        }
        multiply(weights, output<T>(a), a.m, a.n);
    });
}

}  // namespace

extern "C" {
void linear_f32(const Linear* a) { linear<float>(*a); }
void linear_bf16(const Linear* a) { linear<bf16>(*a); }
void linear_int8_f32(const Linear* a) { linear_int8<float>(*a); }
void linear_int8_bf16(const Linear* a) { linear_int8<bf16>(*a); }
void linear_int4_f32(const Linear* a) { linear_int4<float>(*a); }
void linear_int4_bf16(const Linear* a) { linear_int4<bf16>(*a); }
}
