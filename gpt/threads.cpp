#include "gpt/threads.hpp"

#include <sched.h>

namespace strobe::gpt {

namespace {

// Between two operators of a step lie microseconds; a worker looks that long before it sleeps.
constexpr int kSpins = 2000;

constexpr uint64_t kCall = uint64_t{1} << 32;

uint64_t part_of(uint64_t ticket) { return ticket & (kCall - 1); }

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/// Returns when the value is no longer `old`, or spuriously.
template <class T>
void wait_while(const std::atomic<T>& value, T old) {
    for (int i = 0; i < kSpins; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        relax();
    }
    value.wait(old, std::memory_order_acquire);
}

}  // namespace

int usable_processors() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    const unsigned n = std::thread::hardware_concurrency();
    return n ? static_cast<int>(n) : 1;
}

ThreadTeam::ThreadTeam(int size) : size_(size > 0 ? size : usable_processors()), ticket_(static_cast<uint64_t>(size_)) {
    for (int i = 1; i < size_; ++i) workers_.emplace_back([this] { work(); });
}

ThreadTeam::~ThreadTeam() {
    stop_.store(true, std::memory_order_relaxed);
    ticket_.fetch_add(kCall, std::memory_order_release);
    ticket_.notify_all();
}

void ThreadTeam::run(Task task, void* argument) {
    if (size_ == 1) return task(argument, 0);
    task_ = task;
    argument_ = argument;
    unfinished_.store(size_, std::memory_order_relaxed);
    const uint64_t call = (ticket_.load(std::memory_order_relaxed) / kCall + 1) * kCall;
    ticket_.store(call, std::memory_order_release);
    ticket_.notify_all();
    while (do_one_part()) {
    }
    for (int left = unfinished_.load(std::memory_order_acquire); left != 0;
         left = unfinished_.load(std::memory_order_acquire))
        wait_while(unfinished_, left);
}

// A claim succeeds only while its call runs: run() does not return, and so neither replaces task_ nor opens the next
// call, before the claimed part is finished.
bool ThreadTeam::do_one_part() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
        if (part_of(ticket) >= static_cast<uint64_t>(size_)) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire));
    task_(argument_, static_cast<int>(part_of(ticket)));
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    return true;
}

void ThreadTeam::work() {
    for (;;) {
        const uint64_t ticket = ticket_.load(std::memory_order_acquire);
        if (stop_.load(std::memory_order_relaxed)) return;
        if (do_one_part()) continue;
        if (part_of(ticket) >= static_cast<uint64_t>(size_)) wait_while(ticket_, ticket);
    }
}

}  // namespace strobe::gpt
