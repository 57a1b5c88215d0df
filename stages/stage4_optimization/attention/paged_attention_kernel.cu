// Paged attention by hand in CUDA: K and V written by slot, attention in one pass (v1) or over a split context (v2).
//
// A block of threads takes one token, one KV head, and up to HEADS of the query heads that share it, so K and V are read once for
// all of these. A token of a prompt is a decode whose context ends with itself: the kernel serves any batch, but every token of a
// prompt reads its keys again. Long prompts belong to the Triton kernel, whose tiles hold many tokens.
//
// LANES neighbouring threads, a group, take one key at a time: each loads 16 bytes of it, multiplies them with its part of the
// queries, and a warp shuffle adds the parts up. So neighbouring threads read neighbouring bytes, which the memory delivers
// together, and no score is stored anywhere. Each group keeps its own softmax up to date on the way (online softmax, Milakov and
// Gimelshein 2018; FlashAttention, Dao et al. 2022, §3.1); the groups' results are merged at the end, in shared memory.
//
// A few sequences with long contexts do not fill a card: v2 cuts each context between several blocks and merges their results in
// a second kernel, by the same formula (Flash-Decoding, Dao et al. 2023). The block table is that of Kwon et al., PagedAttention,
// SOSP 2023, §4.1.
//
// The marks TASK say which parts the course leaves to its learners (stages/stage4_optimization).
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#else
#include "attention/cuda_on_cpu.h"
#endif

#include <cfloat>
#include <cstdint>
#include <cstring>

// One layer's work on S sequences with T tokens; `_Step` in paged_attention_cuda.py fills it in. Strides are in elements, heads lie
// behind one another, every row begins at a multiple of 16 bytes.
extern "C" struct Step {
    const void *query, *key, *value;  // [T, H, D], [T, H_kv, D] twice
    void *k_cache, *v_cache;          // [num_blocks, block_size, H_kv, D]
    void* output;                     // [T, H, D], contiguous
    float* partials;                  // of v2: [T, H, num_splits, 2 + D]
    const int64_t* slot_mapping;      // [T]; -1: the token is padding and not stored
    const int32_t *block_tables, *query_start_loc, *context_lens;  // [S, M], [S + 1], [S]; 0 tokens of context: padding
    int64_t query_stride, kv_stride, table_stride;
    int32_t num_tokens, num_seqs, num_heads, num_kv_heads, head_dim;
    int32_t block_shift;  // block_size == 1 << block_shift
    int32_t window;       // keys that a token sees, itself included; 0: all
    int32_t num_splits, num_threads;
    float scale;
};

namespace {

constexpr int MAX_THREADS = 128;
constexpr int MAX_HEAD_DIM = 128;
constexpr int KEYS = 4;             // a group loads so many keys before it computes with them: the loads wait together
constexpr float LOWEST = -FLT_MAX;  // the largest of no scores; finite, for infinity minus infinity is not a number
constexpr float LOG2_E = 1.44269504f;

template <typename T>
constexpr int WIDTH = 16 / sizeof(T);  // numbers that one load brings

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(__half* to, float x) { *to = __float2half(x); }
__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

template <typename T>
__device__ inline void unpack(uint4 bytes, float (&x)[WIDTH<T>]) {
    T numbers[WIDTH<T>];
    memcpy(numbers, &bytes, 16);
#pragma unroll
    for (int i = 0; i < WIDTH<T>; ++i) x[i] = to_float(numbers[i]);
}

// Adds up what LANES neighbouring lanes hold; each of them gets the sum.
template <int LANES>
__device__ inline float sum_over_lanes(float x) {
    // TASK 4.8 begin: sum_over_lanes
    // Hint: Draw the threads of a block in rows of LANES: a row, a group, takes one key, and each of its lanes N of the
    // key's numbers. Who has the whole score?
#error "Stage 4 · Task 4.8: sum_over_lanes, see stages/stage4_optimization/GUIDE.md#task-4-8"
    // TASK 4.8 end
}

// ---------------------------------------------------------------------------------------------------- which work a block has

// Positions begin..end-1 of a sequence's context.
struct Keys {
    int sequence, begin, end;
};

// What a token sees; nothing if it is padding.
__device__ inline Keys visible_keys(const Step& s, int token) {
    if (token >= s.query_start_loc[s.num_seqs]) return {0, 0, 0};
    int low = 0, high = s.num_seqs;  // query_start_loc[low] <= token < query_start_loc[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (s.query_start_loc[middle] <= token ? low : high) = middle;
    }
    const int tokens_behind = s.query_start_loc[low + 1] - 1 - token;
    const int end = max(s.context_lens[low] - tokens_behind, 0);
    return {low, s.window > 0 ? max(end - s.window, 0) : 0, end};
}

// One of `num_splits` equal parts; the last ones may be shorter, or empty.
__device__ inline Keys part_of(Keys keys, int split, int num_splits) {
    const int length = (keys.end - keys.begin + num_splits - 1) / num_splits;
    const int begin = min(keys.begin + split * length, keys.end);
    return {keys.sequence, begin, min(begin + length, keys.end)};
}

