"""Loops in shares (``core/platform/shares.h``): each item once, whoever takes it; races, late threads, forks,
and who is on which core."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from solutions.core.platform import native

if native.compiler() is None:
    pytest.skip("there is no C++ compiler here", allow_module_level=True)

PROGRAM = r"""
#include "core/platform/shares.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include <sys/wait.h>
#include <unistd.h>

using namespace native;

// Loops of every length, one behind the other: each item must have run once, and the caller sees what it wrote.
bool exact(int rounds, int most) {
    std::vector<int> seen(most);
    for (int round = 0; round < rounds; ++round) {
        const int count = round % most, grain = 1 + round % 3;
        parallel_for(count, grain, [&](int64_t i) { seen[i] += round; });
        for (int i = 0; i < count; ++i) {
            if (seen[i] != round) return std::printf("round %d: item %d ran with %d\n", round, i, seen[i]), false;
            seen[i] = 0;
        }
    }
    return true;
}

// Two callers at once, as two engines in one process.
bool callers() {
    std::atomic<bool> good{true};
    std::vector<std::thread> all;
    for (int c = 0; c < 3; ++c) all.emplace_back([&] { if (!exact(3000, 40)) good = false; });
    for (std::thread& one : all) one.join();
    return good;
}

// A helper that sits on a share for long holds only that one: the caller does all others meanwhile.
bool late() {
    std::atomic<int> others{0};
    std::atomic<bool> helped{false};
    const std::thread::id caller = std::this_thread::get_id();
    parallel_for(100, 1, [&](int64_t) {
        if (std::this_thread::get_id() == caller) {
            while (!helped) std::this_thread::yield();
            ++others;
        } else if (!helped.exchange(true)) {
            while (others < 99) std::this_thread::yield();
        } else {
            ++others;
        }
    });
    return others == 99;
}

// A child has no thread of its parent's but the caller, and needs helpers of its own to finish this.
bool forked() {
    exact(100, 40);  // so that the parent has helpers
    if (pid_t child = fork()) {
        int status = 0;
        waitpid(child, &status, 0);
        return status == 0 && exact(100, 40);
    }
    alarm(20);
    _exit(late() && exact(100, 40) ? 0 : 1);
}

// Bells that ring just when the other thread goes to sleep: none is missed.
bool bells() {
    std::atomic<int> rung{0};
    Bell bell, back;
    std::atomic<int> heard{0};
    std::thread other([&] {
        for (int i = 1; i <= 20000; ++i) {
            bell.wait_until([&] { return rung.load() == i; });
            heard.store(i);
            back.ring();
        }
    });
    for (int i = 1; i <= 20000; ++i) {
        const auto start = std::chrono::steady_clock::now();
        while (std::chrono::steady_clock::now() - start < std::chrono::nanoseconds(48000 + i % 800 * 10)) relax();
        rung.store(i);
        bell.ring();
        back.wait_until([&] { return heard.load() == i; });
    }
    other.join();
    return true;
}

#ifdef __linux__
cpu_set_t only(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    return set;
}
void spin(int microseconds) {
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() - start < std::chrono::microseconds(microseconds)) relax();
}

// A helper that may use one core only, which four other threads want: before long it is taken off it in the middle of a share.
// Then it ends the share on the caller's core; and when it begins the next one it may use what it might before.
bool fetched(const std::vector<int>& cores) {
    const cpu_set_t mine = only(cores[0]), other = only(cores[1]);
    std::atomic<bool> came{false}, strayed{false}, over{false};
    std::vector<std::thread> crowd;
    for (int i = 0; i < 4; ++i) crowd.emplace_back([&] { sched_setaffinity(0, sizeof(other), &other); while (!over) relax(); });
    sched_setaffinity(0, sizeof(mine), &mine);
    const std::thread::id caller = std::this_thread::get_id();
    bool placed = false;  // the helper's alone
    for (int after = 0; after < 50 && !strayed; after += came) {  // some loops more once it has come
        parallel_for(8, 1, [&](int64_t) {
            if (std::this_thread::get_id() == caller) return spin(50);
            cpu_set_t now;
            sched_getaffinity(0, sizeof(now), &now);
            if (placed && !CPU_EQUAL(&now, &other)) strayed = true;
            if (!placed) sched_setaffinity(0, sizeof(other), &other);
            placed = true;
            spin(100);
            if (sched_getcpu() == cores[0]) came = true;
        });
    }
    over = true;
    for (std::thread& one : crowd) one.join();
    return came && !strayed;
}

