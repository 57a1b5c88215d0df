// Sixteen floats at a time, on any processor that GCC or Clang compiles for, and the register tile that matrix products are made of.
//
// The vectors are the compilers' own (`vector_size`): on AVX-512 one is a register, on AVX2 two, on NEON four. Only what has no
// operator in C++, the bfloat16 and int8 dot products, is written with intrinsics, each beside a version that runs everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <omp.h>

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
// The sum and the largest of 16 lanes: each round folds the upper half onto the lower.
inline float sum(Floats v) {
    const Ints half = {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7};
    const Ints quarter = {4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3};
    v += __builtin_shuffle(v, half);
    v += __builtin_shuffle(v, quarter);
    return (v[0] + v[2]) + (v[1] + v[3]);
}
inline float largest(Floats v) {
    const Ints half = {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7};
    const Ints quarter = {4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3};
    v = maximum(v, __builtin_shuffle(v, half));
    v = maximum(v, __builtin_shuffle(v, quarter));
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
inline Floats fold4(const Floats (&v)[4]) {
    const Ints low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const Ints low4 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const Floats a = __builtin_shuffle(v[0], v[1], low8) + __builtin_shuffle(v[0], v[1], low8 + 8);
    const Floats b = __builtin_shuffle(v[2], v[3], low8) + __builtin_shuffle(v[2], v[3], low8 + 8);
    return __builtin_shuffle(a, b, low4) + __builtin_shuffle(a, b, low4 + 4);
}
inline Floats sums_of_folded(const Floats (&v)[4]) {
    const Ints low2 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
    const Ints low1 = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const Floats a = __builtin_shuffle(v[0], v[1], low2) + __builtin_shuffle(v[0], v[1], low2 + 2);
    const Floats b = __builtin_shuffle(v[2], v[3], low2) + __builtin_shuffle(v[2], v[3], low2 + 2);
    return __builtin_shuffle(a, b, low1) + __builtin_shuffle(a, b, low1 + 1);
}

// Rows and columns of 16 x 16 words exchanged: four rounds, each of which swaps blocks of 8, 4, 2, 1 words across the diagonal.
inline void transpose(Bits (&v)[LANES]) {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int size = 8; size; size /= 2) {
        const Ints upper = (lane & size) != 0;           // lanes that come from the other vector, or go there
        const Ints low = upper ? lane + 16 - size : lane;  // own lower blocks, the other's lower blocks in the gaps
        const Ints high = upper ? lane + 16 : lane + size;
        for (int i = 0; i < LANES; ++i) {
            if (i & size) continue;
            const Bits a = v[i], b = v[i + size];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + size] = __builtin_shuffle(a, b, high);
        }
    }
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
    const Words low = {0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59};
    pairs[0] = (Bits)__builtin_shuffle(a, b, low);
    pairs[1] = (Bits)__builtin_shuffle(a, b, low + 4);
}
// 32 floats in the order of those pairs, from memory and back.
inline void spread(const float* from, Floats& low, Floats& high) {
    const Ints order = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const Floats a = load(from), b = load(from + LANES);
    low = __builtin_shuffle(a, b, order);
    high = __builtin_shuffle(a, b, order + 4);
}
inline void gather(float* to, Floats low, Floats high) {
    const Ints order = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
    store(to, __builtin_shuffle(low, high, order));
    store(to + LANES, __builtin_shuffle(low, high, order + 8));
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

// Threads of every parallel region here. OpenMP's own default knows nothing of a container's quota, and is kept for each thread apart.
inline int& threads() {
    static int count = 1;
    return count;
}

// Run `body` on all threads: those of the region that is open, which a recording opens for all its kernels, else of one of its own.
template <typename Body>
inline void on_all_threads(const Body& body) {
    if (omp_in_parallel()) {
        body();
    } else {
#pragma omp parallel num_threads(threads())
        body();
    }
}

}  // namespace native