// Query heads first..first+count-1, which share a KV head.
struct Heads {
    int kv_head, first, count;
};

template <int HEADS>
__device__ inline Heads heads_of_block(const Step& s) {
    const int group = s.num_heads / s.num_kv_heads, chunks = (group + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.y / chunks, first = blockIdx.y % chunks * HEADS;
    return {kv_head, kv_head * group + first, min(HEADS, group - first)};
}

// ---------------------------------------------------------------------------------------------------- attention

// A row of partial results is what some keys contribute to one query head: the largest score, the sum of all 2^(score - largest),
// and the values weighted with these, 2 + D floats. Exponentials are powers of two, for which a card has an instruction.
struct Sum {
    float largest, weights, value;  // value: of one of the D dimensions
};

// Merges rows that lie `stride` apart.
__device__ inline Sum merge(const float* rows, int count, int stride, int dimension) {
    // TASK 4.8 begin: merge
#error "Stage 4 · Task 4.8: merge, see stages/stage4_optimization/GUIDE.md#task-4-8"
    // TASK 4.8 end
}

// The softmax's quotient; 0 for a token that sees nothing.
__device__ inline float quotient(const Sum& sum) { return sum.weights == 0 ? 0 : sum.value / sum.weights; }

// Attends over `keys` and leaves a row of partial results for each group and each of HEADS heads in shared memory.
template <typename T, int LANES, int HEADS>
__device__ void attend(const Step& s, int token, Heads heads, Keys keys, float* rows) {
    constexpr int N = WIDTH<T>;
    const int group = threadIdx.x / LANES, num_groups = blockDim.x / LANES;
    const int first = threadIdx.x % LANES * N;   // of the dimensions of a head that this lane has
    const bool has_some = first < s.head_dim;    // 80 dimensions are 10 loads, the other 6 lanes hold zeros

    float q[HEADS][N] = {}, value[HEADS][N] = {}, largest[HEADS], weights[HEADS] = {};
    const T* query = static_cast<const T*>(s.query) + token * s.query_stride + heads.first * s.head_dim + first;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        largest[h] = LOWEST;
        if (has_some && h < heads.count) unpack<T>(*reinterpret_cast<const uint4*>(query + h * s.head_dim), q[h]);
#pragma unroll
        for (int i = 0; i < N; ++i) q[h][i] *= s.scale * LOG2_E;
    }

    const int64_t slot_size = int64_t(s.num_kv_heads) * s.head_dim, of_lane = heads.kv_head * s.head_dim + first;
    const T* k_cache = static_cast<const T*>(s.k_cache) + of_lane;
    const T* v_cache = static_cast<const T*>(s.v_cache) + of_lane;
    const int32_t* block_table = s.block_tables + keys.sequence * s.table_stride;
    const int block_mask = (1 << s.block_shift) - 1;

    // TASK 4.8 begin: attend
#error "Stage 4 · Task 4.8: attend, see stages/stage4_optimization/GUIDE.md#task-4-8"
    // TASK 4.8 end
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        float* row = rows + (group * HEADS + h) * (2 + s.head_dim);
        if (first == 0) row[0] = largest[h], row[1] = weights[h];
        if (has_some)
#pragma unroll
            for (int i = 0; i < N; ++i) row[2 + first + i] = value[h][i];
    }
    __syncthreads();  // the rows are complete: threads now read what others have written
}

// One pass: a block sees all keys of its token and writes the output.
template <typename T, int LANES, int HEADS>
__global__ void __launch_bounds__(MAX_THREADS) paged_attention_v1(const Step s) {
    DYNAMIC_SHARED(float, rows);
    const int token = blockIdx.x, row_size = 2 + s.head_dim;
    const Heads heads = heads_of_block<HEADS>(s);
    attend<T, LANES, HEADS>(s, token, heads, visible_keys(s, token), rows);
    T* output = static_cast<T*>(s.output) + (int64_t(token) * s.num_heads + heads.first) * s.head_dim;
    for (int i = threadIdx.x; i < heads.count * s.head_dim; i += blockDim.x) {
        const float* of_head = rows + i / s.head_dim * row_size;
        store(output + i, quotient(merge(of_head, blockDim.x / LANES, HEADS * row_size, i % s.head_dim)));
    }
}

// Split context: a block sees a part of the keys and writes a row of partial results for each head.
template <typename T, int LANES, int HEADS>
__global__ void __launch_bounds__(MAX_THREADS) paged_attention_v2(const Step s) {
    DYNAMIC_SHARED(float, rows);
    const int token = blockIdx.x, split = blockIdx.z, row_size = 2 + s.head_dim;
    const Heads heads = heads_of_block<HEADS>(s);
    attend<T, LANES, HEADS>(s, token, heads, part_of(visible_keys(s, token), split, s.num_splits), rows);
    for (int i = threadIdx.x; i < heads.count * s.head_dim; i += blockDim.x) {
        const int h = i / s.head_dim, dimension = i % s.head_dim;
        const Sum sum = merge(rows + h * row_size, blockDim.x / LANES, HEADS * row_size, dimension);
        const int64_t index = (int64_t(token) * s.num_heads + heads.first + h) * s.num_splits + split;
        float* row = s.partials + index * row_size;
        if (dimension == 0) row[0] = sum.largest, row[1] = sum.weights;
        row[2 + dimension] = sum.value;
    }
}