// A thread that finds itself on the core of its team's first one goes to another, and may use the same cores as before.
bool apart(const cpu_set_t& all) {
    int moved = 0;
    Seat team[2];
    team[1].take();
    for (int i = 0; i < 20; ++i) {
        team[0].enter();
        const int core = sched_getcpu();
        if (!team[1].is_on_core_of(team[0])) continue;  // the system has just moved it
        team[1].leave(team, 2);
        moved += sched_getcpu() != core;
        cpu_set_t now;
        sched_getaffinity(0, sizeof(now), &now);
        if (!CPU_EQUAL(&now, &all)) return false;
    }
    const cpu_set_t here = only(sched_getcpu());  // with no other core, it stays
    sched_setaffinity(0, sizeof(here), &here);
    team[0].enter();
    team[1].leave(team, 2);
    return moved >= 15 && team[1].is_on_core_of(team[0]);
}

// Both want two cores; 77 says that there is one.
int with_cores(bool fetching) {
    cpu_set_t all;
    sched_getaffinity(0, sizeof(all), &all);
    std::vector<int> cores;
    for (int i = 0; i < CPU_SETSIZE; ++i)
        if (CPU_ISSET(i, &all)) cores.push_back(i);
    if (cores.size() < 2) return 77;
    return (fetching ? fetched(cores) : apart(all)) ? 0 : 1;
}
#else
int with_cores(bool) { return 77; }
#endif

int main(int, char** argv) {
    alarm(50);  // what hangs ends
    threads() = std::atoi(argv[2]);
    if (!std::strcmp(argv[1], "fetched") || !std::strcmp(argv[1], "apart")) return with_cores(argv[1][0] == 'f');
    const bool good = !std::strcmp(argv[1], "exact") ? exact(20000, 40) : !std::strcmp(argv[1], "callers") ? callers()
                    : !std::strcmp(argv[1], "late") ? late() : !std::strcmp(argv[1], "bells") ? bells() : forked();
    return good ? 0 : 1;
}
"""


def build(folder: Path, *flags: str) -> Path:
    """The program above, for one way of compiling it."""
    source, program = folder / "shares.cpp", folder / "shares"
    source.write_text(PROGRAM)
    include = native.find_source("core/platform/shares.h").parents[2]
    command = [native.need_compiler(), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", *flags]
    subprocess.run([*command, f"-I{include}", str(source), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shares"))


@pytest.mark.parametrize(
    ("case", "threads"), [("exact", 2), ("exact", 5), ("callers", 3), ("late", 2), ("late", 4), ("forked", 2), ("bells", 2)]
)
def test_each_share_runs_once_whoever_takes_it(program: Path, case: str, threads: int) -> None:
    run = subprocess.run([str(program), case, str(threads)], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("case", ["fetched", "apart"])
def test_threads_of_a_team_keep_off_each_others_cores_and_lend_their_own(program: Path, case: str) -> None:
    run = subprocess.run([str(program), case, "2"], timeout=60, check=False)
    if run.returncode == 77:
        pytest.skip("one core, or a system on which no thread can choose its own")
    assert run.returncode == 0


@pytest.mark.slow
def test_no_two_threads_touch_the_same_without_order(tmp_path: Path) -> None:
    """Under ThreadSanitizer, with more threads than cores. (A fork while threads run is not for it.)"""
    watched = build(tmp_path, "-g", "-fsanitize=thread")
    for case in ("exact", "callers", "late", "apart"):
        run = subprocess.run([str(watched), case, "4"], capture_output=True, text=True, timeout=240, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
