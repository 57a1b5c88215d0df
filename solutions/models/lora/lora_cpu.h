// Adapters of linear layers, as ctypes hands them to the kernels of lora_cpu.cpp and adapted_experts_cpu.cpp.
#pragma once

#include <cstdint>

// An adapter's part of a layer: a [pieces * rank, k], filled up with zeros to whole COLS rows, and b transposed, so that neighbouring columns of y lie side by side: of each
// piece blocks of BLOCK columns, [rank, BLOCK], the last one filled up with zeros. Both are read from front to back.
extern "C" struct Adapter {
    const void *a, *b;
    int64_t rank;  // 0: it adds nothing
};

// Rows order[first] … order[end - 1] of a step have the adapter in this slot; 0 is none. A slot below 0 ends the spans.
extern "C" struct Span {
    int64_t slot, first, end;
};

// Arguments as ctypes fills them in. x [m, k], rows ldx apart; y [m, n], rows ldy apart, is added to. order [m] and `spans` say which of
// `adapters` a row has. The columns of y are pieces with an A of their own each; piece p has columns[p].
// Of a gated layer (`gated` not null) y is only read: it holds for each LANES columns of the gate those of up behind them, and
// gated [m, columns[0]], rows dense, becomes silu(gate) · up.
extern "C" struct Adapted {
    int64_t m;
    const void* x;
    void *y, *gated;
    const int64_t* order;
    const Span* spans;
    const Adapter* adapters;
    const int64_t* columns;
    int64_t ldx, ldy, k, pieces;
};
