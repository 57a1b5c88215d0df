// A layer's experts on a CPU: choose some for each token, sort tokens by expert, multiply with the packed weights of all experts, and sum
// what a token's experts say. An expert that no token chose is not read. A token's numbers are the same whatever stands beside it.
#include <algorithm>
#include <vector>

#include "core/platform/native.h"
#include "core/platform/shares.h"
#include "quantization/kernels/linear_cpu.h"

using namespace native;

// One packed product: its kernel and arguments, of which those that depend on the rows are set here.
extern "C" struct Product {
    void (*kernel)(const Linear*);
    const Linear* arguments;
};
// An expert: gate and up in one product with the gate behind it, down, and the columns between them; width 0: it is another rank's.
extern "C" struct Expert {
    Product gate_up, down;
    int64_t width;
};

// Arguments as ctypes fills them in: x, y [m, hidden], hidden a multiple of 16, logits [m, ldl], rows dense. chosen: experts of a token
// out of the first `count`, and `shared` more, the experts behind those; k is their sum. sorted [m, k, hidden], inner [m, k, widest],
// other_x [m, k, other_bytes] and of_groups [m, k, groups] are memory, the last two with as much for a row as any product needs.
// load [count + shared] is added to. numbers and weights [m, k]: a choice that has been made already, instead of logits; or null.
extern "C" struct Experts {
    int64_t m;
    const void *x, *logits;
    void *y, *sorted, *inner, *other_x;
    float* of_groups;
    const Expert* experts;
    int64_t* load;
    const int64_t* numbers;
    const float* weights;
    int64_t ldl, hidden, widest, other_bytes, groups, count, shared, chosen, renormalise, add;
};

namespace {

constexpr int64_t ROWS = 4;  // of a share

// The softmax of a row of logits into `scores`, filled up with zeros to whole registers; returns their sum, which is not 1 yet.
template <typename T>
float exponentials(const T* logits, int64_t count, float* scores) {
    float top = to_float(logits[0]);
    for (int64_t e = 1; e < count; ++e) top = std::max(top, to_float(logits[e]));
    Floats total{};
    for (int64_t e = 0; e < count; e += LANES) {
        Floats shifted = broadcast(-1e30f);
        for (int64_t i = 0; i < std::min<int64_t>(LANES, count - e); ++i) shifted[i] = to_float(logits[e + i]) - top;
        const Floats value = exponential(shifted);
        store(scores + e, value);
        total += value;
    }
    return sum(total);
}

// A token's experts and their weights, the likeliest first, of equals the first.
template <typename T>
void choose(const Experts& a, const T* logits, int32_t* experts, float* weights) {
    std::vector<float> scores((a.count + LANES - 1) / LANES * LANES);
    float total = exponentials(logits, a.count, scores.data());
    std::vector<bool> taken(a.count);
    for (int64_t j = 0; j < a.chosen; ++j) {
        int64_t best = -1;
        for (int64_t e = 0; e < a.count; ++e)
            if (!taken[e] && (best < 0 || scores[e] > scores[best])) best = e;
        taken[best] = true;
        experts[j] = static_cast<int32_t>(best);
        weights[j] = scores[best];
    }
    if (a.renormalise) {
        total = 0;
        for (int64_t j = 0; j < a.chosen; ++j) total += weights[j];
    }
    for (int64_t j = 0; j < a.chosen; ++j) weights[j] /= total;
    for (int64_t j = 0; j < a.shared; ++j) {
        experts[a.chosen + j] = static_cast<int32_t>(a.count + j);
        weights[a.chosen + j] = 1.0f / (1.0f + std::exp(-to_float(logits[a.count + j])));
    }
}

// A product of each expert that has tokens. Those of one kernel are one loop, so that a thread that has done with an expert goes on with
// the next, whose weights are on their way by then.
class Products {
public:
    Products(const Experts& a, Epilogue epilogue) : a(a), epilogue(epilogue) {}

