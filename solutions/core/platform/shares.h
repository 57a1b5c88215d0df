// A kernel's work in small shares, which threads take as they are free: one that is late, or was taken off its core, finds less to do.
//
// Every thread has a range of a loop's shares, at first the caller all of them and its helpers none. A thread takes from the front of its
// own range, so that it reads memory in order and meets nobody; when that is empty it takes the back half of another's. The caller
// waits only for shares that somebody has begun: a helper that does not run costs its help and no more. Whoever waits turns for some
// microseconds, then sleeps. A helper that was taken off its core in the middle of a share is put onto the caller's, which has nothing
// else to do, and one that finds itself on the caller's core before it begins goes to another one. (Work stealing, Blumofe and Leiserson, "Scheduling Multithreaded Computations by Work Stealing", JACM 1999.)
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include <pthread.h>

#include "core/platform/cores.h"

namespace native {

constexpr int MAX_THREADS = 256;

// A processor's hint that a loop only waits.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Turn for so long at most; returns whether it has become true.
template <typename True>
bool turn_until(const True& is_true, std::chrono::microseconds most) {
    const auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < 16; ++i) {
            if (is_true()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() - start < most);
    return false;
}

// Where threads wait until something has become true.
class Bell {
public:
    template <typename True>
    void wait_until(const True& is_true) {
        static constexpr std::chrono::microseconds PATIENCE{50};  // longer than most kernels take
        if (!turn_until(is_true, PATIENCE)) sleep_until(is_true);
    }
    template <typename True>
    void sleep_until(const True& is_true) {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            sleeping.store(true);
            if (is_true()) return;
            rung.wait(lock);
        }
    }
    // Wake them: the caller has just made it true. Both sides look only after they have written, in one order for all (seq_cst).
    void ring() {
        if (!sleeping.load()) return;
        {
            std::lock_guard<std::mutex> lock(mutex);
            sleeping.store(false);
        }
        rung.notify_all();
    }

private:
    std::atomic<bool> sleeping{false};
    std::mutex mutex;
    std::condition_variable rung;
};

// The threads that help whoever has a loop to run, one loop at a time. They last as long as the process.
class Helpers {
public:
    typedef void (*Body)(const void* context, int64_t share);

    // Run body(context, 0 … count - 1) on `team` threads; false, and nothing done, while another thread's loop is running.
    bool run(Body body, const void* context, int64_t count, int team) {
        if (taken.exchange(true, std::memory_order_acquire)) return false;
        for (; started < team; ++started) std::thread(&Helpers::help, this, started).detach();
        this->body = body;
        this->context = context;
        size.store(team, std::memory_order_relaxed);
        unfinished.store(count, std::memory_order_relaxed);
        ranges[0].put(0, count);
        seats[0].enter();
        loops.fetch_add(1);
        begun.ring();
        work(0);
        await_end(team);
        taken.store(false, std::memory_order_release);
        return true;
    }

private:
    // Shares first … end - 1 that nobody has taken, in one word that changes at once. A thread's own lies in a cache line of its own.
    struct alignas(64) Range {
        std::atomic<uint64_t> word{0};

        static uint64_t pack(uint64_t first, uint64_t end) { return first << 32 | end; }
        void put(uint64_t first, uint64_t end) { word.store(pack(first, end), std::memory_order_release); }
        // Take the first share, or the back half; false if there is none.
        template <bool HALF>
        bool take(int64_t& first, int64_t& end) {
            uint64_t now = word.load(std::memory_order_acquire), rest;
            do {
                const uint64_t begin = now >> 32, stop = now & 0xffffffff, middle = HALF ? begin + (stop - begin) / 2 : begin;
                if (begin == stop) return false;
                first = middle;
                end = HALF ? stop : middle + 1;
                rest = HALF ? pack(begin, middle) : pack(begin + 1, stop);
            } while (!word.compare_exchange_weak(now, rest, std::memory_order_acq_rel, std::memory_order_acquire));
            return true;
        }
    };

