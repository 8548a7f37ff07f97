#include "gpt/ops/cuda/lane.hpp"

#include <cuda_runtime.h>

#include <array>

#include "cuda/device.hpp"

namespace strobe::gpt::cuda {

namespace {

using strobe::cuda::check;

class StreamLane final : public Lane {
public:
    StreamLane(const Exec& first, Memory& memory, size_t scratch_bytes)
        : first_(static_cast<cudaStream_t>(first.stream)), scratch_(scratch_bytes, memory), exec_(first) {
        // Others wait for what the first stream does, nobody for this one yet.
        int least = 0, greatest = 0;
        check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
        check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, least), "cudaStreamCreate");
        check(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming), "cudaEventCreate");
        for (Mark& mark : marks_) check(cudaEventCreateWithFlags(&mark.event, cudaEventDisableTiming), "cudaEventCreate");
        exec_.stream = stream_;
        exec_.scratch = scratch_.at<void>(0);
        exec_.scratch_bytes = scratch_bytes;
        exec_.times = nullptr;
        exec_.clock = nullptr;
    }
    ~StreamLane() override {
        cudaStreamSynchronize(stream_);
        for (Mark& mark : marks_) cudaEventDestroy(mark.event);
        cudaEventDestroy(forked_);
        cudaStreamDestroy(stream_);
    }
    StreamLane(const StreamLane&) = delete;
    StreamLane& operator=(const StreamLane&) = delete;

    Exec& exec() override { return exec_; }
    void fork() override {
        check(cudaEventRecord(forked_, first_), "cudaEventRecord");
        check(cudaStreamWaitEvent(stream_, forked_, 0), "cudaStreamWaitEvent");
    }
    void mark(int place) override {
        Mark& mark = marks_[static_cast<size_t>(place)];
        check(cudaEventRecord(mark.event, stream_), "cudaEventRecord");
        mark.set = true;
    }
    void join(int place) override {
        Mark& mark = marks_[static_cast<size_t>(place)];
        if (mark.set) check(cudaStreamWaitEvent(first_, mark.event, 0), "cudaStreamWaitEvent");
        mark.set = false;
    }

private:
    struct Mark {
        cudaEvent_t event = nullptr;
        bool set = false;
    };
    cudaStream_t first_, stream_ = nullptr;
    cudaEvent_t forked_ = nullptr;
    std::array<Mark, kMarks> marks_;
    Arena scratch_;
    Exec exec_;
};

}  // namespace

std::unique_ptr<Lane> make_lane(const Exec& first, Memory& memory, size_t scratch_bytes) {
    return std::make_unique<StreamLane>(first, memory, scratch_bytes);
}

}  // namespace strobe::gpt::cuda
