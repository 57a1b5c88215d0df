// Paged attention on a CPU over a step's flat batch: prefill chunks and decodes in one call.
//
// Work is cut into items: some neighbouring queries of one sequence and a range of the keys that they see. An item is computed
// for one KV head at a time, with all query heads that share it, so each key and value is read once. Few rows (decode) are dotted
// with the keys where they lie; many rows (prefill) go through the register tiles of native.h, 64 keys at a time, with the
// softmax kept up to date on the way (online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022, §3.1).
// A long context may be split over several items; their partial results are merged at the end (Flash-Decoding).
//
// Decoding is bound by memory, and a block table leads to blocks that no processor can guess: while 64 keys are computed with, the
// next 64 are fetched, across the end of an item into the one that the thread has claimed after it.
#include <algorithm>
#include <limits>
#include <vector>

#include "core/native.h"

using namespace native;

namespace {

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
constexpr int64_t KEYS = 64;  // keys that an item looks at together

struct Item {
    int32_t sequence;   // row of the block tables
    int32_t row;        // first query in the flat batch
    int32_t queries;    // how many
    int32_t position;   // place of the first query in its sequence
    int32_t left;       // first key
    int32_t right;      // one past the last key
    int32_t partial;    // first row of the partial results, or -1: the item sees all keys of its queries
};

struct Merge {
    int32_t row, queries;     // as in Item
    int32_t partial, splits;  // the items' partial results lie behind one another
};

}  // namespace

extern "C" struct Step {
    const int64_t* slot_mapping;
    const int32_t* block_tables;
    const Item* items;
    const Merge* merges;
    float* partials;  // for each partial row and head: maximum, sum, D accumulated values
    int64_t table_stride, num_items, num_merges;
    int64_t num_heads, num_kv_heads, head_dim, block_size, num_blocks;
    int64_t window;  // 0: none
    float scale;
};

namespace {

// Rows of one item for one KV head: row r is query r / group, head first_head + r % group.
template <typename T>
struct Work {
    const Step& step;
    const Item& item;
    int64_t kv_head, group, rows, dim;
    const T *keys, *values;  // the layer's cache from this head on, [num_blocks, block_size, H_kv, D] each
    T* q;                    // [rows, D], gathered
    float *scores, *sum, *top, *out;  // [rows, KEYS], [rows], [rows], [rows, D]

    int64_t position(int64_t row) const { return item.position + row / group; }
    int64_t first_visible(int64_t row) const { return step.window ? position(row) - step.window + 1 : 0; }
};

// Where up to KEYS keys of an item lie in the cache, from its key `first` on. The rest of `offsets` repeats the first, so that
// loops may run past the end; what they find there is masked.
int64_t find(const Step& step, const Item& item, int64_t first, int64_t (&offsets)[KEYS]) {
    const int64_t size = step.block_size, stride = step.num_kv_heads * step.head_dim;
    const int64_t count = std::min<int64_t>(KEYS, item.right - first);
    const int32_t* block = step.block_tables + item.sequence * step.table_stride + first / size;
    int64_t inside = first % size, offset = (*block * size + inside) * stride;
    for (int64_t i = 0; i < count; ++i, ++inside, offset += stride) {
        if (inside == size) {
            inside = 0;
            offset = *++block * size * stride;
        }
        offsets[i] = offset;
    }
    std::fill(offsets + count, offsets + KEYS, offsets[0]);
    return count;
}

// Minus infinity where row must not see a key: scores[row] holds the keys from `first` on, of which there are `count`.
template <typename T>
void mask(const Work<T>& work, int64_t row, int64_t first, int64_t count) {
    float* scores = work.scores + row * KEYS;
    const int64_t begin = std::clamp<int64_t>(work.first_visible(row) - first, 0, KEYS);
    const int64_t end = std::clamp<int64_t>(std::min(work.position(row) + 1 - first, count), 0, KEYS);
    for (int64_t i = 0; i < begin; ++i) scores[i] = MINUS_INFINITY;
    for (int64_t i = end; i < KEYS; ++i) scores[i] = MINUS_INFINITY;
}

// Turn a row's scores into weights relative to its largest score so far, and scale down what was summed before.
template <typename T>
void update_softmax(const Work<T>& work, int64_t row) {
    float* scores = work.scores + row * KEYS;
    Floats best = load(scores);
    for (int64_t i = LANES; i < KEYS; i += LANES) best = maximum(best, load(scores + i));
    const float before = work.top[row], now = std::max(before, largest(best));
    Floats total{};
    for (int64_t i = 0; i < KEYS; i += LANES) {
        Floats w = now == MINUS_INFINITY ? Floats{} : exponential(load(scores + i) - now);
        store(scores + i, w);
        total += w;
    }
    if (now > before) {
        const float factor = before == MINUS_INFINITY ? 0.0f : std::exp(before - now);
        float* out = work.out + row * work.dim;
        for (int64_t i = 0; i < work.dim; i += LANES) store(out + i, load(out + i) * factor);
        work.sum[row] *= factor;
        work.top[row] = now;
    }
    work.sum[row] += sum(total);
}

// Few rows: each key and value is read where it lies, once for R rows. Beside each, one of the keys at `ahead` is fetched.
template <typename T>
inline void fetch_row(const T* row, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 64 / sizeof(T)) fetch(row + i);
}

