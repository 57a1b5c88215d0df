// What CUDA's built-ins mean, said in C++: with this header g++ or clang++ compiles a .cu file and the CPU runs its kernels.
//
// A kernel is one function that every thread of a grid executes. The grid is cut into blocks; the threads of a block share memory
// and can wait for each other; 32 neighbours in a block, a warp, can also exchange registers. Here the blocks run one after the
// other, and the threads of a block are real threads: what races on a card races here, and ThreadSanitizer sees it; shared memory
// is allocated at exactly the size that was asked for, so AddressSanitizer sees who leaves it. Shared memory starts each block as
// NaN: on a card it holds what some earlier block has left.
//
// What differs: one launch ends before the next begins, memory has one address space, and it is thousands of times slower.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

// Where a function runs and what the compiler may assume: nothing to say on a CPU.
#define __global__
#define __device__
#define __launch_bounds__(...)

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...), the one piece of CUDA's syntax that is not C++
#define LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
    cuda_on_cpu::launch(grid, threads, shared_bytes, stream, [&] { kernel(__VA_ARGS__); })

// extern __shared__ type name[]: the block's shared memory, whose size the launch gives
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(cuda_on_cpu::self.block->shared.get())

using std::max;
using std::min;

// ------------------------------------------------------------------------------------------------------------ places and sizes

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local uint3 threadIdx, blockIdx;  // of this thread in its block, and of the block in the grid
inline thread_local uint3 blockDim, gridDim;    // threads of a block, blocks of the grid

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

namespace cuda_on_cpu {

constexpr int WARP = 32;
#ifndef CUDA_ON_CPU_PATIENCE
#define CUDA_ON_CPU_PATIENCE 60
#endif
constexpr std::chrono::seconds PATIENCE{CUDA_ON_CPU_PATIENCE};

[[noreturn]] inline void fail(const std::string& text) {
    std::fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
                 threadIdx.x, threadIdx.y, threadIdx.z, text.c_str());
    std::abort();
}

// ------------------------------------------------------------------------------------------------------------ barriers

// Nobody passes before all have arrived. A thread that has returned from the kernel will never arrive: that is an error in the
// kernel, and is reported by whoever of the two, the one that waits and the one that returns, comes second.
class Barrier {
public:
    void begin(int members) {
        this->members = members;
        waiting = gone = 0;
    }
    void wait(const char* what, int line) {
        const int now = round;  // it cannot change before this thread has arrived
        name = what;
        place = line;
        if (++waiting == members) {
            waiting = 0;
            ++round;
            round.notify_all();
        } else {
            if (gone > 0) complain();
            round.wait(now);
        }
    }
    void leave() {
        ++gone;
        if (waiting > 0) complain();
    }

private:
    [[noreturn]] void complain() {
        fail(std::string(name) + " in line " + std::to_string(place) + " waits for a thread that has returned from the kernel");
    }
    int members = 0;
    std::atomic<int> waiting{0}, gone{0}, round{0}, place{0};
    std::atomic<const char*> name{""};
};

struct Warp {
    Barrier barrier;
    uint32_t registers[2][WARP];  // what each lane offers in this exchange and in the one before
};

struct Block {
    Block(int num_threads, size_t shared_bytes) :
        num_threads(num_threads), shared_bytes(shared_bytes), shared(new unsigned char[shared_bytes]),
        warps((num_threads + WARP - 1) / WARP) {}
    void begin() {
        std::memset(shared.get(), 0xff, shared_bytes);  // NaN, in every floating-point type
        barrier.begin(num_threads);
        for (size_t w = 0; w < warps.size(); ++w) warps[w].barrier.begin(std::min(WARP, num_threads - int(w) * WARP));
    }
    int num_threads;
    size_t shared_bytes;
    std::unique_ptr<unsigned char[]> shared;
    Barrier barrier;
    std::vector<Warp> warps;
};

struct Thread {
    Block* block;
    Warp* warp;
    int lane, turn;
};
inline thread_local Thread self;

}  // namespace cuda_on_cpu

// Waits for all threads of the block; what they have written before, all may read after it.
inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::self.block->barrier.wait("__syncthreads()", line); }

// ------------------------------------------------------------------------------------------------------------ warp shuffles

namespace cuda_on_cpu {

// Each lane offers a register and takes that of lane `from`. Two sets of registers take turns, so one barrier is enough: who
// writes a set again has passed the barrier of the exchange between, and everyone has read by then.
template <typename V>
V exchange(unsigned mask, V value, int from, int line) {
    static_assert(sizeof(V) == 4, "a shuffle moves 32 bits");
    if (mask != 0xffffffff) fail("a shuffle in line " + std::to_string(line) + " without all 32 lanes: not supported here");
    uint32_t* registers = self.warp->registers[self.turn ^= 1];
    std::memcpy(&registers[self.lane], &value, 4);
    self.warp->barrier.wait("a warp shuffle", line);
    std::memcpy(&value, &registers[from], 4);
    return value;
}

}  // namespace cuda_on_cpu

template <typename V>
V __shfl_sync(unsigned mask, V value, int from, int line = __builtin_LINE()) {
    return cuda_on_cpu::exchange(mask, value, from % cuda_on_cpu::WARP, line);
}
template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int distance, int line = __builtin_LINE()) {
    return cuda_on_cpu::exchange(mask, value, cuda_on_cpu::self.lane ^ distance, line);
}
template <typename V>
V __shfl_down_sync(unsigned mask, V value, int distance, int line = __builtin_LINE()) {
    const int from = cuda_on_cpu::self.lane + distance;  // beyond the last lane: a lane gets its own value
    return cuda_on_cpu::exchange(mask, value, from < cuda_on_cpu::WARP ? from : cuda_on_cpu::self.lane, line);
}