    // Of rows from `start` on.
    void add(const Product& product, int64_t start, int64_t rows, const void* x, int64_t ldx, void* y, int64_t ldy) {
        Linear linear = *product.arguments;
        linear.m = rows;
        linear.x = x, linear.ldx = ldx;
        linear.y = y, linear.ldy = ldy;
        linear.other_x = static_cast<char*>(a.other_x) + start * a.other_bytes;
        linear.of_groups = a.of_groups + start * a.groups;
        linear.epilogue = epilogue;
        kernels.push_back(product.kernel);
        all.push_back(linear);
    }
    void run() {
        for (size_t begin = 0, end; begin < all.size(); begin = end) {
            for (end = begin + 1; end < all.size() && kernels[end] == kernels[begin];) ++end;
            all[begin].more = end - begin - 1;
            kernels[begin](&all[begin]);
        }
    }

private:
    const Experts& a;
    const Epilogue epilogue;
    std::vector<void (*)(const Linear*)> kernels;
    std::vector<Linear> all;
};

template <typename T>
void run(const Experts& a) {
    const int64_t k = a.chosen + a.shared, experts = a.count + a.shared;
    const T* x = static_cast<const T*>(a.x);
    T *sorted = static_cast<T*>(a.sorted), *y = static_cast<T*>(a.y);
    std::vector<int32_t> chosen(a.m * k);
    std::vector<float> weights(a.m * k);
    if (a.numbers) {
        std::copy_n(a.numbers, a.m * k, chosen.begin());
        std::copy_n(a.weights, a.m * k, weights.begin());
    } else {
        parallel_for(a.m, ROWS, [&](int64_t t) { choose(a, static_cast<const T*>(a.logits) + t * a.ldl, &chosen[t * k], &weights[t * k]); });
    }

    std::vector<int64_t> starts(experts + 1), next(experts), place(a.m * k);  // place: of a pair among `sorted`; -1: another rank's
    for (int32_t e : chosen) ++starts[e + 1];
    for (int64_t e = 0; e < experts; ++e) {
        a.load[e] += starts[e + 1];
        if (!a.experts[e].width) starts[e + 1] = 0;
        starts[e + 1] += next[e] = starts[e];
    }
    for (int64_t i = 0; i < a.m * k; ++i) place[i] = a.experts[chosen[i]].width ? next[chosen[i]]++ : -1;
    parallel_for(a.m, ROWS, [&](int64_t t) {
        for (int64_t i = t * k; i < (t + 1) * k; ++i)
            if (place[i] >= 0) std::copy_n(x + t * a.hidden, a.hidden, sorted + place[i] * a.hidden);
    });

    Products gate_up(a, SILU_MUL), down(a, STORE);
    for (int64_t e = 0; e < experts; ++e) {
        const Expert& expert = a.experts[e];
        const int64_t start = starts[e], count = starts[e + 1] - start;
        if (!count) continue;
        T *of_expert = sorted + start * a.hidden, *inner = static_cast<T*>(a.inner) + start * a.widest;
        gate_up.add(expert.gate_up, start, count, of_expert, a.hidden, inner, expert.width);
        down.add(expert.down, start, count, inner, expert.width, of_expert, a.hidden);
    }
    gate_up.run();
    down.run();

    parallel_for(a.m, ROWS, [&](int64_t t) {
        for (int64_t i = 0; i < a.hidden; i += LANES) {
            T* to = y + t * a.hidden + i;
            Floats total = a.add ? load(to) : Floats{};
            for (int64_t j = t * k; j < (t + 1) * k; ++j)
                if (place[j] >= 0) total += load(sorted + place[j] * a.hidden + i) * weights[j];
            store(to, total);
        }
    });
}

}  // namespace

extern "C" {
void experts_f32(const Experts* a) { run<float>(*a); }
void experts_bf16(const Experts* a) { run<bf16>(*a); }
}
