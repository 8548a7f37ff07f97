// A fixed team of threads. Work is split into contiguous ranges that depend on the sizes alone, so a result is the same
// bit for bit whenever the team has the same size.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace strobe::gpt {

class ThreadTeam {
public:
    /// `size` threads, the caller's among them; 0: as many as the process may use.
    explicit ThreadTeam(int size = 0);
    ~ThreadTeam();
    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    int size() const { return size_; }

    /// Calls fn(thread) once on every thread and returns when all are done. Not reentrant; fn must not throw.
    template <class Fn>
    void each(Fn&& fn) {
        run([](void* f, int thread) { (*static_cast<std::remove_reference_t<Fn>*>(f))(thread); }, &fn);
    }

    /// Splits [0, count) into one range per thread, borders at multiples of `grain`, and calls fn(begin, end, thread) for
    /// the ranges that are not empty.
    template <class Fn>
    void ranges(int64_t count, int64_t grain, Fn&& fn) {
        const int64_t units = (count + grain - 1) / grain;
        if (units <= 0) return;
        if (units == 1 || size_ == 1) return fn(int64_t{0}, count, 0);
        each([&](int thread) {
            const int64_t begin = units * thread / size_ * grain;
            const int64_t end = units * (thread + 1) / size_ * grain;
            if (begin < end) fn(begin, end < count ? end : count, thread);
        });
    }

private:
    using Task = void (*)(void*, int);
    void run(Task task, void* argument);
    void work(int thread);

    int size_ = 1;
    Task task_ = nullptr;
    void* argument_ = nullptr;
    std::atomic<uint32_t> round_{0};
    std::atomic<int> unfinished_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::jthread> workers_;
};

}  // namespace strobe::gpt