// Scores of R rows with up to KEYS keys. D is N vectors of 16 (0: any number).
template <int R, int N, typename T>
void score_rows(const Work<T>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    const int64_t dim = N ? N * LANES : work.dim;
    const T* q = work.q + row * dim;
    for (int64_t base = 0; base < count; base += LANES) {
        Floats fours[R][4];
        for (int four = 0; four < 4; ++four) {
            Floats products[R][4] = {};
            for (int i = 0; i < 4; ++i) {
                const T* key = work.keys + offsets[base + 4 * four + i];
                fetch_row(work.keys + ahead[base + 4 * four + i], dim);
                for (int64_t j = 0; j < dim; j += LANES) {
                    const Floats k = load(key + j);
                    for (int r = 0; r < R; ++r) products[r][i] += k * load(q + r * dim + j);
                }
            }
            for (int r = 0; r < R; ++r) fours[r][four] = fold4(products[r]);
        }
        for (int r = 0; r < R; ++r) store(work.scores + (row + r) * KEYS + base, sums_of_folded(fours[r]) * work.step.scale);
    }
}

// Add R rows' weighted values to their outputs.
template <int R, int N, typename T>
void add_values(const Work<T>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    const int64_t dim = N ? N * LANES : work.dim;
    const float* weights = work.scores + row * KEYS;
    float* out = work.out + row * dim;
    constexpr int WIDTH = N ? N : 1;
    for (int64_t part = 0; part < dim; part += WIDTH * LANES) {
        Floats total[R][WIDTH];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < WIDTH; ++j) total[r][j] = load(out + r * dim + part + j * LANES);
        for (int64_t i = 0; i < count; ++i) {
            const T* value = work.values + offsets[i] + part;
            if (part == 0) fetch_row(work.values + ahead[i], dim);
            for (int j = 0; j < WIDTH; ++j) {
                const Floats v = load(value + j * LANES);
                for (int r = 0; r < R; ++r) total[r][j] += v * weights[r * KEYS + i];
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < WIDTH; ++j) store(out + r * dim + part + j * LANES, total[r][j]);
    }
}

// The same with bfloat16 dot products, which take pairs: neighbouring elements of a head for the scores, neighbouring keys for the
// values. D is P vectors of 32.
template <int R, int P>
void score_pairs(const Work<bf16>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    Bits q[R][P];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) q[r][p] = load_as<Bits>(work.q + ((row + r) * P + p) * 2 * LANES);
    for (int64_t base = 0; base < count; base += LANES) {
        Floats fours[R][4];
        for (int four = 0; four < 4; ++four) {
            Floats products[R][4] = {};
            for (int i = 0; i < 4; ++i) {
                const bf16* key = work.keys + offsets[base + 4 * four + i];
                fetch_row(work.keys + ahead[base + 4 * four + i], P * 2 * LANES);
                for (int p = 0; p < P; ++p) {
                    const Bits k = load_as<Bits>(key + p * 2 * LANES);
                    for (int r = 0; r < R; ++r) products[r][i] = dot_pairs(products[r][i], q[r][p], k);
                }
            }
            for (int r = 0; r < R; ++r) fours[r][four] = fold4(products[r]);
        }
        for (int r = 0; r < R; ++r) store(work.scores + (row + r) * KEYS + base, sums_of_folded(fours[r]) * work.step.scale);
    }
}