// ------------------------------------------------------------------------------------------------------------ 16-byte vectors

namespace cuda_on_cpu {

__attribute__((noinline)) inline void check_aligned(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail("misaligned address: 16 bytes must begin at a multiple of 16");
}

}  // namespace cuda_on_cpu

// Loaded and stored in one piece, and so only at multiples of 16 bytes.
struct alignas(16) uint4 {
    unsigned x, y, z, w;
    uint4() = default;
    uint4(unsigned x, unsigned y, unsigned z, unsigned w) : x(x), y(y), z(z), w(w) {}
    uint4(const uint4& from) { *this = from; }
    uint4& operator=(const uint4& from) {
        cuda_on_cpu::check_aligned(this);
        cuda_on_cpu::check_aligned(&from);
        x = from.x, y = from.y, z = from.z, w = from.w;
        return *this;
    }
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ------------------------------------------------------------------------------------------------------------ 16-bit floats

namespace cuda_on_cpu {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
// Rounds to a multiple of 2^places, to the even one of two equally near.
inline uint32_t round_even(uint32_t bits, int places) { return bits + (1u << (places - 1)) - 1 + (bits >> places & 1); }

}  // namespace cuda_on_cpu

// A float without its lower 16 bits: 8 bits of exponent, 7 of fraction.
struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return cuda_on_cpu::float_of(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
    const uint32_t bits = cuda_on_cpu::bits_of(x);
    return {uint16_t(std::isnan(x) ? 0x7fff : cuda_on_cpu::round_even(bits, 16) >> 16)};
}

// IEEE binary16: 5 bits of exponent (offset 15, a float's is 127), 10 of fraction.
struct __half {
    uint16_t bits;
};
inline float __half2float(__half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    if (rest >= 0x0f800000) return cuda_on_cpu::float_of(sign | 0x7f800000 | rest);  // infinite or NaN
    return cuda_on_cpu::float_of(sign | cuda_on_cpu::bits_of(cuda_on_cpu::float_of(rest) * 0x1p112f));  // 112 = 127 - 15
}
inline __half __float2half(float x) {
    const uint32_t bits = cuda_on_cpu::bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (std::isnan(x)) return {uint16_t(0x7fff)};
    if (rest >= cuda_on_cpu::bits_of(65520.0f)) return {uint16_t(sign | 0x7c00)};  // nearer to 2^16 than to the largest number
    if (rest < cuda_on_cpu::bits_of(0x1p-14f))  // subnormal: a multiple of 2^-24
        return {uint16_t(sign | uint32_t(std::nearbyint(cuda_on_cpu::float_of(rest) * 0x1p24f)))};
    return {uint16_t(sign | ((cuda_on_cpu::round_even(rest, 13) >> 13) - (112 << 10)))};
}

// ------------------------------------------------------------------------------------------------------------ launches

namespace cuda_on_cpu {

inline cudaError_t last_error = cudaSuccess;

// Keeps the threads that are started during its life on the core that starts them: of a block hardly any thread ever has work
// that another is not waiting for, and to wake one on the same core takes a fraction of the time.
class OneCore {
#ifdef __linux__
public:
    OneCore() {
        cpu_set_t here;
        CPU_ZERO(&here);
        CPU_SET(sched_getcpu(), &here);
        known = sched_getaffinity(0, sizeof before, &before) == 0 && sched_setaffinity(0, sizeof here, &here) == 0;
    }
    ~OneCore() {
        if (known) sched_setaffinity(0, sizeof before, &before);
    }

private:
    cpu_set_t before;
    bool known;
#endif
};

// Runs `kernel` in every thread of every block. The limits are a card's.
template <typename Kernel>
void launch(dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t, const Kernel& kernel) {
    const unsigned num_threads = threads.x * threads.y * threads.z;
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || num_threads < 1 || grid.y > 65535 || grid.z > 65535 || num_threads > 1024 ||
        shared_bytes > 48 * 1024) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    Block block(num_threads, shared_bytes);
    Barrier between;  // blocks
    between.begin(num_threads);
    std::atomic<int64_t> blocks_begun{0};
    const auto run = [&](unsigned t) {
        self = {&block, &block.warps[t / WARP], int(t % WARP), 0};
        threadIdx = {t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y)};
        blockDim = {threads.x, threads.y, threads.z};
        gridDim = {grid.x, grid.y, grid.z};
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; ++x) {
                    blockIdx = {x, y, z};
                    if (t == 0) block.begin(), ++blocks_begun;
                    between.wait("the start of a block", 0);
                    kernel();
                    block.barrier.leave();
                    self.warp->barrier.leave();
                    between.wait("the end of a block", 0);
                }
    };
    std::mutex mutex;
    std::condition_variable changed;
    unsigned finished = 0;
    std::vector<std::thread> all;
    {
        [[maybe_unused]] const OneCore together{};
        for (unsigned t = 0; t < num_threads; ++t)
            all.emplace_back([&, t] {
                run(t);
                const std::lock_guard lock(mutex);
                if (++finished == num_threads) changed.notify_one();
            });
    }
    {
        std::unique_lock lock(mutex);
        for (int64_t seen = -1; !changed.wait_for(lock, PATIENCE, [&] { return finished == num_threads; }); seen = blocks_begun)
            if (seen == blocks_begun) {
                std::fprintf(stderr, "cuda_on_cpu: block %d of the grid does not end: do its threads wait at different barriers?\n",
                             int(seen));
                std::abort();
            }
    }
    for (std::thread& thread : all) thread.join();
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaSuccess) return "no error";
    return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}
