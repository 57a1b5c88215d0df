// The register tile that matrix products are made of, by what the processor can multiply.
//
// c[m][j] += a[m] · panel. A panel holds PANEL columns of a [K, N] matrix, two registers wide, interleaved so that one load gives the
// operands of one dot product instruction: float [K][PANEL], bfloat16 [K/2][PANEL][2], int8 [K/4][PANEL][4]. As many rows of a share
// a panel's loads as there are registers for their sums: 8 of 2 x 16 floats with AVX-512, 6 of 2 x 8 with AVX2, 12 of 2 x 4 with NEON
// (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 2008).
//
// Weights stay as narrow as they are stored. A processor that cannot multiply them widens them in registers, and reads a's numbers
// widened once for all: bfloat16 as floats, bytes as 16 bits.
#pragma once

#include <limits>
#include <type_traits>

#include "core/platform/native.h"
#include "core/platform/tiles_amx.h"

namespace native {

constexpr int PANEL = 2 * LANES;                                               // columns of a panel
constexpr int TILE_ROWS = LANES == 16 ? 8 : REGISTERS == 32 ? 12 : 6;          // most rows of a tile
constexpr int64_t STEP = 4 * PANEL;                                            // bytes of a panel that a step of a tile takes
#ifdef HAS_AMX
constexpr int WIDE_TILE_ROWS = 16;         // the same of bfloat16s and of bytes
#else
constexpr int WIDE_TILE_ROWS = TILE_ROWS;
#endif

// What a lone tile of a panel fetches of it. One of so few rows waits for memory and nothing else: the processor sees that it reads in
// order and has more on the way without being told, twice as fast on a good day. One of more rows says so many bytes ahead what it needs.
// Measured on Zen 4; elsewhere every tile fetches the next panel.
#if defined(__AVX512F__) && !defined(HAS_AMX)
constexpr int FEW_ROWS = 5;
constexpr int64_t SOON = 8192;
#else
constexpr int FEW_ROWS = 0;
constexpr int64_t SOON = std::numeric_limits<int64_t>::max();
#endif

// 2 bfloat16s with 2 others.
#if defined(__AVX512BF16__)
#define HAS_DOT_PAIRS
inline Floats dot_pairs(Floats acc, Bits x, Bits w) {
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_DOT_PAIRS
inline Floats dot_pairs(Floats acc, Bits x, Bits w) {
    return (Floats)vbfdotq_f32((float32x4_t)acc, vreinterpretq_bf16_u32((uint32x4_t)x), vreinterpretq_bf16_u32((uint32x4_t)w));
}
#endif
#ifdef HAS_DOT_PAIRS
constexpr bool MULTIPLIES_BF16 = true;
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif

// 4 unsigned bytes with 4 signed ones. Where both must be signed, activations are bytes around 0 instead of MIDDLE.
#if defined(__AVX512VNNI__)
#define HAS_DOT_QUADS
inline Ints dot_quads(Ints acc, Ints x, Ints w) { return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)w); }
#elif defined(__AVXVNNI__)
#define HAS_DOT_QUADS
inline Ints dot_quads(Ints acc, Ints x, Ints w) { return (Ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)x, (__m256i)w); }
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define HAS_DOT_QUADS
inline Ints dot_quads(Ints acc, Ints x, Ints w) {
    return (Ints)vusdotq_s32((int32x4_t)acc, vreinterpretq_u8_s32((int32x4_t)x), vreinterpretq_s8_s32((int32x4_t)w));
}
#elif defined(__ARM_FEATURE_DOTPROD)
#define HAS_DOT_QUADS
#define HAS_SIGNED_BYTES
inline Ints dot_quads(Ints acc, Ints x, Ints w) {
    return (Ints)vdotq_s32((int32x4_t)acc, vreinterpretq_s8_s32((int32x4_t)x), vreinterpretq_s8_s32((int32x4_t)w));
}
#endif
#ifdef HAS_DOT_QUADS
constexpr bool MULTIPLIES_BYTES = true;
#else
constexpr bool MULTIPLIES_BYTES = false;
#endif
#ifdef HAS_SIGNED_BYTES
constexpr int MIDDLE = 0;
#else
constexpr int MIDDLE = 128;
#endif

// Two signed words each. `vpmaddubsw` would take bytes, but saturates: 255 · 127 + 255 · 127 is beyond 16 bits.
#if defined(__AVX512BW__)
inline Ints dot_words(Ints acc, Ints x, Ints w) { return acc + (Ints)_mm512_madd_epi16((__m512i)x, (__m512i)w); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
inline Ints dot_words(Ints acc, Ints x, Ints w) { return acc + (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)w); }
#elif defined(__SSE2__) && !defined(__AVX2__)
inline Ints dot_words(Ints acc, Ints x, Ints w) { return acc + (Ints)_mm_madd_epi16((__m128i)x, (__m128i)w); }
#else
inline Ints dot_words(Ints acc, Ints x, Ints w) { return acc + (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16); }
#endif

