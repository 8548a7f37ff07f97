#include "gpt/threads.hpp"

#include <sched.h>

namespace strobe::gpt {

namespace {

// Between two operators of a step lie microseconds; a worker looks that long before it sleeps.
constexpr int kSpins = 2000;

int usable_processors() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    const unsigned n = std::thread::hardware_concurrency();
    return n ? static_cast<int>(n) : 1;
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

template <class T>
void wait_while(const std::atomic<T>& value, T old) {
    for (int i = 0; i < kSpins; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        relax();
    }
    value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadTeam::ThreadTeam(int size) : size_(size > 0 ? size : usable_processors()) {
    for (int thread = 1; thread < size_; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadTeam::~ThreadTeam() {
    stop_.store(true, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
}

void ThreadTeam::run(Task task, void* argument) {
    if (size_ == 1) return task(argument, 0);
    task_ = task;
    argument_ = argument;
    unfinished_.store(size_ - 1, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    task(argument, 0);
    for (int left = unfinished_.load(std::memory_order_acquire); left != 0;
         left = unfinished_.load(std::memory_order_acquire))
        wait_while(unfinished_, left);
}

void ThreadTeam::work(int thread) {
    uint32_t seen = 0;
    for (;;) {
        wait_while(round_, seen);
        ++seen;
        if (stop_.load(std::memory_order_relaxed)) return;
        task_(argument_, thread);
        if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    }
}

}  // namespace strobe::gpt
