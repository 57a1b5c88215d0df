// Sixteen floats at a time, on any processor that GCC or Clang compiles for, and the register tile that matrix products are made of.
//
// The vectors are the compilers' own (`vector_size`): on AVX-512 one is a register, on AVX2 two, on NEON four. Only what has no
// operator in C++, the bfloat16 and int8 dot products, is written with intrinsics, each beside a version that runs everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace native {

typedef float Floats __attribute__((vector_size(64)));             // 16 floats
typedef int32_t Ints __attribute__((vector_size(64)));              // 16 ints
typedef uint32_t Bits __attribute__((vector_size(64)));             // 16 words
typedef uint16_t Halves __attribute__((vector_size(32)));           // 16 bfloat16s
typedef uint16_t Words __attribute__((vector_size(64)));            // 32 bfloat16s
constexpr int LANES = 16;

// Lane i of the result is lane from(i) of a and b laid one behind the other. `from` is a lambda that captures nothing, so the compiler
// knows all lanes. GCC takes them as a vector of such integers as the lanes are wide; Clang, as GCC since 12, as numbers.
template <typename V, typename From, int... I>
inline V shuffle_lanes(V a, V b, From from, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, from(I)...);
#else
    return __builtin_shuffle(a, b, decltype(a < b){from(I)...});
#endif
}
template <typename V, typename From>
inline V shuffle(V a, V b, From from) {
    return shuffle_lanes(a, b, from, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}
// Lane i of v comes from lane from(i).
template <typename V, typename From>
inline V shuffle(V v, From from) { return shuffle(v, v, from); }

struct bf16 {
    uint16_t bits;
};

template <typename V, typename T>
inline V load_as(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}
template <typename V, typename T>
inline void store_as(T* to, V v) {
    std::memcpy(to, &v, sizeof(V));
}

inline Floats load(const float* p) { return load_as<Floats>(p); }
inline Floats load(const bf16* p) { return (Floats)(__builtin_convertvector(load_as<Halves>(p), Bits) << 16); }
inline void store(float* p, Floats v) { store_as(p, v); }

// To bfloat16, rounded to nearest even as PyTorch does; NaN stays NaN.
inline Halves narrow(Floats v) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    Bits b = (Bits)v;
    Bits rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    Bits nan = (Bits)(v != v);
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
#endif
}
inline void store(bf16* p, Floats v) { store_as(p, narrow(v)); }

// IEEE halves, not for infinity: to floats by shifting them into place and putting the exponent's bias right with a product.
inline Floats load_half(const uint16_t* p) {
    const Bits bits = __builtin_convertvector(load_as<Halves>(p), Bits);
    const Floats magnitude = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Bits)magnitude | (bits & 0x8000) << 16);
}
inline float half_to_float(uint16_t half) {
    const uint32_t bits = uint32_t{half} << 13;  // of a number that is not negative
    float x;
    std::memcpy(&x, &bits, 4);
    return x * 0x1p112f;
}
// The least half that is no less than x, for 0 <= x <= 65504.
inline uint16_t half_above(float x) {
    x *= 0x1p-112f;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x1fff) >> 13);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
template <typename T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) {
    Floats v = Floats{} + x;
    return bf16{narrow(v)[0]};
}

inline Floats broadcast(float x) { return Floats{} + x; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
constexpr auto other_half = [](int i) { return i ^ 8; };
constexpr auto other_quarter = [](int i) { return (i ^ 4) & 7; };
// The sum and the largest of 16 lanes: each round folds the upper half onto the lower.
inline float sum(Floats v) {
    v += shuffle(v, other_half);
    v += shuffle(v, other_quarter);
    return (v[0] + v[2]) + (v[1] + v[3]);
}
inline float largest(Floats v) {
    v = maximum(v, shuffle(v, other_half));
    v = maximum(v, shuffle(v, other_quarter));
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}

// e^x for -inf <= x < 88 to about 2 units in the last place; 0 below -87, where the result would be subnormal.
// The polynomial over [-ln2/2, ln2/2] is that of Cephes' expf.
inline Floats exponential(Floats input) {
    Floats x = maximum(input, broadcast(-87.0f));
    Floats n = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
    Ints power = (Ints)n << 23;
    n -= 12582912.0f;
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
                1.6666665459e-1f) * r + 5.0000001201e-1f;
    Floats result = (Floats)((Ints)(p * r * r + r + 1.0f) + power);
    return input < -87.0f ? Floats{} : result;
}

inline Floats silu(Floats x) { return x / (1.0f + exponential(maximum(-x, broadcast(-87.0f)) < 80.0f ? -x : broadcast(80.0f))); }

// The sums of 16 vectors' lanes, in a vector: lane i is the sum of vector i. Each round folds pairs of vectors into one; fold4 makes
// the first two rounds of four vectors, sums_of_folded the other two of four such results.
template <int SIZE>
inline Floats fold(Floats a, Floats b) {  // one round: every other group of SIZE lanes plus the group behind it, of a and then of b
    return shuffle(a, b, [](int i) { return i + i / SIZE * SIZE; }) + shuffle(a, b, [](int i) { return i + i / SIZE * SIZE + SIZE; });
}
inline Floats fold4(const Floats (&v)[4]) { return fold<4>(fold<8>(v[0], v[1]), fold<8>(v[2], v[3])); }
inline Floats sums_of_folded(const Floats (&v)[4]) { return fold<1>(fold<2>(v[0], v[1]), fold<2>(v[2], v[3])); }

