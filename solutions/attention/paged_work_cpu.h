// What both ways to attend share: a step, cut into items, and the rows of one item.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "core/platform/tiles.h"

namespace native {

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

struct Step {
    const int64_t* slot_mapping;
    const int32_t* block_tables;
    const Item* items;
    const Merge* merges;
    float* partials;  // for each partial row and head: maximum, sum, D accumulated values
    const int64_t* hidden;  // of each query a word: bit d hides the key d places before it; or null
    int64_t table_stride, num_items, num_merges;
    int64_t num_heads, num_kv_heads, head_dim, block_size, num_blocks;
    int64_t window;      // 0: none
    int64_t invariant;  // 1: few rows too are summed in the order of many, so that a row's result is the same in any batch
    float scale, soft_cap;  // of scores; a cap of 0: none
};

// Each of `count` scores x becomes soft_cap · tanh(x / soft_cap), if there is a cap; by exponentials, which cannot overflow.
inline void cap(const Step& step, float* scores, int64_t count) {
    if (step.soft_cap > 0)
        for (int64_t i = 0; i < count; i += LANES) {
            const Floats x = load(scores + i), small = exponential(maximum(x, -x) * (-2.0f / step.soft_cap));
            const Floats size = (1.0f - small) / (1.0f + small) * step.soft_cap;
            store(scores + i, x < 0.0f ? -size : size);
        }
}

// The keys and values of one head in an int8 cache, with a scale for each vector; keys is null for a cache of another type.
struct QuantizedHead {
    const int8_t *keys, *values;            // [num_blocks, block_size, H_kv, D] from this head on
    const uint16_t *key_scales, *value_scales;  // [num_blocks, block_size, H_kv] from this head on, halves
};

// One vector of an int8 cache in the type that is computed in; `offset` is that of its first element.
template <typename T>
inline void dequantize(const int8_t* vectors, const uint16_t* scales, int64_t offset, int64_t dim, T* to) {
    const Floats scale = broadcast(half_to_float(scales[offset / dim]));
    for (int64_t i = 0; i < dim; i += LANES) store(to + i, __builtin_convertvector(to_ints(load_as<SignedBytes>(vectors + offset + i)), Floats) * scale);
}

// Store one vector of int8 numbers and its scale: the largest magnitude / 127, rounded up, so that nothing exceeds 127.
template <typename T>
inline void quantize(const T* vector, int64_t dim, int8_t* to, uint16_t* scale) {
    Floats most{};
    for (int64_t i = 0; i < dim; i += LANES) {
        const Floats v = load(vector + i);
        most = maximum(most, maximum(v, -v));
    }
    *scale = half_above(std::min(largest(most) / 127.0f, 65504.0f));
    const float step = half_to_float(*scale), inverse = step > 0 ? 1.0f / step : 0.0f;
    for (int64_t i = 0; i < dim; i += LANES) {
        const Floats rounded = load(vector + i) * inverse + 12582912.0f;  // 1.5 * 2^23 leaves the integer in the low bits
        store_as(to + i, to_bytes<SignedBytes>((Ints)rounded));
    }
}

// Rows of one item for one KV head: row r is query r / group, head first_head + r % group.
template <typename T>
struct Work {
    const Step& step;
    const Item& item;
    int64_t kv_head, group, rows, dim;
    const T *keys, *values;  // the layer's cache from this head on, [num_blocks, block_size, H_kv, D] each
    QuantizedHead int8;      // or this
    T* chunk;                // [2, KEYS, D]: keys and values of an int8 cache in T, as many as are looked at together
    Operand<T>* q;           // [rows, D], gathered
    float *scores, *sum, *top, *out;  // [rows, KEYS], [rows], [rows], [rows, D]

    // Keys and values that lie at `offsets` of an int8 cache, one behind the other in `chunk`, and those at `ahead` fetched.
    void load_chunk(int64_t count, const int64_t* offsets, const int64_t* ahead) const {
        for (int64_t i = 0; i < count; ++i) {
            dequantize(int8.keys, int8.key_scales, offsets[i], dim, chunk + i * dim);
            dequantize(int8.values, int8.value_scales, offsets[i], dim, chunk + (KEYS + i) * dim);
            for (int64_t j = 0; j < dim; j += 64) {
                fetch(int8.keys + ahead[i] + j);
                fetch(int8.values + ahead[i] + j);
            }
        }
        const int64_t rest = (KEYS - count) * dim;  // masked, but read
        std::fill(chunk + count * dim, chunk + count * dim + rest, T{});
        std::fill(chunk + (KEYS + count) * dim, chunk + (KEYS + count) * dim + rest, T{});
    }

    int64_t position(int64_t row) const { return item.position + row / group; }
    int64_t first_visible(int64_t row) const { return step.window ? position(row) - step.window + 1 : 0; }

    // Hide the keys that a tree of drafts hides from a row: of KEYS scores from the key `first` on, which lie `stride` apart.
    void hide(int64_t row, int64_t first, float* scores, int64_t stride) const {
        if (!step.hidden) return;
        for (auto word = static_cast<uint64_t>(step.hidden[item.row + row / group]); word; word &= word - 1) {
            const int64_t key = position(row) - __builtin_ctzll(word) - first;
            if (key >= 0 && key < KEYS) scores[key * stride] = MINUS_INFINITY;
        }
    }
};

// The key that an item begins to look at keys from, KEYS at a time. In a window the first that it sees depends on how a prompt is
// cut; so that sums do not, they are made of the same KEYS then wherever an item begins.
inline int64_t begin(const Step& step, const Item& item) { return step.invariant ? item.left / KEYS * KEYS : item.left; }

// Where up to KEYS keys of an item lie in the cache, from its key `first` on. What is left of its first key or right of its last one
// repeats one of those, so that loops may run over it; it is masked.
inline int64_t find(const Step& step, const Item& item, int64_t first, int64_t (&offsets)[KEYS]) {
    const int64_t size = step.block_size, stride = step.num_kv_heads * step.head_dim;
    const int64_t count = std::min<int64_t>(KEYS, item.right - first), skipped = std::max<int64_t>(0, item.left - first);
    const int32_t* block = step.block_tables + item.sequence * step.table_stride + (first + skipped) / size;
    int64_t inside = (first + skipped) % size, offset = (*block * size + inside) * stride;
    std::fill(offsets, offsets + skipped, offset);
    for (int64_t i = skipped; i < count; ++i, ++inside, offset += stride) {
        if (inside == size) {
            inside = 0;
            offset = *++block * size * stride;
        }
        offsets[i] = offset;
    }
    std::fill(offsets + count, offsets + KEYS, offsets[0]);
    return count;
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

}  // namespace native
