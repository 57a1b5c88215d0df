// A layer's experts with what adapters add to their products: rows lie sorted by expert, and those of an expert by adapter. An expert of
// whose rows none has an adapter is computed as without any.
#include <algorithm>
#include <numeric>
#include <vector>

#include "models/lora/lora_cpu.h"
#include "quantization/kernels/linear_cpu.h"

using namespace native;

// A packed product and what adapters add to it: kernels and arguments, of which those that depend on the rows are set here.
extern "C" struct AdaptedProduct {
    void (*multiply)(const Linear*);
    const Linear* linear;
    void (*adapt)(const Adapted*);
    const Adapted* adapters;
};
// An expert: gate and up in one product, down, and the columns between them; width 0: it is another rank's.
extern "C" struct AdaptedExpert {
    AdaptedProduct gate_up, down;
    int64_t width;
};

// Arguments as ctypes fills them in: x, y [m, hidden], rows dense. bounds [count * slots + 1]: expert e with the adapter in slot s has rows
// bounds[e * slots + s] to the next one. both [m, 2 * widest], inner [m, widest], other_x and of_groups are memory for one expert.
extern "C" struct AdaptedExperts {
    int64_t m;
    const void* x;
    void *y, *both, *inner, *other_x;
    float* of_groups;
    const AdaptedExpert* experts;
    const int64_t* bounds;
    int64_t hidden, count, slots, element;
};

namespace {

constexpr int64_t SPAN = 64;  // rows of an adapter that a thread takes at once

// The rows of an expert.
struct Rows {
    const AdaptedExperts& a;
    int64_t count;
    const int64_t* order;
    const Span* spans;

    void multiply(const AdaptedProduct& product, const void* x, int64_t ldx, void* y, int64_t ldy, Epilogue epilogue) const {
        Linear linear = *product.linear;
        linear.m = count;
        linear.x = x, linear.ldx = ldx;
        linear.y = y, linear.ldy = ldy;
        linear.other_x = a.other_x, linear.of_groups = a.of_groups;
        linear.epilogue = epilogue;
        product.multiply(&linear);
    }
    void adapt(const AdaptedProduct& product, const void* x, int64_t ldx, void* y, int64_t ldy, void* gated) const {
        Adapted adapted = *product.adapters;
        adapted.m = count;
        adapted.x = x, adapted.ldx = ldx;
        adapted.y = y, adapted.ldy = ldy;
        adapted.gated = gated;
        adapted.order = order, adapted.spans = spans;
        product.adapt(&adapted);
    }
};

}  // namespace

extern "C" void adapted_experts(const AdaptedExperts* arguments) {
    const AdaptedExperts& a = *arguments;
    std::vector<int64_t> order(a.m);
    std::iota(order.begin(), order.end(), 0);
    std::vector<Span> spans;
    for (int64_t e = 0; e < a.count; ++e) {
        const AdaptedExpert& expert = a.experts[e];
        const int64_t *starts = a.bounds + e * a.slots, first = starts[0], last = starts[a.slots];
        if (!expert.width || first == last) continue;
        spans.clear();
        for (int64_t slot = 0; slot < a.slots; ++slot)
            for (int64_t at = starts[slot]; at < starts[slot + 1]; at += SPAN)
                spans.push_back({slot, at - first, std::min(at + SPAN, starts[slot + 1]) - first});
        const bool adapts = spans.back().slot > 0;
        spans.push_back({-1, 0, 0});
        const Rows rows{a, last - first, order.data(), spans.data()};
        const void* x = static_cast<const char*>(a.x) + first * a.hidden * a.element;
        void* y = static_cast<char*>(a.y) + first * a.hidden * a.element;
        rows.multiply(expert.gate_up, x, a.hidden, adapts ? a.both : a.inner, adapts ? 2 * expert.width : expert.width, adapts ? STORE : SILU_MUL);
        if (adapts) rows.adapt(expert.gate_up, x, a.hidden, a.both, 2 * expert.width, a.inner);
        rows.multiply(expert.down, a.inner, expert.width, y, a.hidden, STORE);
        if (adapts) rows.adapt(expert.down, a.inner, expert.width, y, a.hidden, nullptr);
    }
}
