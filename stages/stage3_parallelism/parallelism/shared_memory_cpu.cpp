// Sums and gathers over the ranks of one host, through memory that they all map.
//
// In there each rank has a flag and two slots. To take part in call number c it writes its numbers into slot c mod 2, raises its flag
// to c, waits until everybody's flag is at c or beyond, and reads all slots, in the order of ranks, so that all get the same bits. Two
// slots are enough: whoever writes for call c + 2 has seen all flags at c + 1, and a rank raises its flag to c + 1 only when it has
// read everything of call c. Nothing is locked, and nobody waits longer than for the last one to come.
//
// A call's elements are dealt out to `parts`, each with flags and slots of its own. Every rank begins its parts in their order, so the
// first part that is not done everywhere is begun, or will be by whoever is free, in every rank: nobody waits in a circle.
//
// This is a library by itself; the threads are the kernels' library's, which lends its loop.
// The marks TASK say which parts the course leaves to its learners (stages/stage3_parallelism).
#include "core/platform/native.h"
#include "core/platform/shares.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <ctime>

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

using namespace native;

// What a rank knows of the memory; `_Memory` in Python.
extern "C" struct Memory {
    char* base;
    int64_t rank, size, parts, part_bytes, timeout_ns, parent;
    int64_t nanoseconds;  // spent in calls so far
    void (*run_parts)(int64_t count, void (*body)(const void*, int64_t), const void* context);
};
// Arguments as ctypes fills them in; `_Collective` in Python: m rows of `width` elements. A sum may have y = x; a gather fills y with [size · m, width].
extern "C" struct Collective {
    int64_t m;
    const void* x;
    void* y;
    Memory* memory;
    int64_t width;
};