// What a tile reads of x where x is T and the weights are bfloat16 or bytes.
template <typename T>
using Operand = std::conditional_t<std::is_same_v<T, bf16>, std::conditional_t<MULTIPLIES_BF16, bf16, float>,
                                   std::conditional_t<sizeof(T) == 1 && !MULTIPLIES_BYTES, int16_t, T>>;

template <typename T>
inline void widen(const T* from, int64_t count, T* to) { std::memcpy(to, from, count * sizeof(T)); }
inline void widen(const bf16* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = to_float(from[i]);
}

// With AHEAD a tile also fetches into the second-level cache what is needed soon, `stride` bytes a step, so that memory delivers the
// next panel while this one is computed with.
struct Ahead {
    const char* next;
    int64_t stride;

    void step() {
        for (int64_t line = 0; line < STEP; line += 64) fetch(next + line);
        next += stride;
    }
    void steps(int64_t count) {
        for (int64_t line = 0; line < count * stride; line += 64) fetch(next + line);
        next += count * stride;
    }
};

// 32 bits of memory in all lanes: two or four numbers of a row.
inline Ints broadcast_word(const void* from) {
    int32_t word;
    std::memcpy(&word, from, 4);
    return Ints{} + word;
}
// A tile of its own function, with sums of its own: with 16 registers, all of which it needs, what stands around it must not want any.
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE_FUNCTION inline
#else
#define TILE_FUNCTION __attribute__((noinline))
#endif

// acc += x · w. Processors with 16 registers get the instructions in the order written: a compiler left to itself takes the numbers of
// many rows into registers at once, for which sums have to leave them.
inline void add_product(Floats& acc, Floats x, Floats w) {
#if defined(__FMA__) && !defined(__AVX512F__)
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
#else
    acc += x * w;
#endif
}
inline void add_product(Ints& acc, Ints x, Ints w) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    Ints products;
    asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(x), "x"(w));
#else
    acc = dot_words(acc, x, w);
#endif
}
// Rows one by one, each under a number that the compiler knows before it decides what lies in registers.
template <int M, typename X, typename V, int... ROW>
inline void add_rows(const X* a, int64_t lda, V w0, V w1, V (&c)[M][2], std::integer_sequence<int, ROW...>) {
    const auto add_row = [&](const X* row, V (&sums)[2]) {
        const V x = (V)broadcast_word(row);
        add_product(sums[0], x, w0);
        add_product(sums[1], x, w1);
    };
    (add_row(a + ROW * lda, c[ROW]), ...);
}
template <int M, typename X, typename V>
inline void add_rows(const X* a, int64_t lda, V w0, V w1, V (&c)[M][2]) {
    add_rows(a, lda, w0, w1, c, std::make_integer_sequence<int, M>{});
}
template <int M, typename V, int... ROW>
inline void copy_sums(const V (&from)[M][2], V (&to)[M][2], std::integer_sequence<int, ROW...>) {
    ((to[ROW][0] = from[ROW][0], to[ROW][1] = from[ROW][1]), ...);
}
template <int M, typename V>
inline void copy_sums(const V (&from)[M][2], V (&to)[M][2]) { copy_sums(from, to, std::make_integer_sequence<int, M>{}); }

// In the tiles, a[m] goes on by `step` elements from one dot product to the next.
template <int M, bool AHEAD = false>
TILE_FUNCTION void tile(const float* a, int64_t lda, const float* panel, int64_t ldp, int64_t k, Floats (&to)[M][2], Ahead ahead = {}, int64_t step = 1) {
    Floats c[M][2];
    copy_sums(to, c);
    for (int64_t i = 0; i < k; ++i, panel += ldp, a += step) {
        if (AHEAD) ahead.step();
        add_rows(a, lda, load(panel), load(panel + LANES), c);
    }
    copy_sums(c, to);
}

#if defined(HAS_AMX)
template <int M, bool AHEAD = false>
inline void tile(const bf16* a, int64_t lda, const bf16* panel, int64_t, int64_t k, Floats (&c)[M][2], Ahead ahead = {}) {
    multiply_amx<Bfloat16Products>(a, 2 * lda, panel, k / 2, c, [&](int64_t steps) { if (AHEAD) ahead.steps(steps); });
}
template <int M, bool AHEAD = false>
inline void tile(const uint8_t* a, int64_t lda, const int8_t* panel, int64_t k, Ints (&c)[M][2], Ahead ahead = {}) {
    multiply_amx<ByteProducts>(a, lda, panel, k / 4, c, [&](int64_t steps) { if (AHEAD) ahead.steps(steps); });
}
#endif

