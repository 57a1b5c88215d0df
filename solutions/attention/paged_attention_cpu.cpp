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

// Many rows are the columns of panels, with keys and values as the rows of the tiles that run against them. So scores come out as
// [keys, rows]: the softmax of 16 rows is computed side by side, and keys need no packing.

// Sixteen rows of a matrix as columns of a panel.
template <typename T>
void pack_columns(const T* rows, int64_t count, int64_t dim, T* panel, int64_t column) {
    constexpr int64_t WORD = 4 / sizeof(T);  // a float, or two bfloat16s
    for (int64_t d = 0; d < dim; d += LANES * WORD) {
        Bits block[LANES] = {};
        const int64_t words = std::min<int64_t>(LANES, (dim - d) / WORD);
        for (int i = 0; i < count; ++i) std::memcpy(&block[i], rows + i * dim + d, words * 4);
        transpose(block);
        for (int64_t w = 0; w < words; ++w) store_as(panel + (d + w * WORD) * PANEL + column * WORD, block[w]);
    }
}

// Two neighbouring values: floats one behind the other, bfloat16s in pairs, [D, 2].
inline void pack_values(const float* even, const float* odd, int64_t dim, float* to) {
    std::memcpy(to, even, dim * sizeof(float));
    std::memcpy(to + dim, odd, dim * sizeof(float));
}
inline void pack_values(const bf16* even, const bf16* odd, int64_t dim, bf16* to) {
    for (int64_t d = 0; d < dim; d += LANES) {
        const Bits low = __builtin_convertvector(load_as<Halves>(even + d), Bits), high = __builtin_convertvector(load_as<Halves>(odd + d), Bits);
        store_as(to + 2 * d, low | high << 16);
    }
}
// The same for the weights of 16 rows: panel is [2, 32] floats or [32, 2] bfloat16s.
inline void pack_weights(Floats even, Floats odd, float* panel) {
    store(panel, even);
    store(panel + PANEL, odd);
}
inline void pack_weights(Floats even, Floats odd, bf16* panel) {
    store_as(panel, __builtin_convertvector(narrow(even), Bits) | __builtin_convertvector(narrow(odd), Bits) << 16);
}

// 32 rows of an item, and what is known of them so far.
template <typename T>
struct Columns {
    T* queries;           // panel [D, 32]
    float* out;           // [D, 32]
    Floats top[2], sum[2];
    Ints first[2], last[2];  // keys that each row sees
};

// The memory that chunk after chunk goes through: keys [KEYS, D], values in pairs, scores [KEYS, 32] and weights as a panel.
template <typename T>
struct Chunk {
    T *keys, *values, *weights;
    float* scores;
};