// Second kernel of v2: a block merges the parts of one head of one token.
template <typename T>
__global__ void __launch_bounds__(MAX_THREADS) merge_splits(const Step s) {
    const int64_t index = int64_t(blockIdx.x) * s.num_heads + blockIdx.y;
    const int row_size = 2 + s.head_dim;
    const float* rows = s.partials + index * s.num_splits * row_size;
    T* output = static_cast<T*>(s.output) + index * s.head_dim;
    for (int i = threadIdx.x; i < s.head_dim; i += blockDim.x) store(output + i, quotient(merge(rows, s.num_splits, row_size, i)));
}

// ---------------------------------------------------------------------------------------------------- the cache

// A block writes one token's keys and values. All of a step is written before any is read, for that is another kernel: a sequence
// may read blocks that another one fills.
template <typename T>
__global__ void __launch_bounds__(MAX_THREADS) write_kv_kernel(const Step s) {
    const int64_t token = blockIdx.x, slot = s.slot_mapping[token];
    if (slot < 0) return;
    const int64_t slot_size = int64_t(s.num_kv_heads) * s.head_dim;
    const T* key = static_cast<const T*>(s.key) + token * s.kv_stride;
    const T* value = static_cast<const T*>(s.value) + token * s.kv_stride;
    T *to_k = static_cast<T*>(s.k_cache) + slot * slot_size, *to_v = static_cast<T*>(s.v_cache) + slot * slot_size;
    for (int i = threadIdx.x * WIDTH<T>; i < slot_size; i += blockDim.x * WIDTH<T>) {
        *reinterpret_cast<uint4*>(to_k + i) = *reinterpret_cast<const uint4*>(key + i);
        *reinterpret_cast<uint4*>(to_v + i) = *reinterpret_cast<const uint4*>(value + i);
    }
}

// ---------------------------------------------------------------------------------------------------- launches

template <typename T, int LANES, int HEADS>
void launch_attention(const Step& s, cudaStream_t stream) {
    const int chunks = (s.num_heads / s.num_kv_heads + HEADS - 1) / HEADS;
    const dim3 grid(s.num_tokens, s.num_kv_heads * chunks, s.num_splits);
    const size_t shared_bytes = s.num_threads / LANES * HEADS * (2 + s.head_dim) * sizeof(float);  // 34 KB at most
    if (s.num_splits == 1) {
        LAUNCH((paged_attention_v1<T, LANES, HEADS>), grid, s.num_threads, shared_bytes, stream, s);
    } else {
        LAUNCH((paged_attention_v2<T, LANES, HEADS>), grid, s.num_threads, shared_bytes, stream, s);
        LAUNCH((merge_splits<T>), dim3(s.num_tokens, s.num_heads), s.num_threads, 0, stream, s);
    }
}

template <typename T, int LANES>
void choose_heads(const Step& s, cudaStream_t stream) {
    const int group = s.num_heads / s.num_kv_heads;
    if (group == 1) return launch_attention<T, LANES, 1>(s, stream);
    if (group <= 4) return launch_attention<T, LANES, 4>(s, stream);
    launch_attention<T, LANES, 8>(s, stream);
}

template <typename T>
void choose_lanes(const Step& s, cudaStream_t stream) {
    if (s.head_dim <= MAX_HEAD_DIM / 2) return choose_heads<T, MAX_HEAD_DIM / 2 / WIDTH<T>>(s, stream);
    choose_heads<T, MAX_HEAD_DIM / WIDTH<T>>(s, stream);
}

bool is_supported(const Step& s, int itemsize) {
    return s.head_dim <= MAX_HEAD_DIM && s.head_dim * itemsize % 16 == 0 && s.num_heads % s.num_kv_heads == 0 &&
           s.num_splits >= 1 && s.num_threads % 32 == 0 && s.num_threads <= MAX_THREADS;
}

// Both kernels of a layer, one after the other on the stream.
template <typename T>
cudaError_t launch_all(const Step& s, cudaStream_t stream) {
    if (!is_supported(s, sizeof(T))) return cudaErrorInvalidValue;
    LAUNCH((write_kv_kernel<T>), s.num_tokens, s.num_threads, 0, stream, s);
    choose_lanes<T>(s, stream);
    return cudaGetLastError();
}

}  // namespace

extern "C" {
// Called from Python; 0, or a cudaError_t.
int attend_f32(const Step* step, void* stream) { return launch_all<float>(*step, static_cast<cudaStream_t>(stream)); }
int attend_f16(const Step* step, void* stream) { return launch_all<__half>(*step, static_cast<cudaStream_t>(stream)); }
int attend_bf16(const Step* step, void* stream) { return launch_all<__nv_bfloat16>(*step, static_cast<cudaStream_t>(stream)); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
