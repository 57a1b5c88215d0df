// What stands between the matrix products of a layer, each in one pass over its rows: normalisation and rotation.
#include "core/native.h"

using namespace native;

namespace {

// y = x / sqrt(mean(x²) + eps) · weight, for each of m rows of n, n a multiple of 16.
template <typename T>
void rms_norm(const T* x, const T* weight, T* y, int64_t m, int64_t n, float eps) {
#pragma omp parallel for schedule(static) num_threads(m > 4 ? threads() : 1)
    for (int64_t row = 0; row < m; ++row) {
        const T* from = x + row * n;
        T* to = y + row * n;
        Floats squares{};
        for (int64_t i = 0; i < n; i += LANES) {
            const Floats v = load(from + i);
            squares += v * v;
        }
        const float factor = 1.0f / std::sqrt(sum(squares) / n + eps);
        for (int64_t i = 0; i < n; i += LANES) store(to + i, load(from + i) * factor * load(weight + i));
    }
}

// Turn pairs (i, i + D/2) of `heads` heads of each of m rows, ldx apart, by the row's angles: cosines and sines are [m, D], the
// first half of the sines negated. D is a multiple of 32.
template <typename T>
void rotate(T* x, int64_t ldx, const T* cosines, const T* sines, int64_t m, int64_t heads, int64_t dim) {
    const int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(m > 4 ? threads() : 1)
    for (int64_t row = 0; row < m; ++row) {
        const T *c = cosines + row * dim, *s = sines + row * dim;
        for (int64_t h = 0; h < heads; ++h) {
            T* head = x + row * ldx + h * dim;
            for (int64_t i = 0; i < half; i += LANES) {
                const Floats a = load(head + i), b = load(head + half + i);
                store(head + i, a * load(c + i) + b * load(s + i));
                store(head + half + i, b * load(c + half + i) + a * load(s + half + i));
            }
        }
    }
}

}  // namespace

extern "C" {
void rms_norm_f32(const float* x, const float* w, float* y, int64_t m, int64_t n, float eps) { rms_norm(x, w, y, m, n, eps); }
void rms_norm_bf16(const bf16* x, const bf16* w, bf16* y, int64_t m, int64_t n, float eps) { rms_norm(x, w, y, m, n, eps); }
void rotate_f32(float* x, int64_t ldx, const float* c, const float* s, int64_t m, int64_t h, int64_t d) { rotate(x, ldx, c, s, m, h, d); }
void rotate_bf16(bf16* x, int64_t ldx, const bf16* c, const bf16* s, int64_t m, int64_t h, int64_t d) { rotate(x, ldx, c, s, m, h, d); }
void set_num_threads(int count) { threads() = count; }
}
