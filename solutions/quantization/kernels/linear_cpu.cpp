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

// Call body(a, row) for every row of x, of a product and of those behind it.
template <typename Body>
void for_rows(const Linear& first, const Body& body) { for_all(first, ROWS, [](const Linear& a) { return a.m; }, body); }

template <typename T>
void linear(const Linear& first) {
    constexpr bool SAME = std::is_same_v<Operand<T>, T>;
    if constexpr (!SAME)
        for_rows(first, [](const Linear& a, int64_t row) {
            widen(static_cast<const T*>(a.x) + row * a.ldx, a.k, static_cast<Operand<T>*>(a.other_x) + row * a.k);
        });
    multiply<T>(first, [](const Linear& a) {
        return Plain<T>{static_cast<const Operand<T>*>(SAME ? a.x : a.other_x), static_cast<const T*>(a.w), SAME ? a.ldx : a.k, a.k};
    });
}

template <typename T>
void linear_int8(const Linear& first) {
    const auto weights_of = [](const Linear& a) {
        return Int8{static_cast<Operand<uint8_t>*>(a.other_x), a.of_groups, static_cast<const uint8_t*>(a.w), a.scales, a.k, a.group};
    };
    for_rows(first, [&](const Linear& a, int64_t row) {
        auto* bytes = static_cast<Operand<uint8_t>*>(a.other_x) + row * a.k;
        const T* x = static_cast<const T*>(a.x) + row * a.ldx;
        const int64_t groups = weights_of(a).groups();
        for (int64_t g = 0, i = 0; g < groups; ++g, i += a.group)
            a.of_groups[row * groups + g] = quantize(x + i, bytes + i, std::min(a.group, a.k - i), MIDDLE).scale;
    });
    multiply<T>(first, weights_of);
}

template <typename T>
void linear_w4a8(const Linear& first) {
    const auto weights_of = [](const Linear& a) {
        return Int4Bytes{static_cast<Operand<int8_t>*>(a.other_x), a.of_groups, static_cast<const uint8_t*>(a.w), a.k, a.group};
    };
    for_rows(first, [&](const Linear& a, int64_t row) {
        auto* bytes = static_cast<Operand<int8_t>*>(a.other_x) + row * a.k;
        const T* x = static_cast<const T*>(a.x) + row * a.ldx;
        const int64_t groups = weights_of(a).groups();
        float* numbers = a.of_groups + row * 2 * groups;
        for (int64_t g = 0, i = 0; g < groups; ++g, i += a.group) {
            const Quantized found = quantize(x + i, bytes + i, std::min(a.group, a.k - i), 0);
            numbers[2 * g] = found.scale;
            numbers[2 * g + 1] = found.scale * found.sum;
        }
    });
    multiply<T>(first, weights_of);
}

template <typename T, typename Codes>
void linear_groups(const Linear& first) {
    constexpr bool SAME = std::is_same_v<Operand<T>, T>;
    const auto weights_of = [](const Linear& a) {
        const bool moved = a.order || !SAME;
        const auto* x = static_cast<const Operand<T>*>(moved ? a.other_x : a.x);
        return Groups<Operand<T>, Codes>{x, moved ? a.k : a.ldx, a.k, a.group, static_cast<const uint8_t*>(a.w), a.of_groups};
    };
    for_rows(first, [&](const Linear& a, int64_t row) {
        const T* x = static_cast<const T*>(a.x) + row * a.ldx;
        auto* other = static_cast<Operand<T>*>(a.other_x) + row * a.k;
        if (a.order)
            for (int64_t i = 0; i < a.k; ++i) widen(x + a.order[i], 1, other + i);
        else if (!SAME)
            widen(x, a.k, other);
        const auto weights = weights_of(a);
        weights.sum_groups(row, a.of_groups + row * weights.groups());
    });
    multiply<T>(first, weights_of);
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