// Rows and columns of 16 x 16 words exchanged: four rounds, each of which swaps blocks of 8, 4, 2, 1 words across the diagonal.
template <int SIZE>
inline void swap_blocks(Bits (&v)[LANES]) {
    for (int i = 0; i < LANES; ++i) {
        if (i & SIZE) continue;
        const Bits a = v[i], b = v[i + SIZE];  // a's upper blocks and b's lower ones change places
        v[i] = shuffle(a, b, [](int lane) { return lane & SIZE ? lane + LANES - SIZE : lane; });
        v[i + SIZE] = shuffle(a, b, [](int lane) { return lane & SIZE ? lane + LANES : lane + SIZE; });
    }
}
inline void transpose(Bits (&v)[LANES]) {
    swap_blocks<8>(v);
    swap_blocks<4>(v);
    swap_blocks<2>(v);
    swap_blocks<1>(v);
}

// c[m][j] += a[m] · panel: the register tile. A panel holds 32 columns of a [K, N] matrix, interleaved so that one load gives the
// operands of one dot product instruction: float [K][32], bfloat16 [K/2][32][2], int8 [K/4][32][4].
//
// a[m] goes on by `step` elements from one dot product to the next.
//
// With AHEAD it also fetches into the second-level cache what is needed soon, `stride` bytes a step, so that memory delivers
// the next panel while this one is computed with.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

struct Ahead {
    const char* next;
    int64_t stride;

    void step() {
        fetch(next);
        fetch(next + 64);
        next += stride;
    }
};

template <int M, bool AHEAD = false>
inline void tile(const float* a, int64_t lda, const float* panel, int64_t ldp, int64_t k, Floats (&c)[M][2], Ahead ahead = {}, int64_t step = 1) {
    for (int64_t i = 0; i < k; ++i, panel += ldp, a += step) {
        if (AHEAD) ahead.step();
        Floats w0 = load(panel), w1 = load(panel + LANES);
        for (int m = 0; m < M; ++m) {
            Floats x = broadcast(a[m * lda]);
            c[m][0] += x * w0;
            c[m][1] += x * w1;
        }
    }
}

#ifdef __AVX512BF16__
inline Floats dot_pairs(Floats acc, Bits x, Bits w) {
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
}
#else
inline Floats dot_pairs(Floats acc, Bits x, Bits w) {
    acc += (Floats)(x << 16) * (Floats)(w << 16);
    return acc + (Floats)(x & 0xffff0000u) * (Floats)(w & 0xffff0000u);
}
#endif

// Two vectors of 32 words, a and b, as pairs (a0, b0), (a1, b1), ..., within each quarter of the vectors, which costs a processor
// less than across them: pairs[0] has the pairs 0-3, 8-11, 16-19 and 24-27.
inline void interleave_quarters(Words a, Words b, Bits (&pairs)[2]) {
    pairs[0] = (Bits)shuffle(a, b, [](int i) { return i / 8 * 8 + i % 8 / 2 + i % 2 * 32; });
    pairs[1] = (Bits)shuffle(a, b, [](int i) { return i / 8 * 8 + i % 8 / 2 + i % 2 * 32 + 4; });
}
// 32 floats in the order of those pairs, from memory and back.
inline void spread(const float* from, Floats& low, Floats& high) {
    const Floats a = load(from), b = load(from + LANES);
    low = shuffle(a, b, [](int i) { return i + i / 4 * 4; });
    high = shuffle(a, b, [](int i) { return i + i / 4 * 4 + 4; });
}
inline void gather(float* to, Floats low, Floats high) {
    store(to, shuffle(low, high, [](int i) { return i / 8 * 4 + i / 4 % 2 * 16 + i % 4; }));
    store(to + LANES, shuffle(low, high, [](int i) { return i / 8 * 4 + i / 4 % 2 * 16 + i % 4 + 8; }));
}

template <int M, bool AHEAD = false>
inline void tile(const bf16* a, int64_t lda, const bf16* panel, int64_t ldp, int64_t k, Floats (&c)[M][2], Ahead ahead = {}, int64_t step = 2) {
    for (int64_t i = 0; i < k; i += 2, panel += 2 * ldp, a += step) {
        if (AHEAD) ahead.step();
        Bits w0 = load_as<Bits>(panel), w1 = load_as<Bits>(panel + 2 * LANES);
        for (int m = 0; m < M; ++m) {
            uint32_t pair;
            std::memcpy(&pair, a + m * lda, 4);
            Bits x = Bits{} + pair;
            c[m][0] = dot_pairs(c[m][0], x, w0);
            c[m][1] = dot_pairs(c[m][1], x, w1);
        }
    }
}

#ifdef __AVX512VNNI__
inline Ints dot_quads(Ints acc, Ints x, Ints w) { return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w); }
#else
inline Ints dot_quads(Ints acc, Ints x, Ints w) {  // x holds 4 unsigned bytes, w 4 signed ones
    for (int b = 0; b < 4; ++b) acc += (Ints)(((Bits)x >> (8 * b)) & 0xff) * ((w << (24 - 8 * b)) >> 24);
    return acc;
}
#endif

template <int M, bool AHEAD = false>
inline void tile(const uint8_t* a, int64_t lda, const int8_t* panel, int64_t k, Ints (&c)[M][2], Ahead ahead = {}) {
    for (int64_t i = 0; i < k; i += 4, panel += 128) {
        if (AHEAD) ahead.step();
        Ints w0 = load_as<Ints>(panel), w1 = load_as<Ints>(panel + 64);
        for (int m = 0; m < M; ++m) {
            int32_t quad;
            std::memcpy(&quad, a + m * lda + i, 4);
            Ints x = Ints{} + quad;
            c[m][0] = dot_quads(c[m][0], x, w0);
            c[m][1] = dot_quads(c[m][1], x, w1);
        }
    }
}

constexpr int PANEL = 32;     // columns of a panel
constexpr int TILE_ROWS = 8;  // rows of a tile: 16 accumulators, which leaves room for the operands

}  // namespace native