template <int R, int P>
void add_value_pairs(const Work<bf16>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    bf16 weights[R][KEYS];
    Floats total[R][2 * P];
    float* out = work.out + row * work.dim;
    for (int r = 0; r < R; ++r) {
        for (int64_t i = 0; i < KEYS; i += LANES) store(weights[r] + i, load(work.scores + (row + r) * KEYS + i));
        for (int p = 0; p < P; ++p) spread(out + r * work.dim + p * 2 * LANES, total[r][2 * p], total[r][2 * p + 1]);
    }
    for (int64_t i = 0; i < count; i += 2) {
        const bf16* even = work.values + offsets[i];
        const bf16* odd = work.values + offsets[i + 1];
        for (int64_t j = i; j < i + 2; ++j) fetch_row(work.values + ahead[j], P * 2 * LANES);
        for (int p = 0; p < P; ++p) {
            Bits pairs[2];
            interleave_quarters(load_as<Words>(even + p * 2 * LANES), load_as<Words>(odd + p * 2 * LANES), pairs);
            for (int r = 0; r < R; ++r) {
                uint32_t both;
                std::memcpy(&both, weights[r] + i, 4);
                for (int h = 0; h < 2; ++h) total[r][2 * p + h] = dot_pairs(total[r][2 * p + h], Bits{} + both, pairs[h]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) gather(out + r * work.dim + p * 2 * LANES, total[r][2 * p], total[r][2 * p + 1]);
}

template <int R>
void score(const Work<float>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    work.dim == 64 ? score_rows<R, 4>(work, row, count, offsets, ahead) : score_rows<R, 0>(work, row, count, offsets, ahead);
}
template <int R>
void add(const Work<float>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    switch (work.dim) {
        case 64: add_values<R, 4>(work, row, count, offsets, ahead); break;
        case 128: add_values<R, 8>(work, row, count, offsets, ahead); break;
        default: add_values<R, 0>(work, row, count, offsets, ahead);
    }
}
template <int R>
void score(const Work<bf16>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    switch (work.dim) {
        case 64: score_pairs<R, 2>(work, row, count, offsets, ahead); break;
        case 96: score_pairs<R, 3>(work, row, count, offsets, ahead); break;
        case 128: score_pairs<R, 4>(work, row, count, offsets, ahead); break;
        default: score_rows<R, 0>(work, row, count, offsets, ahead);
    }
}
template <int R>
void add(const Work<bf16>& work, int64_t row, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    switch (work.dim) {
        case 64: add_value_pairs<R, 2>(work, row, count, offsets, ahead); break;
        case 96: add_value_pairs<R, 3>(work, row, count, offsets, ahead); break;
        case 128: add_value_pairs<R, 4>(work, row, count, offsets, ahead); break;
        default: add_values<R, 0>(work, row, count, offsets, ahead);
    }
}

template <int R, typename T>
void attend_rows(const Work<T>& work, int64_t row, int64_t first, int64_t count, const int64_t* offsets, const int64_t* ahead) {
    score<R>(work, row, count, offsets, ahead);
    for (int r = 0; r < R; ++r) {
        mask(work, row + r, first, count);
        update_softmax(work, row + r);
    }
    add<R>(work, row, count, offsets, ahead);
}

// All heads of an item; `upcoming` is the item that comes after it, or null.
template <typename T>
void few_rows(const Work<T>* heads, int64_t num_heads, const Item* upcoming) {
    const Step& step = heads->step;
    const Item& item = heads->item;
    int64_t offsets[KEYS], ahead[KEYS];
    int64_t count = find(step, item, item.left, offsets);
    for (int64_t first = item.left; first < item.right; first += KEYS) {
        int64_t next_count = 0;
        if (first + KEYS < item.right)
            next_count = find(step, item, first + KEYS, ahead);
        else if (upcoming)
            find(step, *upcoming, upcoming->left, ahead);
        else
            std::copy(offsets, offsets + KEYS, ahead);
        for (const Work<T>* work = heads; work < heads + num_heads; ++work) {
            int64_t row = 0;
            for (; row + 4 <= work->rows; row += 4) attend_rows<4>(*work, row, first, count, offsets, ahead);
            switch (work->rows - row) {
                case 3: attend_rows<3>(*work, row, first, count, offsets, ahead); break;
                case 2: attend_rows<2>(*work, row, first, count, offsets, ahead); break;
                case 1: attend_rows<1>(*work, row, first, count, offsets, ahead); break;
            }
        }
        std::copy(ahead, ahead + KEYS, offsets);
        count = next_count;
    }
}

// Panels of native.h from keys as columns ([D, keys], for the scores) and from values as rows ([keys, D], for the output).
// Sixteen keys at once: they are columns of words, a float or two bfloat16s each.
template <typename T>
inline void pack_keys(const T* keys, const int64_t* offsets, int64_t dim, T* panel, int64_t column) {
    constexpr int64_t WORD = 4 / sizeof(T);
    for (int64_t d = 0; d < dim; d += LANES * WORD) {
        Bits block[LANES] = {};
        const int64_t words = std::min<int64_t>(LANES, (dim - d) / WORD);
        for (int i = 0; i < LANES; ++i) std::memcpy(&block[i], keys + offsets[i] + d, words * 4);
        transpose(block);
        for (int64_t w = 0; w < words; ++w) store_as(panel + (d + w * WORD) * PANEL + column * WORD, block[w]);
    }
}
// Two values at once, the second of weight zero after the last one.
inline void pack_values(const float* even, const float* odd, int64_t dim, float* panels, int64_t key) {
    for (int64_t d = 0; d < dim; d += LANES) {
        float* to = panels + d / PANEL * KEYS * PANEL + key * PANEL + d % PANEL;
        store(to, load(even + d));
        store(to + PANEL, load(odd + d));
    }
}
inline void pack_values(const bf16* even, const bf16* odd, int64_t dim, bf16* panels, int64_t key) {
    for (int64_t d = 0; d < dim; d += PANEL, panels += KEYS * PANEL) {
        Words a{}, b{};
        const size_t bytes = std::min<int64_t>(PANEL, dim - d) * sizeof(bf16);
        std::memcpy(&a, even + d, bytes);
        std::memcpy(&b, odd + d, bytes);
        Bits pairs[2];
        interleave(a, b, pairs);
        for (int h = 0; h < 2; ++h) store_as(panels + key * PANEL + h * 2 * LANES, pairs[h]);
    }
}

template <int M, typename T>
void score_tile(const Work<T>& work, int64_t row, const T* panel, int64_t offset) {
    Floats c[M][2] = {};
    tile<M>(work.q + row * work.dim, work.dim, panel, PANEL, work.dim, c);
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < 2; ++h) store(work.scores + (row + m) * KEYS + offset + h * LANES, c[m][h] * work.step.scale);
}

template <int M, typename T>
void value_tile(const Work<T>& work, int64_t row, int64_t keys, const T* weights, const T* panel, int64_t column) {
    const int64_t width = std::min<int64_t>(PANEL, work.dim - column);  // 32, or 16 at the end
    Floats c[M][2] = {};
    for (int m = 0; m < M; ++m)
        for (int64_t h = 0; h * LANES < width; ++h) c[m][h] = load(work.out + (row + m) * work.dim + column + h * LANES);
    tile<M>(weights + row * KEYS, KEYS, panel, PANEL, keys, c);
    for (int m = 0; m < M; ++m)
        for (int64_t h = 0; h * LANES < width; ++h) store(work.out + (row + m) * work.dim + column + h * LANES, c[m][h]);
}

template <int M, typename T>
void attend_tile(const Work<T>& work, int64_t row, int64_t first, int64_t count, const T* keys, const T* values, T* weights) {
    const int64_t seen = std::min(KEYS, work.position(row + M - 1) + 1 - first);  // by the last row; panels after that are not
    const int64_t used = (seen + PANEL - 1) / PANEL * PANEL;
    for (int64_t offset = 0; offset < used; offset += PANEL) score_tile<M>(work, row, keys + offset * work.dim, offset);
    for (int64_t r = row; r < row + M; ++r) {
        mask(work, r, first, count);
        update_softmax(work, r);
        for (int64_t i = 0; i < KEYS; i += LANES) store(weights + r * KEYS + i, load(work.scores + r * KEYS + i));
    }
    for (int64_t column = 0; column < work.dim; column += PANEL)
        value_tile<M>(work, row, used, weights, values + column * KEYS, column);
}

template <typename T>
void many_rows(const Work<T>& work, T* keys, T* values, T* weights) {
    const int64_t padded = (work.dim + PANEL - 1) / PANEL * PANEL;
    int64_t offsets[KEYS];
    std::memset(values, 0, padded * KEYS * sizeof(T));
    for (int64_t first = work.item.left; first < work.item.right; first += KEYS) {
        const int64_t count = find(work.step, work.item, first, offsets);
        for (int64_t i = 0; i < KEYS; i += LANES) pack_keys(work.keys, offsets + i, work.dim, keys + i / PANEL * PANEL * work.dim, i % PANEL);
        for (int64_t i = 0; i < KEYS; i += 2) pack_values(work.values + offsets[i], work.values + offsets[i + 1], work.dim, values, i);
        int64_t row = 0;
        for (; row + TILE_ROWS <= work.rows; row += TILE_ROWS) attend_tile<TILE_ROWS>(work, row, first, count, keys, values, weights);
        for (; row + 2 <= work.rows; row += 2) attend_tile<2>(work, row, first, count, keys, values, weights);
        for (; row < work.rows; ++row) attend_tile<1>(work, row, first, count, keys, values, weights);
    }
}

// Memory of a thread, handed out in lines of the cache from the start again for each unit of work.
struct Arena {
    std::vector<float> memory;
    size_t used = 0;

    void reset(size_t floats) {
        used = 0;
        if (memory.size() < floats) memory.resize(floats);
    }
    template <typename T>
    T* take(int64_t count) {
        void* at = memory.data() + used;
        used += (count * sizeof(T) + 63) / 64 * 16;
        return static_cast<T*>(at);
    }
};

template <typename T>
Work<T> prepare(const Step& step, const Item& item, int64_t kv_head, const T* query, int64_t ldq, const T* cache, Arena& arena) {
    const int64_t dim = step.head_dim, group = step.num_heads / step.num_kv_heads, rows = item.queries * group;
    const T* keys = cache + kv_head * dim;
    Work<T> work{step, item, kv_head, group, rows, dim, keys, keys + step.num_blocks * step.block_size * step.num_kv_heads * dim,
                 arena.take<T>(rows * dim), arena.take<float>(rows * KEYS), arena.take<float>(rows), arena.take<float>(rows),
                 arena.take<float>(rows * dim)};
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(work.q + r * dim, query + (item.row + r / group) * ldq + (kv_head * group + r % group) * dim, dim * sizeof(T));
        work.top[r] = MINUS_INFINITY;
        work.sum[r] = 0;
    }
    std::fill(work.out, work.out + rows * dim, 0.0f);
    return work;
}

template <typename T>
void finish(const Work<T>& work, T* output) {
    const Step& step = work.step;
    const int64_t dim = work.dim;
    for (int64_t r = 0; r < work.rows; ++r) {
        const int64_t head = work.kv_head * work.group + r % work.group, query = r / work.group;
        if (work.item.partial < 0) {
            T* to = output + ((work.item.row + query) * step.num_heads + head) * dim;
            const float factor = 1.0f / work.sum[r];
            for (int64_t i = 0; i < dim; i += LANES) store(to + i, load(work.out + r * dim + i) * factor);
        } else {
            float* to = step.partials + ((work.item.partial + query) * step.num_heads + head) * (dim + 2);
            to[0] = work.top[r];
            to[1] = work.sum[r];
            std::memcpy(to + 2, work.out + r * dim, dim * 4);
        }
    }
}

// A unit of work is an item and one KV head, or all of them where an item has few rows and there are items enough for all threads.
struct Units {
    const Step& step;
    int64_t group, count;
    bool joined;

    explicit Units(const Step& step) :
        step(step), group(step.num_heads / step.num_kv_heads), count(step.num_items * step.num_kv_heads),
        joined(step.num_items >= 4 * threads()) {}

    const Item& item(int64_t unit) const { return step.items[unit / step.num_kv_heads]; }
    int64_t kv_head(int64_t unit) const { return unit % step.num_kv_heads; }
    bool is_few(int64_t unit) const { return item(unit).queries * group < TILE_ROWS; }
    int64_t heads(int64_t unit) const { return joined && is_few(unit) ? step.num_kv_heads : 1; }
    // The next unit that nobody has: the later heads of a joined item belong to its first.
    int64_t claim(int64_t& claimed) const {
        int64_t unit;
        do unit = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED);
        while (unit < count && heads(unit) > 1 && kv_head(unit) > 0);
        return unit;
    }
};