#if defined(HAS_DOT_PAIRS) && !defined(HAS_AMX)
template <int M, bool AHEAD = false>
inline void tile(const bf16* a, int64_t lda, const bf16* panel, int64_t ldp, int64_t k, Floats (&c)[M][2], Ahead ahead = {}, int64_t step = 2) {
    for (int64_t i = 0; i < k; i += 2, panel += 2 * ldp, a += step) {
        if (AHEAD) ahead.step();
        Bits w0 = load_as<Bits>(panel), w1 = load_as<Bits>(panel + 2 * LANES);
        for (int m = 0; m < M; ++m) {
            const Bits x = (Bits)broadcast_word(a + m * lda);
            c[m][0] = dot_pairs(c[m][0], x, w0);
            c[m][1] = dot_pairs(c[m][1], x, w1);
        }
    }
}
#endif

// bfloat16 weights, widened: the first of each pair by a shift, then the second by a mask.
template <int M, bool AHEAD = false>
TILE_FUNCTION void tile(const float* a, int64_t lda, const bf16* panel, int64_t ldp, int64_t k, Floats (&to)[M][2], Ahead ahead = {}) {
    Floats c[M][2];
    copy_sums(to, c);
    for (int64_t i = 0; i < k; i += 2, panel += 2 * ldp, a += 2) {
        if (AHEAD) ahead.step();
        const Bits w0 = load_as<Bits>(panel), w1 = load_as<Bits>(panel + PANEL);
        add_rows(a, lda, (Floats)(w0 << 16), (Floats)(w1 << 16), c);
        add_rows(a + 1, lda, (Floats)(w0 & 0xffff0000u), (Floats)(w1 & 0xffff0000u), c);
    }
    copy_sums(c, to);
}

#ifdef HAS_DOT_QUADS
// Where x has signed bytes, those of the panel are not negative.
template <int M, bool AHEAD = false, typename Byte>
inline std::enable_if_t<sizeof(Byte) == 1> tile(const Byte* a, int64_t lda, const int8_t* panel, int64_t k, Ints (&c)[M][2], Ahead ahead = {}) {
    for (int64_t i = 0; i < k; i += 4, panel += STEP) {
        if (AHEAD) ahead.step();
        const Ints w[2] = {load_as<Ints>(panel), load_as<Ints>(panel + STEP / 2)};
        for (int m = 0; m < M; ++m) {
            const Ints x = broadcast_word(a + m * lda + i);
            for (int h = 0; h < 2; ++h) c[m][h] = std::is_signed_v<Byte> ? dot_quads(c[m][h], w[h], x) : dot_quads(c[m][h], x, w[h]);
        }
    }
}
#ifdef HAS_AMX
// A panel of few inputs, as of a group of 4-bit weights, is worth a change of tiles for many rows only.
template <int M, bool AHEAD = false>
inline void tile(const int8_t* a, int64_t lda, const int8_t* panel, int64_t k, Ints (&c)[M][2], Ahead ahead = {}) {
    if constexpr (M > 4)
        multiply_amx<SignedByteProducts>(a, lda, panel, k / 4, c, [&](int64_t steps) { if (AHEAD) ahead.steps(steps); });
    else
        tile<M, AHEAD, int8_t>(a, lda, panel, k, c, ahead);
}
#endif
#endif

// The same of numbers in 16 bits, of each four in the order 0, 2, 1, 3: so the weights' even bytes are one operand, the odd ones
// another.
template <int M, bool AHEAD = false>
TILE_FUNCTION void tile(const int16_t* a, int64_t lda, const int8_t* panel, int64_t k, Ints (&to)[M][2], Ahead ahead = {}) {
    Ints c[M][2];
    copy_sums(to, c);
    for (int64_t i = 0; i < k; i += 4, panel += STEP, a += 4) {
        if (AHEAD) ahead.step();
        const SignedWords w0 = load_as<SignedWords>(panel), w1 = load_as<SignedWords>(panel + STEP / 2);
        add_rows(a, lda, (Ints)(w0 << 8 >> 8), (Ints)(w1 << 8 >> 8), c);
        add_rows(a + 2, lda, (Ints)(w0 >> 8), (Ints)(w1 >> 8), c);
    }
    copy_sums(c, to);
}

}  // namespace native