namespace {

constexpr int64_t LINE = 64;  // bytes that caches move; no two flags share one
constexpr int SPINS = 2000;   // looks at a flag before others get the core

enum Trouble : int64_t { NONE, ENDED, LATE };

typedef std::atomic<int64_t> Word;

// The memory's layout: a line for trouble, one a rank for its process, one a rank and part for its flag, then the slots.
Word& trouble(const Memory& m) { return *reinterpret_cast<Word*>(m.base); }
Word& process(const Memory& m, int64_t rank) { return *reinterpret_cast<Word*>(m.base + (1 + rank) * LINE); }
Word& flag(const Memory& m, int64_t rank, int64_t part) {
    return *reinterpret_cast<Word*>(m.base + (1 + m.size + rank * m.parts + part) * LINE);
}
char* slot(const Memory& m, int64_t rank, int64_t part, int64_t call) {
    char* slots = m.base + (1 + m.size + m.size * m.parts) * LINE;
    return slots + ((rank * 2 + call % 2) * m.parts + part) * m.part_bytes;
}

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Whether a rank's process has ended, or the one that started this rank has: a child is asked for without taking its exit code away.
bool has_ended(const Memory& m, int64_t rank) {
    const pid_t pid = static_cast<pid_t>(process(m, rank).load(std::memory_order_relaxed));
    if (getppid() != m.parent) return true;
    siginfo_t child{};
    if (waitid(P_PID, pid, &child, WEXITED | WNOHANG | WNOWAIT) == 0) return child.si_pid == pid;
    return kill(pid, 0) != 0 && errno == ESRCH;
}

// Wait until a rank has come to a call; false if it never will, which `trouble` then tells everyone.
bool wait_for(const Memory& m, int64_t rank, int64_t part, int64_t call) {
    const Word& theirs = flag(m, rank, part);
    for (int i = 0; i < SPINS; ++i) {
        if (theirs.load(std::memory_order_acquire) >= call) return true;
        relax();
    }
    const int64_t start = now();
    for (int64_t i = 0; theirs.load(std::memory_order_acquire) < call; ++i) {
        sched_yield();
        if (i % 64 != 63) continue;
        if (trouble(m).load(std::memory_order_relaxed) != NONE) return false;
        const int64_t waited = now() - start;
        const int64_t reason = has_ended(m, rank) ? ENDED : waited > m.timeout_ns ? LATE : NONE;
        int64_t none = NONE;
        if (reason != NONE) return trouble(m).compare_exchange_strong(none, reason + 4 * rank), false;
        if (waited > 1000000) usleep(20);
    }
    return true;
}

// Say that this rank has come to `call` of a part, with all that it has written for it, and wait for all others, who may be further
// already. False if one will never come; then nothing may be read.
bool meet(const Memory& m, int64_t part, int64_t call) {
    // TASK 3.11 begin: meet
    // Hint: Two ranks, three calls, a sheet of paper: a column for each rank, its flag and its two slots. Let one be as
    // fast and the other as slow as they may be.
#error "Stage 3 · Task 3.11: meet, see stages/stage3_parallelism/GUIDE.md#task-3-11"
    // TASK 3.11 end
}

// Bring a part's elements x[first] … x[stop - 1] to all ranks, as many at a time as a slot of part_bytes holds; there may be none. Each
// time is a call of its own, whose number follows on that of the part's last one, which this rank's flag says. This rank's elements lie
// at the beginning of its slot for the call; when all have come, read(call, first element, how many of them) reads all ranks' slots.
// Where a rank never comes, the part ends.
template <typename T, typename Read>
void exchange_part(const Memory& m, int64_t part, const T* x, int64_t first, int64_t stop, const Read& read) {
    // TASK 3.11 begin: exchange_part
#error "Stage 3 · Task 3.11: exchange_part, see stages/stage3_parallelism/GUIDE.md#task-3-11"
    // TASK 3.11 end
}

// Deal a call's elements out to parts: read(part, call, first element, count) once all have written theirs.
template <typename T, typename Read>
void exchange(const Collective& a, const Read& read) {
    Memory& m = *a.memory;
    const int64_t n = a.m * a.width, share = (n / m.parts + LANES) / LANES * LANES;
    const T* x = static_cast<const T*>(a.x);
    std::atomic<int64_t> begun{0};
    const auto take = [&] {
        const int64_t part = begun.fetch_add(1), start = now(), first = part * share;
        exchange_part(m, part, x, first, std::min(n, first + share),
                      [&](int64_t call, int64_t at, int64_t count) { read(part, call, at, count); });
        if (part == 0) m.nanoseconds += now() - start;
    };
    m.run_parts(m.parts, [](const void* run, int64_t) { (*static_cast<const decltype(take)*>(run))(); }, &take);
}

inline void store_one(float* to, float v) { *to = v; }
inline void store_one(bf16* to, float v) {
    Floats all{};
    all[0] = v;
    *to = {narrow(all)[0]};
}

// y[0] … y[count - 1] = the sums of what the slots of all ranks hold for a call, in float32 whatever the type, begun with 0 and added in
// the order of ranks, so that all ranks have the same bits; rounded once, at the end. `load` and `store` take LANES numbers at a time,
// `to_float` and `store_one` one. Behind `count` nothing is read or written.
template <typename T>
void add_slots(const Memory& m, int64_t part, int64_t call, int64_t count, T* y) {
    // TASK 3.11 begin: add_slots
#error "Stage 3 · Task 3.11: add_slots, see stages/stage3_parallelism/GUIDE.md#task-3-11"
    // TASK 3.11 end
}

// y = the sum over the ranks.
template <typename T>
void all_reduce(const Collective& a) {
    T* y = static_cast<T*>(a.y);
    exchange<T>(a, [&](int64_t part, int64_t call, int64_t first, int64_t count) {
        add_slots(*a.memory, part, call, count, y + first);
    });
}

// y = all ranks' x behind one another.
template <typename T>
void all_gather(const Collective& a) {
    const Memory& m = *a.memory;
    T* y = static_cast<T*>(a.y);
    exchange<T>(a, [&](int64_t part, int64_t call, int64_t first, int64_t count) {
        for (int64_t rank = 0; rank < m.size; ++rank) {
            std::memcpy(y + rank * a.m * a.width + first, slot(m, rank, part, call), count * sizeof(T));
        }
    });
}

}  // namespace

extern "C" {
void all_reduce_f32(const Collective* a) { all_reduce<float>(*a); }
void all_reduce_bf16(const Collective* a) { all_reduce<bf16>(*a); }
void all_gather_f32(const Collective* a) { all_gather<float>(*a); }
void all_gather_bf16(const Collective* a) { all_gather<bf16>(*a); }

// Bytes of memory that so many ranks need.
int64_t shared_memory_bytes(int64_t size, int64_t parts, int64_t part_bytes) {
    return (1 + size + size * parts) * LINE + size * 2 * parts * part_bytes;
}
// Come in: others can see whether this process lives.
void shared_memory_enter(const Memory* m) { process(*m, m->rank).store(getpid()); }
// 0, or what is wrong + 4 · the rank that it is wrong with.
int64_t shared_memory_trouble(const Memory* m) { return trouble(*m).load(); }
}