template <typename T>
void attend_unit(const Units& units, int64_t unit, int64_t upcoming, const T* query, int64_t ldq, const T* cache, T* output, Arena& arena) {
    const Step& step = units.step;
    const Item& item = units.item(unit);
    const int64_t dim = step.head_dim, heads = units.heads(unit), rows = item.queries * units.group;
    const int64_t padded = (dim + PANEL - 1) / PANEL * PANEL;
    arena.reset(heads * (rows * (KEYS + 2 * dim + 2) + 128) + rows * KEYS + 4 * KEYS * padded + 512);
    if (units.is_few(unit)) {
        static thread_local std::vector<Work<T>> works;
        works.clear();
        for (int64_t h = 0; h < heads; ++h) works.push_back(prepare(step, item, units.kv_head(unit) + h, query, ldq, cache, arena));
        few_rows(works.data(), heads, upcoming < units.count ? &units.item(upcoming) : nullptr);
        for (const Work<T>& work : works) finish(work, output);
    } else {
        const Work<T> work = prepare(step, item, units.kv_head(unit), query, ldq, cache, arena);
        T *keys = arena.take<T>(KEYS * dim), *values = arena.take<T>(KEYS * padded);
        many_rows(work, keys, values, arena.take<T>(rows * KEYS));
        finish(work, output);
    }
}

