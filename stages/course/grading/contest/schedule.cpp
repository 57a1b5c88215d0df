// One product of a decode step, its loops laid out by a schedule: y[t, n] = sum over k of x[t, k] * weight[n, k].
//
// The schedule is given by macros: TOKENS and OUTPUTS of a tile whose sums stay in registers, UNROLL sums for each of them,
// INPUTS of a block (0: all), PREFETCH in bytes (0: none), and TOKENS_OUTSIDE, whether the loop over tokens is the outer one.
// Inputs are multiples of 16 * UNROLL, outputs of OUTPUTS, and tokens 1 or a multiple of TOKENS.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr long LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Codes __attribute__((vector_size(LANES)));
typedef uint64_t Words __attribute__((vector_size(64)));

struct Product {
    const float* x;
    const int8_t* weight;
    float* y;
    long num_tokens, num_inputs, num_outputs;
};

// Adds the inputs from `begin` to `end` to a tile of T tokens from `token` on and OUTPUTS outputs from `output` on.
template <int T>
void add_tile(const Product& p, long token, long output, long begin, long end) {
    Floats sums[T][OUTPUTS][UNROLL] = {};
    for (long k = begin; k < end; k += LANES * UNROLL) {
        for (int u = 0; u < UNROLL; u++) {
            for (int o = 0; o < OUTPUTS; o++) {
                const int8_t* at = p.weight + (output + o) * p.num_inputs + k + u * LANES;
                if (PREFETCH) __builtin_prefetch(at + PREFETCH);
                Codes codes;
                std::memcpy(&codes, at, sizeof codes);
                const Halves halves = __builtin_convertvector(codes, Halves);  // g++ has no instruction for both steps in one
                const Floats weights = __builtin_convertvector(__builtin_convertvector(halves, Ints), Floats);
                for (int t = 0; t < T; t++) {
                    Floats inputs;
                    std::memcpy(&inputs, p.x + (token + t) * p.num_inputs + k + u * LANES, sizeof inputs);
                    sums[t][o][u] += weights * inputs;
                }
            }
        }
    }
    for (int t = 0; t < T; t++) {
        for (int o = 0; o < OUTPUTS; o++) {
            Floats lanes = sums[t][o][0];
            for (int u = 1; u < UNROLL; u++) lanes += sums[t][o][u];
            float sum = 0;
            for (long lane = 0; lane < LANES; lane++) sum += lanes[lane];
            p.y[(token + t) * p.num_outputs + output + o] += sum;
        }
    }
}

void add_any_tile(const Product& p, long token, long output, long begin, long end) {
    if (p.num_tokens == 1) add_tile<1>(p, token, output, begin, end);
    else add_tile<TOKENS>(p, token, output, begin, end);
}

// The outputs from `first` to `last`, a thread's part.
void compute(const Product& p, long first, long last) {
    const long step = p.num_tokens == 1 ? 1 : TOKENS, block = INPUTS ? INPUTS : p.num_inputs;
    for (long token = 0; token < p.num_tokens; token++) {
        std::fill(p.y + token * p.num_outputs + first, p.y + token * p.num_outputs + last, 0.0f);
    }
    for (long begin = 0; begin < p.num_inputs; begin += block) {
        const long end = std::min(begin + block, p.num_inputs);
        if (TOKENS_OUTSIDE) {
            for (long token = 0; token < p.num_tokens; token += step)
                for (long n = first; n < last; n += OUTPUTS) add_any_tile(p, token, n, begin, end);
        } else {
            for (long n = first; n < last; n += OUTPUTS)
                for (long token = 0; token < p.num_tokens; token += step) add_any_tile(p, token, n, begin, end);
        }
    }
}

// Runs part(first, last) for even shares of `count` things, each by a thread, the first by this one.
template <class Part>
void share(long count, int num_threads, Part part) {
    std::vector<std::thread> others;
    for (int i = 1; i < num_threads; i++) others.emplace_back(part, count * i / num_threads, count * (i + 1) / num_threads);
    part(0, count / num_threads);
    for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" void product(
    const float* x, const int8_t* weight, float* y, long num_tokens, long num_inputs, long num_outputs, int num_threads
) {
    const Product p{x, weight, y, num_tokens, num_inputs, num_outputs};
    share(num_outputs / OUTPUTS, num_threads, [&p](long first, long last) { compute(p, first * OUTPUTS, last * OUTPUTS); });
}

// Reads `size` bytes, a multiple of 256, and does next to nothing with them: the floor.
extern "C" uint64_t read_all(const int8_t* data, long size, int num_threads) {
    std::atomic<uint64_t> result{0};
    share(size / 256, num_threads, [&](long first, long last) {
        Words sums[4] = {};
        for (long at = 256 * first; at < 256 * last; at += 256) {
            for (int i = 0; i < 4; i++) {
                Words words;
                std::memcpy(&words, data + at + 64 * i, sizeof words);
                sums[i] ^= words;
            }
        }
        const Words all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
        for (int i = 0; i < 8; i++) result ^= all[i];
    });
    return result;
}
