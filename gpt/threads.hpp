// A fixed team of threads. Work is split into contiguous parts that depend on the sizes alone, so a result is the same bit for
// bit whenever the team has the same size, whichever thread does a part. Nobody waits for a thread to wake up: the caller
// starts at once and does what no other thread has begun.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace strobe::gpt {

/// Those that this process may run on.
int usable_processors();

class ThreadTeam {
public:
    /// `size` threads, the caller's among them; 0: as many as the process may use.
    explicit ThreadTeam(int size = 0);
    ~ThreadTeam();
    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    int size() const { return size_; }

    /// Calls fn(part) for every part in [0, size()) and returns when all are done. Not reentrant; fn must not throw.
    template <class Fn>
    void each(Fn&& fn) {
        run([](void* f, int part) { (*static_cast<std::remove_reference_t<Fn>*>(f))(part); }, &fn);
    }

    /// Splits [0, count) into size() parts, borders at multiples of `grain`, and calls fn(begin, end, part) for those that
    /// are not empty.
    template <class Fn>
    void ranges(int64_t count, int64_t grain, Fn&& fn) {
        const int64_t units = (count + grain - 1) / grain;
        if (units <= 0) return;
        if (units == 1 || size_ == 1) return fn(int64_t{0}, count, 0);
        each([&](int part) {
            const int64_t begin = units * part / size_ * grain;
            const int64_t end = units * (part + 1) / size_ * grain;
            if (begin < end) fn(begin, end < count ? end : count, part);
        });
    }

private:
    using Task = void (*)(void*, int);
    void run(Task task, void* argument);
    void work();
    bool do_one_part();

    int size_ = 1;
    // Written by run() when no part is claimed, read by who has claimed one.
    Task task_ = nullptr;
    void* argument_ = nullptr;
    // Upper half: the call's number; lower half: the next part that nobody has claimed.
    std::atomic<uint64_t> ticket_;
    std::atomic<int> unfinished_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::jthread> workers_;
};

}  // namespace strobe::gpt