template <typename T>
void merge(const Step& step, const Merge& merge, int64_t head, T* output) {
    const int64_t dim = step.head_dim, stride = step.num_heads * (dim + 2);
    for (int64_t query = 0; query < merge.queries; ++query) {
        const float* first = step.partials + ((merge.partial + query) * step.num_heads + head) * (dim + 2);
        float top = MINUS_INFINITY, total = 0;
        for (int64_t s = 0; s < merge.splits; ++s) top = std::max(top, first[s * merge.queries * stride]);
        T* to = output + ((merge.row + query) * step.num_heads + head) * dim;
        for (int64_t s = 0; s < merge.splits; ++s) {
            const float* part = first + s * merge.queries * stride;
            total += part[1] * std::exp(part[0] - top);
        }
        for (int64_t i = 0; i < dim; i += LANES) {
            Floats v{};
            for (int64_t s = 0; s < merge.splits; ++s) {
                const float* part = first + s * merge.queries * stride;
                v += load(part + 2 + i) * (std::exp(part[0] - top) / total);
            }
            store(to + i, v);
        }
    }
}

}  // namespace

// One layer's arguments: query [m, H, D] with rows ldq apart, key and value [m, H_kv, D] with rows ldkv apart, cache [2, num_blocks,
// block_size, H_kv, D], output [m, H, D]. D is a multiple of 16.
extern "C" struct Attend {
    int64_t m;
    const Step* step;
    const void *query, *key, *value;
    void *cache, *output;
    int64_t ldq, ldkv;
    int64_t claimed;  // units of work that threads have taken
};

