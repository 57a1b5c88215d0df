// The arg-max of rows as long as a vocabulary, and the few largest, straight from a head's logits.
#include <algorithm>

#include "core/platform/native.h"
#include "core/platform/shares.h"

using namespace native;

namespace {

constexpr int64_t BLOCK = 1024;  // values of which only the largest is looked for, before the one place that matters
constexpr int64_t FEW = 64;      // the same, where several are

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

// The k largest of n values, falling, and their places, of equal ones the first; k is at most n. Where there is NaN, some k places.
template <typename T>
void best_of(const T* x, int64_t n, int64_t k, float* values, int64_t* places) {
    const auto insert = [&](int64_t i, int64_t last) {  // what is less moves up by one, and the last is lost
        const float v = to_float(x[i]);
        int64_t at = last;
        for (; at > 0 && v > values[at - 1]; --at) {
            values[at] = values[at - 1];
            places[at] = places[at - 1];
        }
        values[at] = v;
        places[at] = i;
    };
    for (int64_t i = 0; i < k; ++i) insert(i, i);
    for (int64_t begin = k; begin < n; begin += FEW) {
        const int64_t end = std::min(n, begin + FEW);
        if (!(largest_of(x + begin, end - begin) > values[k - 1])) continue;
        for (int64_t i = begin; i < end; ++i)
            if (to_float(x[i]) > values[k - 1]) insert(i, k - 1);
    }
}

}  // namespace

// Arguments as ctypes fills them in: x [m, n] with rows ldx apart, n at least 1 and below 2^31; y [m].
extern "C" struct Argmax {
    int64_t m;
    const void* x;
    int64_t* y;
    int64_t ldx, n;
};
// The same, and k, at least 1 and at most n; values [m, k]; y [m, k] are the places, or what `ids` [n] has there.
extern "C" struct Best {
    int64_t m;
    const void* x;
    const int64_t* ids;
    float* values;
    int64_t* y;
    int64_t ldx, n, k;
};

namespace {

template <typename T>
void argmax(const Argmax& a) {
    parallel_for(a.m, 1, [&](int64_t row) { a.y[row] = argmax(static_cast<const T*>(a.x) + row * a.ldx, a.n); });
}
template <typename T>
void best(const Best& a) {
    parallel_for(a.m, 1, [&](int64_t row) {
        int64_t* y = a.y + row * a.k;
        best_of(static_cast<const T*>(a.x) + row * a.ldx, a.n, a.k, a.values + row * a.k, y);
        for (int64_t i = 0; i < a.k && a.ids; ++i) y[i] = a.ids[y[i]];
    });
}

}  // namespace

extern "C" {
void argmax_f32(const Argmax* a) { argmax<float>(*a); }
void argmax_bf16(const Argmax* a) { argmax<bf16>(*a); }
void best_f32(const Best* a) { best<float>(*a); }
void best_bf16(const Best* a) { best<bf16>(*a); }
}
