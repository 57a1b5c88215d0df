// Weights of 4 or 8 bits with a scale and a zero for each group of columns, so that memory delivers a quarter or half of the bytes.
// Activations are as they are (W4A16, W8A16): codes become bfloat16 or float in registers, and the rest runs as with whole weights. Or
// those of 4 bits meet bytes with a scale for each of the same groups (W4A8): codes become bytes, and scales and zeros are applied to a
// group's sums.
#pragma once

#include <vector>

#include "quantization/kernels/linear_cpu.h"

namespace native {

// What PANEL bytes say: of two neighbouring inputs, the codes of the columns of a panel's first half in the low halves of the bytes and
// of the second in the high ones. Codes are 8 less than written, which keeps sums small.
#if defined(__AVX512BW__)
// As pairs of bfloat16. A permutation looks at 5 bits of an index, of which the table ignores the highest, so nothing need be masked.
inline void codes_as_pairs(const uint8_t* at, Bits (&pairs)[2]) {
    alignas(64) static constexpr uint16_t VALUES[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i table = _mm512_load_si512(VALUES);
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    pairs[0] = (Bits)_mm512_permutexvar_epi16(index, table);
    pairs[1] = (Bits)_mm512_permutexvar_epi16(_mm512_srli_epi16(index, 4), table);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
// As pairs of bfloat16: their low and their high bytes out of two tables, for the low halves in one lane and the high ones in the other.
inline void codes_as_pairs(const uint8_t* at, Bits (&pairs)[2]) {
    const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -32, -64, -96, -128, 64, 0, -128, 0, -128, 0, 64, -128, -96, -64, -32));
    const __m256i high = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-63, -64, -64, -64, -64, -64, -64, -65, 0, 63, 64, 64, 64, 64, 64, 64));
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const __m256i index = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(codes, 4), codes), _mm256_set1_epi8(15));
    const __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
    const __m256i first = _mm256_unpacklo_epi8(lows, highs), second = _mm256_unpackhi_epi8(lows, highs);
    pairs[0] = (Bits)_mm256_permute2x128_si256(first, second, 0x20);
    pairs[1] = (Bits)_mm256_permute2x128_si256(first, second, 0x31);
}
#else
inline void codes_as_pairs(const uint8_t* at, Bits (&pairs)[2]) {
    const Words both = __builtin_convertvector(load_as<PanelBytes>(at), Words);
    for (int h = 0; h < 2; ++h) {
        const Ints codes = (Ints)(h ? both >> 4 : both & 15);
        const Floats even = __builtin_convertvector((codes & 15) - 8, Floats), odd = __builtin_convertvector((codes >> 16) - 8, Floats);
        pairs[h] = (Bits)even >> 16 | (Bits)odd;
    }
}
#endif

// What 2 * PANEL bytes say: for each column of a panel, two neighbouring inputs' codes, 128 less than written, as pairs of bfloat16,
// which holds 8 bits exactly.
inline void codes_as_pairs(const int8_t* at, Bits (&pairs)[2]) {
    for (int h = 0; h < 2; ++h) {
        const Ints both = __builtin_convertvector(load_as<Shorts>(at + h * PANEL), Ints);
        const Floats even = __builtin_convertvector(both << 24 >> 24, Floats), odd = __builtin_convertvector(both >> 8, Floats);
        pairs[h] = (Bits)even >> 16 | (Bits)odd;
    }
}

template <int M, typename Codes>
inline void add_codes(const float* x, int64_t ldx, const Codes* at, Floats (&c)[M][2]) {
    Bits pairs[2];
    codes_as_pairs(at, pairs);
    for (int h = 0; h < 2; ++h) {
        const Floats even = (Floats)(pairs[h] << 16), odd = (Floats)(pairs[h] & 0xffff0000u);
        for (int m = 0; m < M; ++m) {
            c[m][h] += x[m * ldx] * even;
            c[m][h] += x[m * ldx + 1] * odd;
        }
    }
}
#ifdef HAS_DOT_PAIRS
template <int M, typename Codes>
inline void add_codes(const bf16* x, int64_t ldx, const Codes* at, Floats (&c)[M][2]) {
    Bits pairs[2];
    codes_as_pairs(at, pairs);
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < 2; ++h) c[m][h] = dot_pairs(c[m][h], (Bits)broadcast_word(x + m * ldx), pairs[h]);
}
#endif

// A panel holds for each group PANEL scales and as many zeros, less 8 or 128, as halves, then the codes: of 4 bits, in uint8_t, PANEL
// bytes for every two inputs, of 8 bits, in int8_t, twice as many.
template <typename T, typename Codes>
struct Groups {
    static constexpr int64_t BYTES = std::is_signed_v<Codes> ? 2 * PANEL : PANEL;  // of two inputs
    static constexpr int ROWS = TILE_ROWS, FEW = 0;  // scales and zeros take their time, too
    static constexpr int64_t HEAD = 4 * PANEL;
    const T* x;
    int64_t ldx, k, group;
    const uint8_t* packed;
    const float* sums;  // of x in each group, [m, groups]

    int64_t groups() const { return (k + group - 1) / group; }
    int64_t panel_bytes() const { return groups() * HEAD + k / 2 * BYTES; }
    int64_t bytes_a_step() const { return (4 * panel_bytes() + k - 1) / k; }
    const Groups& open(int64_t, int64_t) const { return *this; }

