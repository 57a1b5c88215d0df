// Matrix products in a processor's own tiles: Intel's AMX, of which one instruction multiplies 16 rows of 64 bytes with as much of a panel.
//
// A panel as tiles.h wants it is what AMX wants, too: a row of 4-byte words, for each column one, holds the operands of one dot product.
// So a tile of the panel is 16 of its rows and half of its columns. Rows of the other operand are read where they lie.
// Source: Intel Architecture Instruction Set Extensions, chapter "Intel AMX".
#pragma once

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_AMX 1

#include "core/platform/native.h"

namespace native {

constexpr int WORDS = 16;       // of a tile's row
constexpr int64_t PANEL_ROW = 128;  // bytes: two registers of words

// What the processor is told of its eight tiles: tmm0 and tmm1 are sums of a panel's halves, tmm2 is of the rows, tmm3 and tmm4 are of
// the panel; tmm5 to tmm7 are the same for the words that 16 leave over.
struct alignas(64) TileShapes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileShapes(int m, int left) {
        set(0, m, WORDS), set(1, m, WORDS), set(2, m, WORDS), set(3, WORDS, WORDS), set(4, WORDS, WORDS);
        if (left) set(5, m, left), set(6, left, WORDS), set(7, left, WORDS);
    }
    void set(int number, int count, int words) {
        rows[number] = static_cast<uint8_t>(count);
        row_bytes[number] = static_cast<uint16_t>(4 * words);
    }
    // Telling it takes as long as five products, so only if another function on this thread has told it something else.
    void use() const {
        TileShapes now = *this;
        _tile_storeconfig(&now);
        if (std::memcmp(&now, this, sizeof(now))) _tile_loadconfig(this);
    }
};

// The instructions take the tiles' numbers as they are written, so they are written out.
struct Bfloat16Products {
    static void add() {
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
    }
    static void add_left() {
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
    }
};
struct ByteProducts {  // of unsigned bytes with signed ones
    static void add() {
        _tile_dpbusd(0, 2, 3);
        _tile_dpbusd(1, 2, 4);
    }
    static void add_left() {
        _tile_dpbusd(0, 5, 6);
        _tile_dpbusd(1, 5, 7);
    }
};

struct SignedByteProducts {  // of signed bytes with signed ones
    static void add() {
        _tile_dpbssd(0, 2, 3);
        _tile_dpbssd(1, 2, 4);
    }
    static void add_left() {
        _tile_dpbssd(0, 5, 6);
        _tile_dpbssd(1, 5, 7);
    }
};

// c[m] += rows[m] · panel, of `words` words; rows lie `stride` bytes apart. before(n) is called before n rows of the panel are.
template <typename Products, int M, typename Sums, typename Before>
inline void multiply_amx(const void* rows, int64_t stride, const void* panel, int64_t words, Sums (&c)[M][2], const Before& before) {
    static_assert(M <= WORDS && sizeof(c[0]) == PANEL_ROW);
    const char *a = static_cast<const char*>(rows), *w = static_cast<const char*>(panel);
    TileShapes(M, static_cast<int>(words % WORDS)).use();
    asm volatile("" ::: "memory");  // what the compiler holds back of c is written before tiles read it
    _tile_loadd(0, &c[0][0], PANEL_ROW);
    _tile_loadd(1, &c[0][1], PANEL_ROW);
    for (; words >= WORDS; words -= WORDS, a += 4 * WORDS, w += WORDS * PANEL_ROW) {
        _tile_loadd(2, a, stride);
        _tile_loadd(3, w, PANEL_ROW);
        _tile_loadd(4, w + PANEL_ROW / 2, PANEL_ROW);
        before(WORDS);
        Products::add();
    }
    if (words) {
        _tile_loadd(5, a, stride);
        _tile_loadd(6, w, PANEL_ROW);
        _tile_loadd(7, w + PANEL_ROW / 2, PANEL_ROW);
        before(words);
        Products::add_left();
    }
    _tile_stored(0, &c[0][0], PANEL_ROW);
    _tile_stored(1, &c[0][1], PANEL_ROW);
}

}  // namespace native

#endif