namespace {

template <typename T>
void attend(Attend& a) {
    const Step& step = *a.step;
    const T *query = static_cast<const T*>(a.query), *key = static_cast<const T*>(a.key), *value = static_cast<const T*>(a.value);
    T *cache = static_cast<T*>(a.cache), *output = static_cast<T*>(a.output);
    const int64_t row = step.num_kv_heads * step.head_dim, size = step.num_blocks * step.block_size * row;
    const Units units(step);
    on_all_threads([&] {
        // All keys and values of the step are written before any is read: a sequence may read blocks that another one fills.
#pragma omp for schedule(static)
        for (int64_t t = 0; t < a.m; ++t) {
            if (t == 0) a.claimed = 0;
            const int64_t slot = step.slot_mapping[t];
            std::memcpy(cache + slot * row, key + t * a.ldkv, row * sizeof(T));
            std::memcpy(cache + size + slot * row, value + t * a.ldkv, row * sizeof(T));
        }
        static thread_local Arena arena;
        int64_t unit = units.claim(a.claimed);
        while (unit < units.count) {
            const int64_t upcoming = units.claim(a.claimed);
            attend_unit(units, unit, upcoming, query, a.ldq, cache, output, arena);
            unit = upcoming;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < step.num_merges * step.num_heads; ++i)
            merge(step, step.merges[i / step.num_heads], i % step.num_heads, output);
    });
}

}  // namespace

extern "C" {
void attend_f32(Attend* a) { attend<float>(*a); }
void attend_bf16(Attend* a) { attend<bf16>(*a); }
}