template <typename T>
void attend_columns(const Work<T>& work, Columns<T>& columns, int64_t first, const Chunk<T>& chunk) {
    constexpr int64_t WORD = 4 / sizeof(T);
    const int64_t dim = work.dim, seen = std::min<int64_t>(KEYS, columns.last[1][LANES - 1] + 1 - first);
    if (seen <= 0) return;
    const int64_t count = (seen + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    for (int64_t k = 0; k < count; k += TILE_ROWS) {
        Floats c[TILE_ROWS][2] = {};
        tile<TILE_ROWS>(chunk.keys + k * dim, dim, columns.queries, PANEL, dim, c);
        for (int m = 0; m < TILE_ROWS; ++m)
            for (int h = 0; h < 2; ++h) store(chunk.scores + (k + m) * PANEL + h * LANES, c[m][h] * work.step.scale);
    }
    const bool all_seen = columns.last[0][0] >= first + count - 1 && columns.first[1][LANES - 1] <= first;
    Floats factor[2];
    for (int h = 0; h < 2; ++h) {
        float* scores = chunk.scores + h * LANES;
        if (!all_seen) {
            for (int64_t k = 0; k < count; ++k) {
                const Ints key = Ints{} + static_cast<int32_t>(first + k);
                const Floats score = load(scores + k * PANEL);
                store(scores + k * PANEL, (key >= columns.first[h]) & (key <= columns.last[h]) ? score : broadcast(MINUS_INFINITY));
            }
        }
        Floats best = columns.top[h];
        for (int64_t k = 0; k < count; ++k) best = maximum(best, load(scores + k * PANEL));
        const Floats base = best == MINUS_INFINITY ? Floats{} : best;  // a row that has seen nothing yet gets weights of zero
        factor[h] = exponential(columns.top[h] - base);
        Floats total{};
        for (int64_t k = 0; k < count; k += 2) {
            const Floats even = exponential(load(scores + k * PANEL) - base), odd = exponential(load(scores + (k + 1) * PANEL) - base);
            total += even + odd;
            pack_weights(even, odd, chunk.weights + k * PANEL + h * LANES * WORD);
        }
        columns.top[h] = best;
        columns.sum[h] = columns.sum[h] * factor[h] + total;
    }
    for (int64_t d = 0; d < dim; d += TILE_ROWS) {
        Floats c[TILE_ROWS][2];
        for (int m = 0; m < TILE_ROWS; ++m)
            for (int h = 0; h < 2; ++h) c[m][h] = load(columns.out + (d + m) * PANEL + h * LANES) * factor[h];
        tile<TILE_ROWS>(chunk.values + d * WORD, WORD, chunk.weights, PANEL, count, c, {}, WORD * dim);
        for (int m = 0; m < TILE_ROWS; ++m)
            for (int h = 0; h < 2; ++h) store(columns.out + (d + m) * PANEL + h * LANES, c[m][h]);
    }
}

// Results of 32 columns back into rows: `from` and `count` say which.
template <typename T>
void unpack_columns(const Work<T>& work, const Columns<T>& columns, int64_t from, int64_t count) {
    for (int64_t h = 0; h * LANES < count; ++h) {
        const int64_t row = from + h * LANES, n = std::min<int64_t>(LANES, count - h * LANES);
        std::memcpy(work.top + row, &columns.top[h], n * sizeof(float));
        std::memcpy(work.sum + row, &columns.sum[h], n * sizeof(float));
        for (int64_t d = 0; d < work.dim; d += LANES) {
            Bits block[LANES];
            for (int i = 0; i < LANES; ++i) block[i] = load_as<Bits>(columns.out + (d + i) * PANEL + h * LANES);
            transpose(block);
            for (int64_t i = 0; i < n; ++i) store_as(work.out + (row + i) * work.dim + d, block[i]);
        }
    }
}

template <typename T>
void many_rows(const Work<T>& work, Arena& arena) {
    const int64_t dim = work.dim, num_columns = (work.rows + PANEL - 1) / PANEL;
    static thread_local std::vector<Columns<T>> all;
    all.resize(num_columns);
    for (int64_t p = 0; p < num_columns; ++p) {
        Columns<T>& columns = all[p];
        columns.queries = arena.take<T>(dim * PANEL);
        columns.out = arena.take<float>(dim * PANEL);
        std::fill(columns.out, columns.out + dim * PANEL, 0.0f);
        for (int h = 0; h < 2; ++h) {
            const int64_t row = p * PANEL + h * LANES, n = std::clamp<int64_t>(work.rows - row, 0, LANES);
            pack_columns(work.q + row * dim, n, dim, columns.queries, h * LANES);
            columns.top[h] = broadcast(MINUS_INFINITY);
            columns.sum[h] = Floats{};
            for (int i = 0; i < LANES; ++i) {
                const int64_t r = std::min(row + i, work.rows - 1);
                columns.first[h][i] = static_cast<int32_t>(work.first_visible(r));
                columns.last[h][i] = static_cast<int32_t>(std::min<int64_t>(work.position(r), work.item.right - 1));
            }
        }
    }
    const Chunk<T> chunk{arena.take<T>(KEYS * dim), arena.take<T>(KEYS * dim), arena.take<T>(KEYS * PANEL), arena.take<float>(KEYS * PANEL)};
    int64_t offsets[KEYS];
    for (int64_t first = work.item.left; first < work.item.right; first += KEYS) {
        find(work.step, work.item, first, offsets);
        for (int64_t i = 0; i < KEYS; ++i) std::memcpy(chunk.keys + i * dim, work.keys + offsets[i], dim * sizeof(T));
        for (int64_t i = 0; i < KEYS; i += 2) pack_values(work.values + offsets[i], work.values + offsets[i + 1], dim, chunk.values + i * dim);
        for (Columns<T>& columns : all) attend_columns(work, columns, first, chunk);
    }
    for (int64_t p = 0; p < num_columns; ++p) unpack_columns(work, all[p], p * PANEL, std::min<int64_t>(PANEL, work.rows - p * PANEL));
}

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
    const int64_t for_columns = units.is_few(unit) ? 0 : (rows + PANEL) * 2 * dim + KEYS * (2 * dim + 2 * PANEL);
    arena.reset(heads * (rows * (KEYS + 2 * dim + 2) + 128) + for_columns + 512);
    if (units.is_few(unit)) {
        static thread_local std::vector<Work<T>> works;
        works.clear();
        for (int64_t h = 0; h < heads; ++h) works.push_back(prepare(step, item, units.kv_head(unit) + h, query, ldq, cache, arena));
        few_rows(works.data(), heads, upcoming < units.count ? &units.item(upcoming) : nullptr);
        for (const Work<T>& work : works) finish(work, output);
    } else {
        const Work<T> work = prepare(step, item, units.kv_head(unit), query, ldq, cache, arena);
        many_rows(work, arena);
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