    void sum_groups(int64_t row, float* to) const {
        for (int64_t g = 0; g < groups(); ++g) {
            const T* from = x + row * ldx;
            int64_t i = g * group;
            const int64_t end = std::min(k, i + group);
            Floats many{};
            for (; i + LANES <= end; i += LANES) many += load(from + i);
            to[g] = sum(many);
            for (; i < end; ++i) to[g] += to_float(from[i]);
        }
    }

    template <int M, typename Y>
    void rows(int64_t panel, int64_t row, int64_t width, const Output<Y>& out, Ahead ahead) const {
        Floats c[M][2] = {};
        const uint8_t* at = packed + panel * panel_bytes();
        for (int64_t g = 0; g < groups(); ++g) {
            const uint16_t* head = reinterpret_cast<const uint16_t*>(at);
            const int64_t begin = g * group, count = std::min(group, k - begin);
            Floats part[M][2] = {};
            at += HEAD;
            for (int64_t i = 0; i < count; i += 2, at += BYTES) {
                if (i % 4 == 0) ahead.step();
                add_codes<M>(x + row * ldx + begin + i, ldx, reinterpret_cast<const Codes*>(at), part);
            }
            for (int h = 0; h < 2; ++h) {
                const Floats scale = load_half(head + h * LANES), zero = load_half(head + PANEL + h * LANES);
                for (int m = 0; m < M; ++m) c[m][h] += scale * (part[m][h] - zero * sums[(row + m) * groups() + g]);
            }
        }
        out.template write<M>(c, row, panel * PANEL, width);
    }
};

constexpr int64_t MOST_GROUP = 32;

// A panel holds for each group PANEL scales and as many zeros, as above, then PANEL / 2 bytes of codes for each input, four inputs side
// by side: those of a panel's first half in the low halves of the bytes, of its second in the high ones.
struct Int4Bytes {
    static constexpr int ROWS = WIDE_TILE_ROWS, FEW = 0;
    static constexpr int64_t HEAD = 4 * PANEL;
    const Operand<int8_t>* x;
    const float* of_groups;  // [m, groups, 2]: the scale of x, and the sum of what its bytes stand for
    const uint8_t* packed;
    int64_t k, group;

    int64_t groups() const { return (k + group - 1) / group; }
    int64_t panel_bytes() const { return groups() * HEAD + k * PANEL / 2; }
    int64_t bytes_a_step() const { return (4 * panel_bytes() + k - 1) / k; }

    // A group brought into the form in which it is computed with.
    struct Group {
        alignas(64) int8_t codes[MOST_GROUP * PANEL];  // 0 to 15 in bytes, as tiles.h wants a panel
        float scales[PANEL], zeros[PANEL];             // zeros times scales

        void fill(const uint8_t* at, int64_t count) {
            const uint16_t* head = reinterpret_cast<const uint16_t*>(at);
            at += HEAD;
            for (int8_t* to = codes; to < codes + count * PANEL; at += STEP / 2, to += STEP) {
                const Bits both = load_as<Bits>(at);
                store_as(to, both & 0x0f0f0f0f);
                store_as(to + STEP / 2, both >> 4 & 0x0f0f0f0f);
            }
            for (int64_t h = 0; h < PANEL; h += LANES) {
                const Floats scale = load_half(head + h);
                store(scales + h, scale);
                store(zeros + h, scale * (load_half(head + PANEL + h) + 8.0f));
            }
        }
    };
    const Group* opened = nullptr;  // the panel's groups

    Int4Bytes open(int64_t panel, int64_t tiles) const {
        Int4Bytes weights = *this;
        if (tiles == 1) return weights;
        static thread_local std::vector<Group> all;
        all.resize(groups());
        const uint8_t* at = packed + panel * panel_bytes();
        for (int64_t g = 0; g < groups(); ++g, at += HEAD + group * PANEL / 2) all[g].fill(at, std::min(group, k - g * group));
        weights.opened = all.data();
        return weights;
    }

    template <int M, typename Y>
    void rows(int64_t panel, int64_t row, int64_t width, const Output<Y>& out, Ahead ahead) const {
        Group own;
        Floats c[M][2] = {};
        const uint8_t* at = packed + panel * panel_bytes();
        for (int64_t g = 0; g < groups(); ++g, at += HEAD + group * PANEL / 2) {
            const int64_t begin = g * group, count = std::min(group, k - begin);
            if (!opened) own.fill(at, count);
            const Group& weights = opened ? opened[g] : own;
            Ints sums[M][2] = {};
            tile<M, true>(x + row * k + begin, k, weights.codes, count, sums, ahead);
            ahead.next += count / 4 * ahead.stride;
            for (int h = 0; h < 2; ++h) {
                const Floats scale = load(weights.scales + h * LANES), zero = load(weights.zeros + h * LANES);
                for (int m = 0; m < M; ++m) {
                    const float* numbers = of_groups + ((row + m) * groups() + g) * 2;
                    c[m][h] += __builtin_convertvector(sums[m][h], Floats) * numbers[0] * scale - zero * numbers[1];
                }
            }
        }
        out.template write<M>(c, row, panel * PANEL, width);
    }
};

}  // namespace native
