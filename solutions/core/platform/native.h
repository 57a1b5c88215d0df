// As many floats at a time as a register holds, on any processor that GCC or Clang compiles for.
//
// The vectors are the compilers' own (`vector_size`), each one register: 16 floats with AVX-512, 8 with AVX2, 4 with SSE and NEON.
// Only what has no operator in C++ is written with intrinsics, each beside a version that runs everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace native {

// Floats of a register, and how many registers there are.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Words __attribute__((vector_size(4 * LANES)));   // twice LANES
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));  // bfloat16s, or IEEE halves
typedef int16_t SignedWords __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t PanelBytes __attribute__((vector_size(2 * LANES)));  // twice LANES
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));

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

// Between bytes and integers by way of 16 bits: g++ 12 would take the lanes one by one.
inline Ints to_ints(SignedBytes v) { return __builtin_convertvector(__builtin_convertvector(v, Shorts), Ints); }
template <typename V>
inline V to_bytes(Ints v) { return __builtin_convertvector(__builtin_convertvector(v, Shorts), V); }

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

// IEEE halves, not for infinity: to floats, where no instruction does it by shifting them into place and putting the exponent's bias
// right with a product.
inline Floats load_half(const uint16_t* p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
    const Bits bits = __builtin_convertvector(load_as<Halves>(p), Bits);
    const Floats magnitude = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Bits)magnitude | (bits & 0x8000) << 16);
#endif
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
constexpr auto other_half = [](int i) { return i ^ (LANES / 2); };
constexpr auto other_quarter = [](int i) { return (i ^ 4) & 7; };
// The sum and the largest of all lanes: each round folds the upper half onto the lower, until there are four.
inline float sum(Floats v) {
    if constexpr (LANES > 8) v += shuffle(v, other_half);
    if constexpr (LANES > 4) v += shuffle(v, other_quarter);
    return (v[0] + v[2]) + (v[1] + v[3]);
}
inline float largest(Floats v) {
    if constexpr (LANES > 8) v = maximum(v, shuffle(v, other_half));
    if constexpr (LANES > 4) v = maximum(v, shuffle(v, other_quarter));
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

// The sums of LANES vectors' lanes, in a vector: lane i is the sum of vector i. Each round folds pairs of vectors into one; fold4 makes
// the first two rounds of four vectors, sums_of_folded the others of all such results.
template <int SIZE>
inline Floats fold(Floats a, Floats b) {  // one round: every other group of SIZE lanes plus the group behind it, of a and then of b
    return shuffle(a, b, [](int i) { return i + i / SIZE * SIZE; }) + shuffle(a, b, [](int i) { return i + i / SIZE * SIZE + SIZE; });
}
inline Floats fold4(const Floats (&v)[4]) {
    return fold<LANES / 4>(fold<LANES / 2>(v[0], v[1]), fold<LANES / 2>(v[2], v[3]));
}
inline Floats sums_of_folded(const Floats (&v)[LANES / 4]) {
    if constexpr (LANES == 16) return fold<1>(fold<2>(v[0], v[1]), fold<2>(v[2], v[3]));
    if constexpr (LANES == 8) return fold<1>(v[0], v[1]);
    return v[0];
}

// Rows and columns of LANES x LANES words exchanged: rounds, each of which swaps blocks of half the size across the diagonal.
template <int SIZE>
inline void swap_blocks(Bits (&v)[LANES]) {
    for (int i = 0; i < LANES; ++i) {
        if (i & SIZE) continue;
        const Bits a = v[i], b = v[i + SIZE];  // a's upper blocks and b's lower ones change places
        v[i] = shuffle(a, b, [](int lane) { return lane & SIZE ? lane + LANES - SIZE : lane; });
        v[i + SIZE] = shuffle(a, b, [](int lane) { return lane & SIZE ? lane + LANES : lane + SIZE; });
    }
    if constexpr (SIZE > 1) swap_blocks<SIZE / 2>(v);
}
inline void transpose(Bits (&v)[LANES]) { swap_blocks<LANES / 2>(v); }

// Two vectors of words, a and b, as pairs (a0, b0), (a1, b1), ..., within each quarter of the vectors, which costs a processor
// less than across them: pairs[0] has the pairs 0-3, 8-11 and so on.
inline void interleave_quarters(Words a, Words b, Bits (&pairs)[2]) {
    pairs[0] = (Bits)shuffle(a, b, [](int i) { return i / 8 * 8 + i % 8 / 2 + i % 2 * 2 * LANES; });
    pairs[1] = (Bits)shuffle(a, b, [](int i) { return i / 8 * 8 + i % 8 / 2 + i % 2 * 2 * LANES + 4; });
}
// As many floats in the order of those pairs, from memory and back.
inline void spread(const float* from, Floats& low, Floats& high) {
    const Floats a = load(from), b = load(from + LANES);
    low = shuffle(a, b, [](int i) { return i + i / 4 * 4; });
    high = shuffle(a, b, [](int i) { return i + i / 4 * 4 + 4; });
}
inline void gather(float* to, Floats low, Floats high) {
    store(to, shuffle(low, high, [](int i) { return i / 8 * 4 + i / 4 % 2 * LANES + i % 4; }));
    store(to + LANES, shuffle(low, high, [](int i) { return (i + LANES) / 8 * 4 + (i / 4 + LANES / 4) % 2 * LANES + i % 4; }));
}

// Into the second-level cache what is needed soon.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace native
