// The arg-max of rows as long as a vocabulary, straight from a head's logits.
#include <algorithm>

#include "core/platform/native.h"
#include "core/platform/shares.h"

using namespace native;

namespace {

constexpr int64_t BLOCK = 1024;  // values of which only the largest is looked for, before the one place that matters

// The largest of n values, or NaN if there is one, as PyTorch counts.
template <typename T>
float largest_of(const T* x, int64_t n) {
    Floats best[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
    Ints nan{};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        for (int h = 0; h < 2; ++h) {
            const Floats v = load(x + i + h * LANES);
            best[h] = maximum(v, best[h]);
            nan |= v != v;
        }
    }
    float top = largest(maximum(best[0], best[1]));
    for (; i < n; ++i) {
        const float v = to_float(x[i]);
        if (v != v) return v;
        top = v > top ? v : top;
    }
    for (int lane = 0; lane < LANES; ++lane)
        if (nan[lane]) return NAN;
    return top;
}

// Index of the largest of n values, the first among equals.
template <typename T>
int64_t argmax(const T* x, int64_t n) {
    float top = -INFINITY;
    int64_t begin = 0;
    for (int64_t i = 0; i < n && top == top; i += BLOCK) {
        const float here = largest_of(x + i, std::min(BLOCK, n - i));
        if (!(here <= top)) {
            top = here;
            begin = i;
        }
    }
    for (int64_t i = begin; i < n; ++i) {
        const float v = to_float(x[i]);
        if (v == top || (v != v && top != top)) return i;
    }
    return 0;
}

}  // namespace

// Arguments as ctypes fills them in: x [m, n] with rows ldx apart, n at least 1 and below 2^31; y [m].
extern "C" struct Argmax {
    int64_t m;
    const void* x;
    int64_t* y;
    int64_t ldx, n;
};

namespace {

template <typename T>
void argmax(const Argmax& a) {
    parallel_for(a.m, 1, [&](int64_t row) { a.y[row] = argmax(static_cast<const T*>(a.x) + row * a.ldx, a.n); });
}

}  // namespace

extern "C" {
void argmax_f32(const Argmax* a) { argmax<float>(*a); }
void argmax_bf16(const Argmax* a) { argmax<bf16>(*a); }
}
