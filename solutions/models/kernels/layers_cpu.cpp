// What stands between the matrix products of a layer, each in one pass over its rows: normalisation, rotation, and rows of a table.
#include "core/platform/native.h"
#include "core/platform/shares.h"

using namespace native;

namespace {

constexpr int64_t ROWS = 16;  // of a share: a microsecond's work

// y = x / sqrt(mean(x²) + eps) · (offset + weight), for each of m rows of n, n a multiple of 16.
template <typename T>
void rms_norm(const T* x, const T* weight, T* y, int64_t m, int64_t n, float eps, float offset) {
    parallel_for(m, ROWS, [=](int64_t row) {
        const T* from = x + row * n;
        T* to = y + row * n;
        Floats squares{};
        for (int64_t i = 0; i < n; i += LANES) {
            const Floats v = load(from + i);
            squares += v * v;
        }
        const float factor = 1.0f / std::sqrt(sum(squares) / n + eps);
        for (int64_t i = 0; i < n; i += LANES) store(to + i, load(from + i) * factor * (load(weight + i) + offset));
    });
}

// The same for each of `pieces` of n elements that lie behind one another in each of m rows; the rows of x and y lie ldx and ldy
// apart. With `add` the result is added to y, else y may be x.
template <typename T>
void norm_pieces(const T* x, const T* weight, T* y, int64_t ldx, int64_t ldy, int64_t m, int64_t pieces, int64_t n, float eps,
                 float offset, bool add) {
    parallel_for(m, ROWS, [=](int64_t row) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const T* from = x + row * ldx + piece * n;
            T* to = y + row * ldy + piece * n;
            Floats squares{};
            for (int64_t i = 0; i < n; i += LANES) {
                const Floats v = load(from + i);
                squares += v * v;
            }
            const float factor = 1.0f / std::sqrt(sum(squares) / n + eps);
            for (int64_t i = 0; i < n; i += LANES) {
                const Floats v = load(from + i) * factor * (load(weight + i) + offset);
                store(to + i, add ? load(to + i) + v : v);
            }
        }
    });
}

// Turn pairs (i, i + D/2) of `heads` heads of each of m rows, ldx apart, by the row's angles: cosines and sines are [m, D], the
// first half of the sines negated. D is a multiple of 32.
template <typename T>
void rotate(T* x, int64_t ldx, const T* cosines, const T* sines, int64_t m, int64_t heads, int64_t dim) {
    const int64_t half = dim / 2;
    parallel_for(m, ROWS, [=](int64_t row) {
        const T *c = cosines + row * dim, *s = sines + row * dim;
        for (int64_t h = 0; h < heads; ++h) {
            T* head = x + row * ldx + h * dim;
            for (int64_t i = 0; i < half; i += LANES) {
                const Floats a = load(head + i), b = load(head + half + i);
                store(head + i, a * load(c + i) + b * load(s + i));
                store(head + half + i, b * load(c + half + i) + a * load(s + half + i));
            }
        }
    });
}

// Row i of y is row index[i] of a table: `size` bytes each, the rows of both so many bytes apart.
void take_rows(const char* table, const int64_t* index, char* y, int64_t from_apart, int64_t to_apart, int64_t size, int64_t m) {
    parallel_for(m, 4 * ROWS, [=](int64_t row) { std::memcpy(y + row * to_apart, table + index[row] * from_apart, size); });
}

}  // namespace

// Arguments as ctypes fills them in.
extern "C" struct Norm {
    int64_t m;
    const void *x, *weight;
    void* y;
    int64_t n;
    double eps, offset;
};
extern "C" struct PiecesNorm {
    int64_t m;
    const void *x, *weight;
    void* y;
    int64_t ldx, ldy, pieces, n, add;
    double eps, offset;
};
extern "C" struct Rotation {
    int64_t m;
    void* x;
    const void *cosines, *sines;
    int64_t ldx, heads, dim;
};
extern "C" struct Rows {
    int64_t m;
    const char* table;
    const int64_t* index;
    char* y;
    int64_t from_apart, to_apart, size;
};

namespace {

template <typename T>
void rms_norm(const Norm& a) {
    rms_norm(static_cast<const T*>(a.x), static_cast<const T*>(a.weight), static_cast<T*>(a.y), a.m, a.n, static_cast<float>(a.eps),
             static_cast<float>(a.offset));
}
template <typename T>
void norm_pieces(const PiecesNorm& a) {
    norm_pieces(static_cast<const T*>(a.x), static_cast<const T*>(a.weight), static_cast<T*>(a.y), a.ldx, a.ldy, a.m, a.pieces, a.n,
                static_cast<float>(a.eps), static_cast<float>(a.offset), a.add != 0);
}
template <typename T>
void rotate(const Rotation& a) {
    rotate(static_cast<T*>(a.x), a.ldx, static_cast<const T*>(a.cosines), static_cast<const T*>(a.sines), a.m, a.heads, a.dim);
}

}  // namespace

// One call of a kernel with its arguments, as a recording keeps it. Arguments begin with the number of rows, m.
extern "C" struct Call {
    void (*kernel)(void*);
    int64_t* arguments;
};

extern "C" {
void rms_norm_f32(const Norm* a) { rms_norm<float>(*a); }
void rms_norm_bf16(const Norm* a) { rms_norm<bf16>(*a); }
void norm_pieces_f32(const PiecesNorm* a) { norm_pieces<float>(*a); }
void norm_pieces_bf16(const PiecesNorm* a) { norm_pieces<bf16>(*a); }
void rotate_f32(const Rotation* a) { rotate<float>(*a); }
void rotate_bf16(const Rotation* a) { rotate<bf16>(*a); }
void take_rows(const Rows* a) { take_rows(a->table, a->index, a->y, a->from_apart, a->to_apart, a->size, a->m); }

// The loop of another library: body(context, 0 … count - 1), on this one's threads.
void run_parts(int64_t count, void (*body)(const void*, int64_t), const void* context) {
    parallel_for(count, 1, [&](int64_t i) { body(context, i); });
}
void set_num_threads(int64_t count) { threads() = static_cast<int>(std::min<int64_t>(count, MAX_THREADS)); }

// Make the calls of a recording again with m rows, one after the other.
void replay(const Call* calls, int64_t count, int64_t m) {
    for (int64_t i = 0; i < count; ++i) *calls[i].arguments = m;
    for (int64_t i = 0; i < count; ++i) calls[i].kernel(calls[i].arguments);
}
}