    std::atomic<bool> taken{false};
    int started = 1;  // threads, with the one whose loop it is
    // The loop. Only who holds shares of it reads these two: until they are done it cannot end.
    Body body;
    const void* context;
    std::atomic<int> size{1};  // of the team
    alignas(64) std::atomic<uint32_t> loops{0};
    Bell begun;
    alignas(64) std::atomic<int64_t> unfinished{0};  // shares
    Bell finished;
    Range ranges[MAX_THREADS];
    Seat seats[MAX_THREADS];

    void help(int self) {
        Seat& seat = seats[self];
        seat.take();
        for (uint32_t seen = 0;;) {
            begun.wait_until([&] { return loops.load() != seen; });
            seen = loops.load();
            const int team = size.load(std::memory_order_relaxed);
            if (self >= team) continue;
            if (seat.is_on_core_of(seats[0])) seat.leave(seats, team);
            seat.enter();
            seat.works.store(true, std::memory_order_release);
            work(self);
            seat.works.store(false, std::memory_order_release);
            if (seat.is_on_core_of(seats[0])) seat.give_way();
        }
    }

    // The caller has found nothing more to do, so what is left has been begun by helpers.
    void await_end(int team) {
        static constexpr std::chrono::microseconds GLANCE{20};
        const auto is_over = [&] { return unfinished.load() == 0; };
        if (turn_until(is_over, GLANCE)) return;
        int64_t before[MAX_THREADS];
        for (int i = 1; i < team; ++i) before[i] = seats[i].works.load(std::memory_order_acquire) ? seats[i].time() : -1;
        if (turn_until(is_over, GLANCE)) return;
        bool fetched = false;
        for (int i = 1; i < team; ++i)
            if (before[i] >= 0 && seats[i].works.load() && seats[i].time() == before[i]) fetched |= seats[i].fetch_here();  // it did not run
        if (!fetched) return finished.wait_until(is_over);
        finished.sleep_until(is_over);
        seats[0].enter();
        for (int i = 1; i < team; ++i) seats[i].send_back(seats, team);
    }

    // Do shares until there are none, and then say how many.
    void work(int self) {
        int64_t done = 0;
        for (int64_t share; find(self, share); ++done) body(context, share);
        if (done && unfinished.fetch_sub(done) == done) finished.ring();
    }

    // The share to do next: the first of this thread's range, or of what it steals; the rest of that becomes its range. No other thread
    // puts anything there, so what it has seen empty stays so.
    bool find(int self, int64_t& share) {
        int64_t end;
        if (ranges[self].take<false>(share, end)) return true;
        const int team = size.load(std::memory_order_relaxed);
        for (int i = 1; i < team; ++i) {
            if (!ranges[(self + i) % team].take<true>(share, end)) continue;
            ranges[self].put(share + 1, end);
            return true;
        }
        return false;
    }
};

// Threads of every loop, the caller's among them.
inline std::atomic<int>& threads() {
    static std::atomic<int> count{1};
    return count;
}

// This process's helpers. A fork takes no thread along but the one that calls it, so a child gets helpers of its own.
inline Helpers*& helpers() {
    static Helpers* all = [] {
        pthread_atfork(nullptr, nullptr, [] { helpers() = new Helpers; });
        return new Helpers;
    }();
    return all;
}

// Call body(0) … body(count - 1), in any order and on any thread: `grain` of them, a share, on one. A loop of one share, or one that
// comes while another caller's is running, runs on the caller alone.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
    const int64_t shares = (count + grain - 1) / grain;
    const auto run_share = [&](int64_t share) {
        for (int64_t i = share * grain; i < std::min(count, (share + 1) * grain); ++i) body(i);
    };
    typedef decltype(run_share) Share;
    const int team = static_cast<int>(std::min<int64_t>(threads().load(std::memory_order_relaxed), shares));
    if (team > 1 && helpers()->run([](const void* run, int64_t share) { (*static_cast<const Share*>(run))(share); }, &run_share, shares, team))
        return;
    for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace native
