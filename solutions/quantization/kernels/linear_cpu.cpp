// y = x · Wᵀ on a CPU, W packed once into panels (see core/platform/tiles.h): one pass over the weights for up to 8 rows, so that decoding
// runs at the speed of memory, and full register tiles for more, so that prefill runs at the speed of the dot product units.
//
// Every row is summed in the same order whatever rows stand beside it, so a token's result does not depend on its batch.
#include "quantization/kernels/linear_cpu.h"
#include "quantization/kernels/linear_groups_cpu.h"

using namespace native;

namespace {

constexpr int64_t ROWS = 4;  // of a share, when activations are brought into another form

[[maybe_unused]] inline void store_operands(uint8_t* to, Ints bytes) { store_as(to, to_bytes<Bytes>(bytes)); }
[[maybe_unused]] inline void store_operands(int8_t* to, Ints bytes) { store_as(to, to_bytes<SignedBytes>(bytes)); }
[[maybe_unused]] inline void store_operands(int16_t* to, Ints bytes) {
    store_as(to, shuffle(__builtin_convertvector(bytes, Shorts), [](int i) { return (i & ~3) | (i & 1) << 1 | (i & 2) >> 1; }));
}

// Part of a row to bytes around `middle`; returns their scale, and their sum less the middle of each.
struct Quantized {
    float scale, sum;
};
template <typename T, typename Byte>
Quantized quantize(const T* x, Byte* bytes, int64_t k, int32_t middle) {
    Floats most{};
    for (int64_t i = 0; i < k; i += LANES) {
        const Floats v = load(x + i);
        most = maximum(most, maximum(v, -v));
    }
    const float top = largest(most), inverse = top > 0 ? 127.0f / top : 0.0f;
    Ints total{};
    for (int64_t i = 0; i < k; i += LANES) {
        const Floats shifted = load(x + i) * inverse + 12582912.0f;  // 1.5 * 2^23 leaves the rounded integer in the low bits
        const Ints numbers = (Ints)shifted - 0x4b400000;
        total += numbers;
        store_operands(bytes + i, numbers + middle);
    }
    return {top / 127.0f, sum(__builtin_convertvector(total, Floats))};
}

template <typename T>
Output<T> output(const Linear& a) {
    return {static_cast<T*>(a.y), a.ldy, a.bias, static_cast<int>(a.epilogue)};
}

template <typename T>
void linear(const Linear& a) {
    const T* x = static_cast<const T*>(a.x);
    const T* packed = static_cast<const T*>(a.w);
    if constexpr (std::is_same_v<Operand<T>, T>) {
        multiply(Plain<T>{x, packed, a.ldx, a.k}, output<T>(a), a.m, a.n);
    } else {
        Operand<T>* wide = static_cast<Operand<T>*>(a.other_x);
        parallel_for(a.m, ROWS, [&](int64_t row) { widen(x + row * a.ldx, a.k, wide + row * a.k); });
        multiply(Plain<T>{wide, packed, a.k, a.k}, output<T>(a), a.m, a.n);
    }
}

template <typename T>
void linear_int8(const Linear& a) {
    auto* bytes = static_cast<Operand<uint8_t>*>(a.other_x);
    const Int8 weights{bytes, a.of_groups, static_cast<const uint8_t*>(a.w), a.scales, a.k, a.group};
    const int64_t groups = weights.groups();
    parallel_for(a.m, ROWS, [&](int64_t row) {
        for (int64_t g = 0, i = 0; g < groups; ++g, i += a.group)
            a.of_groups[row * groups + g] =
                quantize(static_cast<const T*>(a.x) + row * a.ldx + i, bytes + row * a.k + i, std::min(a.group, a.k - i), MIDDLE).scale;
    });
    multiply(weights, output<T>(a), a.m, a.n);
}

template <typename T>
void linear_w4a8(const Linear& a) {
    auto* bytes = static_cast<Operand<int8_t>*>(a.other_x);
    const Int4Bytes weights{bytes, a.of_groups, static_cast<const uint8_t*>(a.w), a.k, a.group};
    const int64_t groups = weights.groups();
    parallel_for(a.m, ROWS, [&](int64_t row) {
        float* numbers = a.of_groups + row * 2 * groups;
        for (int64_t g = 0, i = 0; g < groups; ++g, i += a.group) {
            const Quantized found =
                quantize(static_cast<const T*>(a.x) + row * a.ldx + i, bytes + row * a.k + i, std::min(a.group, a.k - i), 0);
            numbers[2 * g] = found.scale;
            numbers[2 * g + 1] = found.scale * found.sum;
        }
    });
    multiply(weights, output<T>(a), a.m, a.n);
}

template <typename T, typename Codes>
void linear_groups(const Linear& a) {
    constexpr bool SAME = std::is_same_v<Operand<T>, T>;
    const T* x = static_cast<const T*>(a.x);
    auto* other = static_cast<Operand<T>*>(a.other_x);
    const bool moved = a.order || !SAME;
    const Operand<T>* from = other;
    if constexpr (SAME) from = moved ? other : x;
    const Groups<Operand<T>, Codes> weights{from, moved ? a.k : a.ldx, a.k, a.group, static_cast<const uint8_t*>(a.w), a.of_groups};
    parallel_for(a.m, ROWS, [&](int64_t row) {
        if (a.order)
            for (int64_t i = 0; i < a.k; ++i) widen(x + row * a.ldx + a.order[i], 1, other + row * a.k + i);
        else if (moved)
            widen(x + row * a.ldx, a.k, other + row * a.k);
        weights.sum_groups(row, a.of_groups + row * weights.groups());
    });
    multiply(weights, output<T>(a), a.m, a.n);
}

}  // namespace

extern "C" {
// How weights and x are to lie: columns of a panel, and bytes of a number of x as tiles read it, of bfloat16 and of int8.
void linear_layout(int64_t (&to)[3]) {
    to[0] = PANEL;
    to[1] = sizeof(Operand<bf16>);
    to[2] = sizeof(Operand<uint8_t>);
}
void linear_f32(const Linear* a) { linear<float>(*a); }
void linear_bf16(const Linear* a) { linear<bf16>(*a); }
void linear_int8_f32(const Linear* a) { linear_int8<float>(*a); }
void linear_int8_bf16(const Linear* a) { linear_int8<bf16>(*a); }
void linear_w4a8_f32(const Linear* a) { linear_w4a8<float>(*a); }
void linear_w4a8_bf16(const Linear* a) { linear_w4a8<bf16>(*a); }
void linear_int4_f32(const Linear* a) { linear_groups<float, uint8_t>(*a); }
void linear_int4_bf16(const Linear* a) { linear_groups<bf16, uint8_t>(*a); }
void linear_codes8_f32(const Linear* a) { linear_groups<float, int8_t>(*a); }
void linear_codes8_bf16(const Linear* a) { linear_groups<bf16, int8_t>(*a); }
}
