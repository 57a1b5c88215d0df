// What both ways to attend share: a step, cut into items, and the rows of one item.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "core/native.h"

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
    int64_t table_stride, num_items, num_merges;
    int64_t num_heads, num_kv_heads, head_dim, block_size, num_blocks;
    int64_t window;      // 0: none
    int64_t tiles_only;  // 1: few rows too go through the register tiles, so that a row is computed the same way in any batch
    float scale;
};

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
inline int64_t find(const Step& step, const Item& item, int64_t first, int64_t (&offsets)[KEYS]) {
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
