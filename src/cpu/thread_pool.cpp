#include "cpu/thread_pool.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace strobe::cpu {
namespace {

constexpr int kMaxWorkers = 1023;

/// About 20 microseconds: attention calls follow one another closely, and a sleeping thread takes longer to wake.
constexpr int kSpins = 600;

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

/// One call, on its caller's stack. The fields other than `active` belong to the pool's mutex.
struct Job {
    void (*body)(void*, int);
    void* context;
    int max_workers;
    int joined = 1;
    std::atomic<int> active{0};
    Job* next = nullptr;
};

class Pool {
public:
    static Pool& instance() {
        // Never destroyed: detached workers may outlive static destructors.
        static Pool* const pool = new Pool;
        return *pool;
    }

    void run(Job& job) {
        {
            const std::lock_guard lock(mutex_);
            grow(std::min(job.max_workers - 1, kMaxWorkers));
            job.next = jobs_;
            jobs_ = &job;
            generation_.fetch_add(1, std::memory_order_release);
        }
        work_.notify_all();
        job.body(job.context, 0);
        {
            const std::lock_guard lock(mutex_);
            remove(job);
        }
        for (int spin = 0; spin < kSpins && job.active.load(std::memory_order_acquire) != 0; ++spin) relax();
        if (job.active.load(std::memory_order_acquire) != 0) {
            std::unique_lock lock(mutex_);
            done_.wait(lock, [&] { return job.active.load(std::memory_order_acquire) == 0; });
        }
    }

private:
    void grow(int count) {
        while (workers_ < count) {
            try {
                std::thread([this] { work(); }).detach();
            } catch (const std::system_error&) {
                return;  // no more threads to be had: the call runs on those there are
            }
            ++workers_;
        }
    }

    void remove(Job& job) {
        Job** link = &jobs_;
        while (*link && *link != &job) link = &(*link)->next;
        if (*link) *link = job.next;
    }

    Job* joinable() {
        for (Job* job = jobs_; job; job = job->next) {
            if (job->joined < job->max_workers) return job;
        }
        return nullptr;
    }

    void work() {
        std::unique_lock lock(mutex_);
        for (;;) {
            Job* job = joinable();
            if (!job) {
                const unsigned seen = generation_.load(std::memory_order_relaxed);
                lock.unlock();
                for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) relax();
                lock.lock();
                work_.wait(lock, [&] { return joinable() != nullptr; });
                continue;
            }
            const int worker = job->joined++;
            job->active.fetch_add(1, std::memory_order_relaxed);
            lock.unlock();
            job->body(job->context, worker);
            // The caller may return, and the job die, as soon as `active` is 0: it is not touched after the decrement,
            // and the mutex makes sure that a caller who went to sleep is not missed.
            lock.lock();
            if (job->active.fetch_sub(1, std::memory_order_release) == 1) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable work_, done_;
    std::atomic<unsigned> generation_{0};
    Job* jobs_ = nullptr;
    int workers_ = 0;
};

}  // namespace

void run_on_threads(int threads, void (*body)(void* context, int worker), void* context) {
    if (threads <= 1) {
        body(context, 0);
        return;
    }
    Job job{body, context, threads};
    Pool::instance().run(job);
}

}  // namespace strobe::cpu
