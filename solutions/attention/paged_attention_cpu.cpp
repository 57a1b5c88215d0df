// Paged attention on a CPU over a step's flat batch: prefill chunks and decodes in one call.
//
// Work is cut into items: some neighbouring queries of one sequence and a range of the keys that they see. An item is computed
// for one KV head at a time, with all query heads that share it, so each key and value is read once. Few rows (decode) are dotted
// with the keys where they lie; many rows (prefill) go through the register tiles of tiles.h, 64 keys at a time, with the
// softmax kept up to date on the way (online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022, §3.1).
// A long context may be split over several items; their partial results are merged at the end (Flash-Decoding).
//
// Decoding is bound by memory, and a block table leads to blocks that no processor can guess: while 64 keys are computed with, the
// next 64 are fetched, across the end of an item into the next one, which is most often the same thread's.
#include "attention/paged_ordered_cpu.h"
#include "core/platform/shares.h"

using namespace native;

namespace {

// A layer's cache: of T, or of int8 with scales.
template <typename T>
struct Cache {
    T* vectors;
    int8_t* bytes;
    uint16_t* scales;   // [2, num_blocks, block_size, H_kv], or null
    int64_t num_heads;  // in all slots: where values begin

    void write(int64_t slot_head, int64_t dim, const T* key, const T* value) const {
        if (scales) {
            quantize(key, dim, bytes + slot_head * dim, scales + slot_head);
            quantize(value, dim, bytes + (num_heads + slot_head) * dim, scales + num_heads + slot_head);
        } else {
            std::memcpy(vectors + slot_head * dim, key, dim * sizeof(T));
            std::memcpy(vectors + (num_heads + slot_head) * dim, value, dim * sizeof(T));
        }
    }
    QuantizedHead head(int64_t kv_head, int64_t dim) const {
        if (!scales) return {};
        const int8_t* keys = bytes + kv_head * dim;
        return {keys, keys + num_heads * dim, scales + kv_head, scales + num_heads + kv_head};
    }
};

template <typename T>
Work<T> prepare(const Step& step, const Item& item, int64_t kv_head, const T* query, int64_t ldq, const Cache<T>& cache, Arena& arena) {
    const int64_t dim = step.head_dim, group = step.num_heads / step.num_kv_heads, rows = item.queries * group;
    T* chunk = cache.scales ? arena.take<T>(2 * KEYS * dim) : nullptr;
    const T *keys = chunk ? chunk : cache.vectors + kv_head * dim, *values = keys + (chunk ? KEYS : cache.num_heads) * dim;
    Work<T> work{step, item, kv_head, group, rows, dim, keys, values, cache.head(kv_head, dim), chunk,
                 arena.take<Operand<T>>(rows * dim), arena.take<float>(rows * KEYS), arena.take<float>(rows), arena.take<float>(rows),
                 arena.take<float>(rows * dim)};
    for (int64_t r = 0; r < rows; ++r) {
        widen(query + (item.row + r / group) * ldq + (kv_head * group + r % group) * dim, dim, work.q + r * dim);
        work.top[r] = MINUS_INFINITY;
        work.sum[r] = 0;
    }
    std::fill(work.out, work.out + rows * dim, 0.0f);
    return work;
}

// What a head's sink adds to a sum of weights whose largest score is `top`; its value is zeros.
inline float beside(const float* sinks, int64_t head, float top) { return sinks ? std::exp(sinks[head] - top) : 0.0f; }

template <typename T>
void finish(const Work<T>& work, T* output, const float* sinks) {
    const Step& step = work.step;
    const int64_t dim = work.dim;
    for (int64_t r = 0; r < work.rows; ++r) {
        const int64_t head = work.kv_head * work.group + r % work.group, query = r / work.group;
        if (work.item.partial < 0) {
            T* to = output + ((work.item.row + query) * step.num_heads + head) * dim;
            const float factor = 1.0f / (work.sum[r] + beside(sinks, head, work.top[r]));
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
    bool joined, has_few;

    Units(const Step& step, bool has_few) :
        step(step), group(step.num_heads / step.num_kv_heads), count(step.num_items * step.num_kv_heads),
        joined(step.num_items >= 4 * threads()), has_few(has_few) {}

    const Item& item(int64_t unit) const { return step.items[unit / step.num_kv_heads]; }
    int64_t kv_head(int64_t unit) const { return unit % step.num_kv_heads; }
    bool is_few(int64_t unit) const { return has_few && item(unit).queries * group < MANY_ROWS; }
    int64_t heads(int64_t unit) const { return joined && is_few(unit) ? step.num_kv_heads : 1; }
    // The later heads of a joined item belong to its first.
    bool is_empty(int64_t unit) const { return heads(unit) > 1 && kv_head(unit) > 0; }
};

template <typename T>
void attend_unit(const Units& units, int64_t unit, const T* query, int64_t ldq, const Cache<T>& cache, T* output, const float* sinks,
                 Arena& arena) {
    const Step& step = units.step;
    const Item& item = units.item(unit);
    const int64_t dim = step.head_dim, heads = units.heads(unit), upcoming = unit + heads, rows = item.queries * units.group;
    const int64_t for_tiles = units.is_few(unit) && !step.invariant ? 0 : (rows + PANEL) * 2 * dim + KEYS * (3 * dim + 2 * PANEL);
    const int64_t for_chunk = cache.scales ? 2 * KEYS * dim : 0;
    arena.reset(heads * (rows * (KEYS + 2 * dim + 2) + for_chunk + 144) + for_tiles + 512);
    if (units.is_few(unit)) {
        static thread_local std::vector<Work<T>> works;
        works.clear();
        for (int64_t h = 0; h < heads; ++h) works.push_back(prepare(step, item, units.kv_head(unit) + h, query, ldq, cache, arena));
        const Item* next = upcoming < units.count ? &units.item(upcoming) : nullptr;
        if (step.invariant)
            few_rows(works.data(), heads, next, InOrder<Operand<T>>(arena, dim));
        else
            few_rows(works.data(), heads, next, InAnyOrder());
        for (const Work<T>& work : works) finish(work, output, sinks);
    } else {
        const Work<T> work = prepare(step, item, units.kv_head(unit), query, ldq, cache, arena);
        many_rows(work, arena);
        finish(work, output, sinks);
    }
}

template <typename T>
void merge(const Step& step, const Merge& merge, int64_t head, T* output, const float* sinks) {
    const int64_t dim = step.head_dim, stride = step.num_heads * (dim + 2);
    for (int64_t query = 0; query < merge.queries; ++query) {
        const float* first = step.partials + ((merge.partial + query) * step.num_heads + head) * (dim + 2);
        float top = MINUS_INFINITY;
        for (int64_t s = 0; s < merge.splits; ++s) top = std::max(top, first[s * merge.queries * stride]);
        T* to = output + ((merge.row + query) * step.num_heads + head) * dim;
        float total = beside(sinks, head, top);
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
// block_size, H_kv, D], of the queries' type or with scales [2, num_blocks, block_size, H_kv] of int8, output [m, H, D], sinks [H]
// or null. D is a multiple of 16.
extern "C" struct Attend {
    int64_t m;
    const Step* step;
    const void *query, *key, *value;
    void *cache, *output, *scales;
    const float* sinks;
    int64_t ldq, ldkv;
};

namespace {

template <typename T>
void attend(const Attend& a) {
    const Step& step = *a.step;
    const T *query = static_cast<const T*>(a.query), *key = static_cast<const T*>(a.key), *value = static_cast<const T*>(a.value);
    const int64_t dim = step.head_dim, kv_heads = step.num_kv_heads;
    const Cache<T> cache{static_cast<T*>(a.cache), static_cast<int8_t*>(a.cache), static_cast<uint16_t*>(a.scales),
                         step.num_blocks * step.block_size * kv_heads};
    T* output = static_cast<T*>(a.output);
    const Units units(step, HAS_ORDER<T> || !step.invariant);
    // All keys and values of the step are written before any is read: a sequence may read blocks that another one fills.
    parallel_for(a.m, 16, [&](int64_t t) {
        for (int64_t h = 0; h < kv_heads; ++h)
            cache.write(step.slot_mapping[t] * kv_heads + h, dim, key + t * a.ldkv + h * dim, value + t * a.ldkv + h * dim);
    });
    parallel_for(units.count, 1, [&](int64_t unit) {
        static thread_local Arena arena;
        if (!units.is_empty(unit)) attend_unit(units, unit, query, a.ldq, cache, output, a.sinks, arena);
    });
    parallel_for(step.num_merges * step.num_heads, 1, [&](int64_t i) {
        merge(step, step.merges[i / step.num_heads], i % step.num_heads, output, a.sinks);
    });
}

}  // namespace

extern "C" {
void attend_f32(const Attend* a) { attend<float>(*a); }
void attend_bf16(const Attend* a) { attend<bf16>(*a); }
}
