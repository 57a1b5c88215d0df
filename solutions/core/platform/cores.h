// Where the threads of a team run, whether they run at all, and how one gets to another core.
//
// A system takes a thread off its core for milliseconds when others want it, and likes to put two threads that wake each other onto one
// core. It does not know that all wait for one share of a loop; the team does. It asks for nothing but to be moved within the cores that
// it may use anyway, and each move ends with the thread being allowed all of them again.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace native {

#ifdef __linux__

// A thread's place in its team. Only the thread itself calls the functions that say nothing of others.
class alignas(64) Seat {
public:
    std::atomic<bool> works{false};  // on shares of a loop

    // The thread is this one from now on.
    void take() {
        thread = static_cast<pid_t>(syscall(SYS_gettid));
        pthread_getcpuclockid(pthread_self(), &clock);
    }
    // Say which core this thread is on.
    void enter() { core.store(sched_getcpu(), std::memory_order_relaxed); }
    bool is_on_core_of(const Seat& other) const { return sched_getcpu() == other.core.load(std::memory_order_relaxed); }
    // To a core on which nobody of the team is, if there is one that it may use.
    void leave(const Seat* team, int size) {
        cpu_set_t allowed;
        if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) move(0, allowed, team, size);
    }
    void give_way() const { sched_yield(); }

    // For others, while it works: the time that it has run, in nanoseconds.
    int64_t time() const {
        timespec now{};
        clock_gettime(clock, &now);
        return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
    }
    // Onto the caller's core, which it gets as soon as the caller sleeps.
    bool fetch_here() {
        cpu_set_t here;
        CPU_ZERO(&here);
        CPU_SET(sched_getcpu(), &here);
        fetched = sched_getaffinity(thread, sizeof(before), &before) == 0 && sched_setaffinity(thread, sizeof(here), &here) == 0;
        return fetched;
    }
    // Back, if it was fetched.
    void send_back(const Seat* team, int size) {
        if (!fetched) return;
        fetched = false;
        if (!move(thread, before, team, size)) sched_setaffinity(thread, sizeof(before), &before);
    }

private:
    std::atomic<int> core{-1};
    pid_t thread = 0;
    clockid_t clock = 0;
    bool fetched = false;  // this and the next: only the team's caller knows them
    cpu_set_t before;      // the cores that it may use

    // A core that a thread was fetched from is its own in this, so that it gets back to where its caches are.
    bool move(pid_t who, const cpu_set_t& allowed, const Seat* team, int size) const {
        cpu_set_t free = allowed;
        for (int i = 0; i < size; ++i) {
            const int used = team[i].core.load(std::memory_order_relaxed);
            if (team + i != this && used >= 0) CPU_CLR(used, &free);
        }
        return CPU_COUNT(&free) && sched_setaffinity(who, sizeof(free), &free) == 0 && sched_setaffinity(who, sizeof(allowed), &allowed) == 0;
    }
};

#else  // a system that lets nobody choose

class alignas(64) Seat {
public:
    std::atomic<bool> works{false};
    void take() {}
    void enter() {}
    bool is_on_core_of(const Seat&) const { return false; }
    void leave(const Seat*, int) {}
    void give_way() const {}
    int64_t time() const { return -1; }
    bool fetch_here() { return false; }
    void send_back(const Seat*, int) {}
};

#endif

}  // namespace native
